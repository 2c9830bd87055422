"""Killed at a random moment, twenty times and in the middle of a save too: what is there is whole, and it goes on."""

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Sequence
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
from ldm.schedule import Schedule
from ldm.train.finetune import Rounds, finetune
from ldm.train.learner import Learner
from ldm.train.objective import FineTuning, Material
from ldm.train.state import LAST, RunFolder
from ldm.unet import UNet
from ldm.vae import AutoencoderKL

KILLS = 20


class Stored:
    """Made-up posteriors of five images."""

    moment = torch.randn(5, 8, 4, 4, generator=torch.Generator().manual_seed(0))

    def moments(self, rows: NDArray[np.int64], flipped: Sequence[bool]) -> Tensor:
        return self.moment[torch.from_numpy(rows)]


def train(out: Path, steps: int) -> None:
    """Go on with the run in `out` up to a step; every step is saved."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    frozen = {"clip": CLIPTextEncoder(TINY.clip), "vae": AutoencoderKL(TINY.vae)}
    contexts = torch.randn(3, 9, 64, generator=torch.Generator().manual_seed(1))
    material = Material(np.array([f"{i}.png" for i in range(5)]), Stored(), torch.arange(5) % 2, contexts, 0.18215)
    recipe = FineTuning(steps=steps, batch=1, accumulate=1, lr=1e-3, ema_decay=0.9)
    folder = RunFolder(out, frozen, recipe.settings())
    folder.check(resume=True)
    finetune(Learner(UNet(TINY.unet), recipe), Schedule.sd15(), material, folder, Rounds(save_every=1))


def newest(out: Path) -> int:
    return max((int(path.name[5:13]) for path in out.glob("step-*.state.safetensors")), default=0)


def assert_whole(out: Path) -> None:
    """Every file that bears its final name can be read to the end."""
    for path in out.glob("*.safetensors"):
        if not path.name.startswith("next."):
            with safe_open(path, framework="pt") as file:
                assert all(bool(file.get_tensor(name).isfinite().all()) for name in file.keys())  # noqa: SIM118
    if newest(out):
        assert out.joinpath(f"step-{newest(out):08d}.safetensors").exists()
        ldm.load(out / LAST)


@pytest.mark.slow
def test_killed_at_random_it_always_goes_on(tmp_path):
    out, straight, chance = tmp_path / "killed", tmp_path / "straight", random.Random(0)
    servers = multiprocessing.get_context("forkserver")
    servers.set_forkserver_preload([__name__, "torch.utils.tensorboard"])  # a process a kill, imports once
    kills = in_a_save = 0
    while kills < KILLS or not in_a_save:
        assert kills < 3 * KILLS, "no kill ever met a save"
        process = servers.Process(target=train, args=(out, 1_000_000))
        process.start()
        wanted = newest(out) + chance.randint(0, 2)
        while newest(out) < wanted and process.is_alive():
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.05))
        assert process.is_alive(), "it could not go on"
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
        in_a_save += any(out.glob("next.*.safetensors*"))
        assert_whole(out)

    steps = newest(out) + 2
    assert steps > KILLS / 2
    train(out, steps)
    train(straight, steps)
    one, other = (load_file(folder / f"step-{steps:08d}.state.safetensors") for folder in (out, straight))
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert (out / LAST).read_bytes() == (straight / LAST).read_bytes()
    assert list(out.glob("next.*")) == []
