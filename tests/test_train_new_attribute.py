"""`ldm finetune` teaches the shipped model a word that it has never seen, and it keeps the other two of the chest."""

from pathlib import Path

import pytest
import torch

import ldm
from ldm.pipeline import PHANTOM_WEIGHTS
from tools import cli
from tools.examples.new_attribute import LABELS, PROMPTS, drawn, heart_probe, pairs, shown

# Higher rate and smaller batches than the paper's: the model is small, and minutes on a CPU must do
RECIPE = "--steps 800 --batch 8 --accumulate 1 --lr 4e-4 --warmup 10 --ema-decay 0.98 --caption-dropout 0.1 --bf16"


def test_the_probe_tells_hearts_that_it_has_not_seen():
    images, large = pairs(range(5_000_000, 5_000_040))
    assert heart_probe().score(images, large) > 0.95


def finetuned(folder: Path) -> Path:
    """The shipped model after minutes with 2,000 phantoms, of seeds that neither it nor its classifiers have seen."""
    data, out = folder / "data", folder / "out"
    phantoms = ["--domain", "chest", "--n", "2000", "--seed", "4000000", "--extra", "cardiomegaly"]
    assert cli.main(["phantom", *phantoms, "--out", str(data)]) == 0
    options = [*RECIPE.split(), "--train-text-encoder", "--sample-every", "0", "--keep", "1"]
    assert cli.main(["finetune", "--data", str(data), "--out", str(out), *options]) == 0
    return out / "last.safetensors"


@pytest.mark.slow
def test_a_new_attribute_appears_on_demand_and_the_others_stay(tmp_path):
    probe = heart_probe()
    before = ldm.load(PHANTOM_WEIGHTS, dtype=torch.bfloat16)
    assert shown(drawn(before, "cardiomegaly"), probe)["cardiomegaly"] < 0.1  # the word means nothing to it yet

    after = ldm.load(finetuned(tmp_path), dtype=torch.bfloat16)
    now = {name: shown(drawn(after, name), probe) for name in PROMPTS}
    for name in LABELS:
        assert now[name][name] >= 0.9, now
        assert now["neutral"][name] <= 0.1, now
