"""The U-Net in fine-tuning, alone, together with the text encoder before it, or by a low-rank adapter in it.

a step  accumulate x batch images -> gradients, averaged over the processes -> the rest as of `ldm.train.learner`
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.blocks import ResnetBlock, SpatialTransformer
from ldm.clip import CLIPTextEncoder
from ldm.schedule import Schedule
from ldm.train.distributed import Processes, replicated, shard, without_averaging
from ldm.train.learner import Learner, NotFinite, Taken
from ldm.train.low_rank import Adapter
from ldm.train.objective import FineTuning, Material, examples, loss_of
from ldm.train.phantom_set import draw
from ldm.unet import UNet

NAMED = 32  # images that an error names: a step's, by default


@dataclass(frozen=True)
class Timed(Taken):
    """A step, and how long it took."""

    seconds: float
    outside: float  # share of the seconds that went into anything but network and optimiser


class TextConditionedUNet(nn.Module):
    """The text encoder and the U-Net behind it as one network, which takes token ids where a U-Net takes contexts."""

    def __init__(self, clip: nn.Module, unet: nn.Module) -> None:
        super().__init__()
        self.clip, self.unet = clip, unet

    def forward(self, x_t: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """x_t: (B, 4, h, w), t: (B,), ids: (B, L) int64 -> eps (B, 4, h, w)."""
        return self.unet(x_t, t, self.clip(ids))


def as_one(unet: nn.Module, clip: nn.Module | None = None) -> nn.Module:
    """What learns, under the names that its weights have in a state file. Args: clip: where it learns along."""
    return unet if clip is None else TextConditionedUNet(clip, unet)


class UNetLearner(Learner):
    """A U-Net, trained in place.

    Args:    sharded: leave each process with a part of the network.
             clip: the text encoder, where it learns along; the material then holds token ids.
             adapter: of `ldm.train.low_rank`, put into the U-Net already; then nothing else learns.
    """

    recipe: FineTuning

    def __init__(
        self,
        unet: UNet,
        recipe: FineTuning,
        processes: Processes | None = None,
        sharded: bool = False,
        clip: CLIPTextEncoder | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        self.unet, self.clip, self.adapter, self.processes = unet, clip, adapter, processes or Processes()
        self.whole = as_one(unet, clip)
        trained = self.whole if adapter is None else adapter
        if recipe.accumulate % self.processes.world:
            raise ValueError(
                f"--accumulate: got {recipe.accumulate}, expected a multiple of the {self.processes.world} processes, "
                "to which the batches of a step are dealt out"
            )
        own_memory(self.whole)
        if on_gpu(self.processes.device) and not sharded:  # which takes contiguous weights only
            unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.whole.requires_grad_(False)
        trained.requires_grad_(True)
        if recipe.checkpoint_gradients:
            recompute_activations(unet)
        if recipe.compile:
            unet.compile()  # in place: the weights keep their names
        if sharded:
            shard([unet] if clip is None else [clip, unet], self.processes)
        self.network = replicated(self.whole, self.processes)
        scaled = recipe.precision == "fp16"
        super().__init__(trained, recipe, self.processes.device, fused=recipe.fused, scaled=scaled)
        self.seconds = self.seconds_in_network = 0.0

    def step(self, step: int, material: Material, schedule: Schedule) -> Timed:
        """Step 0, 1, ... of the run.

        Raises:  NotFinite: on every process, before anything is learnt.
        """
        began, before = time.perf_counter(), self.seconds_in_network
        losses = self.gradients(step, material, schedule)
        self._require_finite(losses, step, material)
        with self._in_network():
            try:
                norm = self.update(step)
            except NotFinite as error:
                files = self._files(step, material, range(self.recipe.accumulate))
                raise NotFinite(f"{error}, of {files}") from None
        seconds = time.perf_counter() - began
        self.seconds += seconds
        outside = 1 - (self.seconds_in_network - before) / seconds
        return Timed(float(losses.mean()), norm, seconds, outside)

    def gradients(self, step: int, material: Material, schedule: Schedule) -> Tensor:
        """Leave the gradients of a step in the network. Returns the losses of all its batches: (accumulate,)."""
        recipe, processes = self.recipe, self.processes
        self.trained.zero_grad(set_to_none=True)
        rows = draw(recipe.seed, step, len(material), recipe.batch * recipe.accumulate)
        losses = torch.zeros(recipe.accumulate, device=processes.device)
        share = processes.share(recipe.accumulate)
        for k in share:
            place = k * recipe.batch
            batch = examples(material, recipe, rows[place : place + recipe.batch], step * len(rows) + place)
            with self._in_network(), without_averaging(self.network, last=k == share[-1]):
                loss = loss_of(self.network, batch, schedule, recipe, processes.device, self.unet.prediction)
                losses[k] = loss.detach()
                # Averaging divides by the number of processes, of which each has a part of the batches
                self.scaler.scale(loss * processes.world / recipe.accumulate).backward()
        with self._in_network():
            return processes.total(losses).cpu()

    def _require_finite(self, losses: Tensor, step: int, material: Material) -> None:
        for k, loss in enumerate(losses.tolist()):
            if not math.isfinite(loss):
                files = self._files(step, material, range(k, k + 1))
                raise NotFinite(f"the loss at step {step + 1} is {loss}, of {files}")

    def _files(self, step: int, material: Material, batches: range) -> str:
        size = self.recipe.batch
        rows = draw(self.recipe.seed, step, len(material), size * self.recipe.accumulate)
        chosen = rows[batches.start * size : batches.stop * size]
        more = f" and {len(chosen) - NAMED} more" if len(chosen) > NAMED else ""
        return ", ".join(str(file) for file in material.files[chosen[:NAMED]]) + more

    @contextmanager
    def _in_network(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds_in_network += time.perf_counter() - began


def on_gpu(device: torch.device) -> bool:
    """Where convolutions work in channels_last, and would lay other weights anew in every step."""
    return device.type == "cuda"


def own_memory(network: nn.Module) -> None:
    """Move weights that are views of a mapped file into memory of torch's own.

    Where numbers lie decides how vector units sum them, in the last bit; a continued run must not differ.
    """
    for p in network.parameters():
        p.data = torch.empty_like(p).copy_(p)
    network.train()


def recompute_activations(unet: UNet) -> None:
    """Keep only the inputs of resnets and transformers for the backward pass. [Chen et al. 2016]"""
    for module in unet.modules():
        if isinstance(module, ResnetBlock | SpatialTransformer):
            setattr(module, "forward", partial(checkpoint, module.forward, use_reentrant=False))  # noqa: B010
