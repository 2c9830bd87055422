"""Killed at random moments, and before each file operation of a save: what is there is whole, and it goes on."""

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_checkpoints import TINY
from torch import Tensor

import ldm
from ldm.clip import CLIPTextEncoder
from ldm.config import CLIPConfig
from ldm.schedule import Schedule
from ldm.train.finetune import Rounds, finetune
from ldm.train.objective import FineTuning, Material
from ldm.train.run_folder import LAST, RunFolder
from ldm.train.unet_learner import UNetLearner
from ldm.unet import UNet
from ldm.vae import AutoencoderKL

KILLS = 20
FILE_OPERATIONS = {"open", "os.rename", "os.remove", "os.link", "os.listdir"}  # as Python's audit events name them


class Stored:
    """Made-up posteriors of five images."""

    moment = torch.randn(5, 8, 4, 4, generator=torch.Generator().manual_seed(0))

    def moments(self, rows: NDArray[np.int64], flipped: Sequence[bool]) -> Tensor:
        return self.moment[torch.from_numpy(rows)]


def train(out: Path, steps: int) -> None:
    """Go on with the run in `out` up to a step; every step is saved."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    words = replace(TINY.clip, vocabulary=CLIPConfig().vocabulary)  # all, as of any model that can be loaded
    frozen = {"clip": CLIPTextEncoder(words), "vae": AutoencoderKL(TINY.vae)}
    contexts = torch.randn(3, 9, 64, generator=torch.Generator().manual_seed(1))
    material = Material(np.array([f"{i}.png" for i in range(5)]), Stored(), torch.arange(5) % 2, contexts, 0.18215)
    recipe = FineTuning(steps=steps, batch=1, accumulate=1, lr=1e-3, ema_decay=0.9)
    folder = RunFolder(out, frozen, recipe.settings())
    folder.check(resume=True)
    finetune(UNetLearner(UNet(TINY.unet), recipe), Schedule.sd15(), material, folder, Rounds(save_every=1))


def newest(out: Path) -> int:
    return max((int(path.name[5:13]) for path in out.glob("step-*.state.safetensors")), default=0)


def assert_whole(out: Path) -> None:
    """Every file that bears its final name can be read to the end."""
    for path in out.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert all(bool(file.get_tensor(name).isfinite().all()) for name in file.keys())  # noqa: SIM118
    if newest(out):
        assert out.joinpath(f"step-{newest(out):08d}.safetensors").exists()
        ldm.load(out / LAST)


def train_until_operation(out: Path, steps: int, last: int) -> None:
    """Go on with the run, and die just before the file operation in `out` that is number `last`, counted from 1."""
    seen = 0

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if event in FILE_OPERATIONS and any(str(argument).startswith(str(out)) for argument in arguments):
            seen += 1
            if seen == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    train(out, steps)


def assert_goes_on_as_if_never_stopped(out: Path, straight: Path, steps: int) -> None:
    """Both runs end at `steps` with the same weights, moments and averages."""
    train(out, steps)
    one, other = (load_file(folder / f"step-{steps:08d}.state.safetensors") for folder in (out, straight))
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert (out / LAST).read_bytes() == (straight / LAST).read_bytes()
    assert list(out.glob("*.partial")) == []


@pytest.fixture(scope="module")
def servers():
    """Processes that find everything imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch.utils.tensorboard"])
    return context


@pytest.mark.slow
def test_killed_at_random_it_always_goes_on(servers, tmp_path):
    out, chance = tmp_path / "killed", random.Random(0)
    for _ in range(KILLS):
        process = servers.Process(target=train, args=(out, 1_000_000))
        process.start()
        wanted = newest(out) + chance.randint(0, 2)
        while newest(out) < wanted and process.is_alive():
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.05))
        assert process.is_alive(), "it could not go on"
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert_whole(out)

    steps = newest(out) + 2
    assert steps > KILLS / 2
    train(tmp_path / "straight", steps)
    assert_goes_on_as_if_never_stopped(out, tmp_path / "straight", steps)


@pytest.mark.slow
def test_killed_before_any_file_operation_it_goes_on(servers, tmp_path):
    """A run of two steps does a third, which removes the first one's files; it dies one operation later each time."""
    begun, straight, out = tmp_path / "begun", tmp_path / "straight", tmp_path / "killed"
    half_written: set[str] = set()
    train(begun, 2)
    train(straight, 3)
    for last in range(1, 1000):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(begun, out)
        process = servers.Process(target=train_until_operation, args=(out, 3, last))
        process.start()
        process.join(timeout=600)
        if process.exitcode == 0:  # it came to its end: every operation has been met
            break
        assert process.exitcode == -signal.SIGKILL
        for path in out.glob("*.partial.partial"):  # as if it had died within the last write
            os.truncate(path, path.stat().st_size // 2)
        half_written |= {path.name.partition(".partial")[0] for path in out.glob("*.partial")}
        assert_whole(out)
        assert_goes_on_as_if_never_stopped(out, straight, 3)
    step = "step-00000003"
    assert half_written >= {f"{step}.safetensors", f"{step}.state.safetensors", LAST}
