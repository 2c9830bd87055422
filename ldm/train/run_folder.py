"""A fine-tuning run's folder: checkpoints that any program reads, and beside each the state to go on from.

OUT/step-00000020.safetensors        the model, in SD1.5's single-file layout; of an adapter, it alone
OUT/step-00000020.state.safetensors  the state, see `ldm.train.state`
OUT/last.safetensors                 the newest checkpoint again (a link where the file system has links)
OUT/log.jsonl ...                    what happened, as of `ldm.train.watch`

The state comes last, so that a state that is there has its checkpoint.
"""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor, nn

from ldm.checkpoint import save
from ldm.checkpoint.loading import build
from ldm.config import SD15_DIFFUSION, DiffusionConfig
from ldm.files import complete
from ldm.train.latent_cache import require_space
from ldm.train.low_rank import save_adapter
from ldm.train.state import put_back, read_metadata, write_state
from ldm.train.unet_learner import UNetLearner, as_one

LAST = "last.safetensors"
STATE_NAME = re.compile(r"step-(\d+)\.state\.safetensors")


class RunFolder:
    """OUT of one run.

    Args:    frozen: "clip" and "vae", or "vae" where the text encoder learns: what checkpoints hold unchanged;
             nothing of an adapter's.
             settings: all that decides the weights at a step; a run is continued only with the same ones.
             keep: how many of the newest checkpoints stay.  writes: whether this process is the one that writes.
             diffusion: what the U-Net predicts, and its schedule, which checkpoints tell.
    """

    def __init__(
        self,
        path: Path,
        frozen: Mapping[str, nn.Module],
        settings: Mapping[str, object],
        keep: int = 2,
        writes: bool = True,
        diffusion: DiffusionConfig = SD15_DIFFUSION,
    ) -> None:
        self.diffusion = diffusion
        self.path, self.frozen, self.keep, self.writes = path, frozen, keep, writes
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))  # as they read when they come back
        if writes:
            path.mkdir(parents=True, exist_ok=True)
            (path / "trial.partial").touch()  # may we write here?
            (path / "trial.partial").unlink()

    def steps(self) -> list[int]:
        """The steps that the run can go on from, oldest first."""
        return sorted(int(match[1]) for file in self.path.iterdir() if (match := STATE_NAME.fullmatch(file.name)))

    def checkpoint(self, step: int) -> Path:
        """Where the model after so many steps lies."""
        return self.path / f"step-{step:08d}.safetensors"

    def state(self, step: int) -> Path:
        """What lies beside it to go on from."""
        return self.path / f"step-{step:08d}.state.safetensors"

    def check(self, resume: bool) -> None:
        """Refuse, before any work, to overwrite a run, or to go on with another one than that which is there.

        Raises:  ValueError: when there is a run and `resume` is False, or it has other settings or is damaged.
        """
        if self.writes:
            for leftover in self.path.glob("*.partial"):
                leftover.unlink()
        if not (steps := self.steps()):
            return
        if not resume:
            raise ValueError(
                f"--out: {self.path} holds a run at step {steps[-1]}; --resume auto goes on with it, or choose another"
            )
        stored = read_metadata(self.state(steps[-1]))["settings"]
        names = sorted(name for name in {*stored, *self.settings} if stored.get(name) != self.settings.get(name))
        if names:
            changes = ", ".join(f"{name} (was {stored.get(name)}, is {self.settings.get(name)})" for name in names)
            raise ValueError(
                f"--resume: {self.path} holds a run with other settings: {changes}; give the same or another --out"
            )

    def require_space(self, trained: Collection[nn.Module], averaged: bool) -> None:
        """Raises ValueError when the disk will not hold the checkpoints that are kept and one that is being written."""
        model, state = sum(map(_bytes, (*self.frozen.values(), *trained))), sum(map(_bytes, trained))
        one = model + (4 if averaged else 3) * state
        missing = max(1, self.keep + 1 - len(self.steps()))
        require_space(self.path, missing * one, "checkpoints", "make room, lower --keep, or choose another --out")

    def save(self, step: int, learner: UNetLearner) -> Path:
        """Write the checkpoint and the state after `step` steps; remove those that are too old. Returns LAST.

        Every process must call it, since each may hold a part; the first one writes.
        """
        tensors = {name: tensor for name, tensor in learner.tensors() if self.writes}
        if not self.writes:
            return self.path / LAST
        with complete(self.checkpoint(step), on_disk=True) as unfinished:
            self._write_model(unfinished, learner, tensors)
        write_state(self.state(step), learner, step, self.settings, tensors)
        self._point_last_to(step)
        for old in self.steps()[: -self.keep]:  # the state last: what is left of it after a kill is found next time
            self.checkpoint(old).unlink(missing_ok=True)
            self.state(old).unlink()
        return self.path / LAST

    def resume(self, learner: UNetLearner) -> int:
        """Put the newest state back, where there is one. Returns the steps done."""
        if not (steps := self.steps()):
            return 0
        step = steps[-1]
        put_back(self.state(step), learner)
        if self.writes:
            self._point_last_to(step)
        return step

    def _write_model(self, path: Path, learner: UNetLearner, tensors: Mapping[str, Tensor]) -> None:
        """The moving average is the model, or the adapter, where one is kept."""
        kind = "model." if learner.ema is None else "ema."
        weights = {name.removeprefix(kind): tensor for name, tensor in tensors.items() if name.startswith(kind)}
        if learner.adapter is not None:
            return save_adapter(path, learner.adapter, weights)
        trained = {"unet": build(learner.unet.config)}
        if learner.clip is not None:
            trained["clip"] = build(learner.clip.config)
        as_one(**trained).load_state_dict(weights, assign=True)
        save(path, {**self.frozen, **trained}, diffusion=self.diffusion)

    def _point_last_to(self, step: int) -> None:
        with complete(self.path / LAST, on_disk=True) as unfinished:
            unfinished.unlink(missing_ok=True)
            try:
                os.link(self.checkpoint(step), unfinished)
            except OSError:  # a file system without links
                shutil.copyfile(self.checkpoint(step), unfinished)


def _bytes(network: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in network.state_dict().values())


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """While open, SIGTERM and SIGINT ask to stop at the next good moment; the second one stops at once.

    Yields:  whether someone asked.
    """
    asked: list[int] = []
    former: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def ask(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        signal.signal(number, former[number])

    for number in former:
        signal.signal(number, ask)
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
