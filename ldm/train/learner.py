"""What is in training, with all that changes as it learns: AdamW's moments, the moving average, the loss scale.

It is the U-Net, or the U-Net together with the text encoder before it.

a step  accumulate x batch images -> gradients, averaged over the processes -> clip -> AdamW -> moving average
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.blocks import ResnetBlock, SpatialTransformer
from ldm.clip import CLIPTextEncoder
from ldm.schedule import Schedule
from ldm.train.distributed import Processes, like, replicated, shard, whole, without_averaging
from ldm.train.loop import Ema
from ldm.train.objective import FineTuning, Material, examples, loss_of
from ldm.train.phantom_set import draw
from ldm.unet import UNet

MOMENTS = ("exp_avg", "exp_avg_sq")
NAMED = 32  # images that an error names: a step's, by default


class NotFinite(ValueError):
    """A loss or gradient is NaN or infinite. The weights are as they were before that step."""


@dataclass(frozen=True)
class Taken:
    """What is known of a step that was taken."""

    loss: float
    grad_norm: float  # before clipping
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


class Learner:
    """A U-Net, trained in place.

    Args:    sharded: leave each process with a part of the network.
             clip: the text encoder, where it learns along; the material then holds token ids.
    """

    def __init__(
        self,
        unet: UNet,
        recipe: FineTuning,
        processes: Processes | None = None,
        sharded: bool = False,
        clip: CLIPTextEncoder | None = None,
    ) -> None:
        self.unet, self.clip, self.recipe, self.processes = unet, clip, recipe, processes or Processes()
        self.trained = as_one(unet, clip)
        if recipe.accumulate % self.processes.world:
            raise ValueError(
                f"--accumulate: got {recipe.accumulate}, expected a multiple of the {self.processes.world} processes, "
                "to which the batches of a step are dealt out"
            )
        own_memory(self.trained)
        if recipe.checkpoint_gradients:
            recompute_activations(unet)
        if recipe.compile:
            unet.compile()  # in place: the weights keep their names
        if sharded:
            shard([unet] if clip is None else [clip, unet], self.processes)
        self.network = replicated(self.trained, self.processes)
        self.optimiser = torch.optim.AdamW(
            self.trained.parameters(),
            recipe.lr,
            recipe.betas,
            recipe.eps,
            recipe.weight_decay,
            fused=recipe.fused or None,
        )
        self.ema = Ema(self.trained, recipe.ema_decay) if recipe.ema_decay else None
        self.scaler = torch.amp.GradScaler(self.processes.device.type, enabled=recipe.precision == "fp16")
        self.seconds_in_network = 0.0

    # --- a step ---

    def step(self, step: int, material: Material, schedule: Schedule) -> Taken:
        """Step 0, 1, ... of the run.

        Raises:  NotFinite: on every process, before anything is learnt.
        """
        began, before = time.perf_counter(), self.seconds_in_network
        losses = self.gradients(step, material, schedule)
        self._require_finite(losses, step, material)
        with self._in_network():
            norm = self._update(step, material)
        seconds = time.perf_counter() - began
        outside = 1 - (self.seconds_in_network - before) / seconds
        return Taken(float(losses.mean()), norm, seconds, outside)

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
                loss = loss_of(self.network, batch, schedule, recipe, processes.device)
                losses[k] = loss.detach()
                # Averaging divides by the number of processes, of which each has a part of the batches
                self.scaler.scale(loss * processes.world / recipe.accumulate).backward()
        with self._in_network():
            return processes.total(losses).cpu()

    def _update(self, step: int, material: Material) -> float:
        """Clip and learn. Returns the gradient's norm."""
        self.scaler.unscale_(self.optimiser)
        norm = float(whole(nn.utils.clip_grad_norm_(self.trained.parameters(), self.recipe.clip)))
        # In float16 large gradients overflow: the step is left out and the scale halved, down to 1
        if not math.isfinite(norm) and not (self.scaler.is_enabled() and self.scaler.get_scale() > 1):
            files = self._files(step, material, range(self.recipe.accumulate))
            raise NotFinite(f"the gradient's norm at step {step + 1} is {norm}, of {files}")
        for group in self.optimiser.param_groups:
            group["lr"] = self.recipe.lr_at(step)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update(self.trained, step)
        return norm

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

    # --- what a continued run needs ---

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Weights, moments and moving average under their names, whole; every process must go through all of them."""
        for name, p in self.trained.named_parameters():
            yield f"model.{name}", whole(p.detach())
            state = self.optimiser.state[p]
            for key in MOMENTS:
                yield f"{key}.{name}", whole(state[key]) if state else torch.zeros(p.shape)
            if self.ema is not None:
                yield f"ema.{name}", whole(self.ema.values[name])

    def counters(self) -> dict[str, Any]:
        """What else: how many steps AdamW has taken, which in float16 may be fewer than the run's; the loss scale."""
        updates = max((int(state["step"]) for state in self.optimiser.state.values()), default=0)
        return {"updates": updates, "scaler": self.scaler.state_dict()}

    @torch.no_grad()
    def restore(self, read: Callable[[str], Tensor], counters: Mapping[str, Any]) -> None:
        """Put back what `tensors` and `counters` gave. Args: read: name -> tensor."""
        for name, p in self.trained.named_parameters():
            p.copy_(like(p, read(f"model.{name}")))
            # Copied into memory of torch's own: sums may round differently where a file happens to be mapped
            moments = {key: torch.empty_like(p).copy_(like(p, read(f"{key}.{name}"))) for key in MOMENTS}
            updates = torch.tensor(float(counters["updates"]), device=p.device if self.recipe.fused else "cpu")
            self.optimiser.state[p] = {"step": updates, **moments}
            if self.ema is not None:
                self.ema.values[name].copy_(like(p, read(f"ema.{name}")))
        self.scaler.load_state_dict(counters["scaler"])

    @contextmanager
    def as_saved(self) -> Iterator[nn.Module]:
        """While open, what is trained has the weights that a checkpoint has: the moving average where one is kept."""
        if self.ema is None:
            yield self.trained
            return
        before = {name: p.detach().clone() for name, p in self.trained.named_parameters()}
        self._set(self.ema.values)
        try:
            yield self.trained
        finally:
            self._set(before)

    @torch.no_grad()
    def _set(self, values: Mapping[str, Tensor]) -> None:
        for name, p in self.trained.named_parameters():
            p.copy_(values[name])


def own_memory(network: nn.Module) -> None:
    """Move weights that are views of a mapped file into memory of torch's own, and let all of them learn.

    Where numbers lie decides how vector units sum them, in the last bit; a continued run must not differ.
    """
    for p in network.parameters():
        p.data = torch.empty_like(p).copy_(p)
    network.train().requires_grad_(True)


def recompute_activations(unet: UNet) -> None:
    """Keep only the inputs of resnets and transformers for the backward pass. [Chen et al. 2016]"""
    for module in unet.modules():
        if isinstance(module, ResnetBlock | SpatialTransformer):
            setattr(module, "forward", partial(checkpoint, module.forward, use_reentrant=False))  # noqa: B010
