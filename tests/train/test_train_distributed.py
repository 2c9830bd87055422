"""A run shared by two processes is the run of one: as copies, in shards, and continued by another number of them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_run import UNET, write_data, write_weights

from ldm.train.distributed import Processes, own_device
from ldm.train.objective import FineTuning
from ldm.train.unet_learner import UNetLearner
from ldm.unet import UNet

ROOT = Path(__file__).parents[2]


def test_batches_are_dealt_out_so_that_each_is_someones():
    shares = [list(Processes(rank, 3).share(7)) for rank in range(3)]
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]


def test_batches_that_cannot_be_dealt_out_evenly_are_refused():
    with pytest.raises(ValueError, match=r"--accumulate: got 4, expected a multiple of the 3 processes"):
        UNetLearner(UNet(UNET), FineTuning(steps=1, accumulate=4), Processes(1, 3))


def test_an_unknown_device_is_named():
    with pytest.raises(ValueError, match=r"--device: got 'gpu7', expected cpu, cuda or cuda:N"):
        own_device("gpu7")


# ---- two real processes ----------------------------------------------------------------------------


def finetune(processes: int, out: Path, steps: int, *more: str) -> str:
    """Run the command in so many processes. Returns what it said on stdout."""
    shared = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "--module"]
    launch = [sys.executable, *(shared if processes > 1 else ["-m"]), "ldm_tools", "finetune"]
    files = ["--weights", str(out.parent / "model.safetensors"), "--data", str(out.parent / "data"), "--out", str(out)]
    recipe = ["--steps", str(steps), "--batch", "2", "--accumulate", "2", "--lr", "1e-3", "--save-every", "2"]
    options = [
        "--workers",
        "1",
        "--cache",
        str(out.parent / "latents"),
        "--caption-dropout",
        "0.2",
        "--ema-decay",
        "0.9",
    ]
    done = subprocess.run(
        [*launch, *files, *recipe, *options, *more],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def log(out: Path) -> dict[int, dict]:
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in rows}


def assert_same_run(a: Path, b: Path) -> None:
    """The same curves, and weights that went the same way.

    Batches and noise are the same bits; gradients of the two batches are summed in another order, so losses agree to
    a few units of float32's 1e-7, gradients, which nearly cancel, to more. AdamW moves a weight whose gradient is
    nothing but such rounding by lr either way, and there are some: the bias before a norm that takes it out again. So
    weights are compared by the length of the way that they went together.
    """
    one, other = log(a), log(b)
    assert one.keys() == other.keys()
    for step in one.keys() - {0}:
        assert one[step]["loss"] == pytest.approx(other[step]["loss"], rel=1e-4)
        assert one[step]["grad_norm"] == pytest.approx(other[step]["grad_norm"], rel=1e-3)
    for step in (step for step in one if "validation" in one[step]):
        assert one[step]["validation"] == pytest.approx(other[step]["validation"], rel=1e-4)
    last = f"step-{max(one):08d}.state.safetensors"
    states = [load_file(folder / last) for folder in (a, b)]
    before = load_file(a / f"step-{max(one) - 2:08d}.state.safetensors")
    assert states[0].keys() == states[1].keys()
    names = [name for name in before if name.startswith("model.")]
    way = sum(float((states[0][name] - before[name]).square().sum()) for name in names) ** 0.5
    apart = sum(float((states[0][name] - states[1][name]).square().sum()) for name in names) ** 0.5
    assert apart < 0.05 * way


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.safetensors, data/, and straight/: four steps of one process."""
    place = tmp_path_factory.mktemp("runs")
    write_weights(place / "model.safetensors")
    write_data(place / "data")
    finetune(1, place / "straight", 4)
    return place


@pytest.mark.slow
def test_two_copies_are_one_run(place):
    said = finetune(2, place / "copies", 4)
    assert said.count("after 4 steps") == 1  # only the first one talks
    assert json.loads((place / "copies" / "run.json").read_text())["processes"] == 2
    assert_same_run(place / "straight", place / "copies")


@pytest.mark.slow
def test_two_shards_go_on_with_the_run_of_one_and_one_with_that_of_two(place):
    shards = place / "shards"
    shutil.copytree(place / "straight", shards)
    for name in ("step-00000004.state.safetensors", "step-00000004.safetensors"):
        (shards / name).unlink()
    finetune(2, shards, 4, "--resume", "auto", "--shard")
    assert_same_run(place / "straight", shards)
    finetune(1, shards, 6, "--resume", "auto")
    finetune(1, place / "straight", 6, "--resume", "auto")
    assert_same_run(place / "straight", shards)
