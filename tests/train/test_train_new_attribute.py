"""`ldm finetune` teaches the shipped model a word that it has never seen, and it keeps the other two of the chest."""

from pathlib import Path

import pytest
import torch
from ldm_tools import cli
from ldm_tools.examples import new_attribute
from ldm_tools.examples.new_attribute import PROMPTS, drawn, heart_probe, pairs, shown

import ldm
from ldm.phantom.prompts import CHEST_LABELS
from ldm.pipeline import PHANTOM_WEIGHTS


def test_the_probe_tells_hearts_that_it_has_not_seen():
    images, large = pairs(range(5_000_000, 5_000_040))
    assert heart_probe().score(images, large) > 0.95


def commands(folder: Path) -> list[list[str]]:
    """The first two of the example, drawing 2,000 phantoms that nothing shipped has seen and training on them."""
    lines = [line for line in str(new_attribute.__doc__).splitlines() if line.startswith("ldm ")]
    places = {"data/cardiomegaly": str(folder / "data"), "runs/cardiomegaly": str(folder / "out")}
    return [[places.get(word, word) for word in line.split()[1:]] for line in lines]


@pytest.mark.slow
def test_a_new_attribute_appears_on_demand_and_the_others_stay(tmp_path):
    probe = heart_probe()
    before = ldm.load(PHANTOM_WEIGHTS, dtype=torch.bfloat16)
    assert shown(drawn(before, "cardiomegaly"), probe)["cardiomegaly"] < 0.1  # the word means nothing to it yet

    draw, train = commands(tmp_path)
    assert cli.main(draw) == 0
    assert cli.main([*train, "--sample-every", "0", "--keep", "1"]) == 0
    after = ldm.load(tmp_path / "out" / "last.safetensors", dtype=torch.bfloat16)
    now = {name: shown(drawn(after, name), probe) for name in PROMPTS}
    for name in CHEST_LABELS:
        assert now[name][name] >= 0.9, now
        assert now["neutral"][name] <= 0.1, now
