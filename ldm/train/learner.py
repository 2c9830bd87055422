"""A network in training, with all that changes as it learns: AdamW's moments, the moving average, the loss scale.

a step  gradients -> clip -> AdamW -> moving average
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.train.distributed import like, whole

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Recipe:
    """The numbers of one training run. `ema_decay` 0 keeps no moving average."""

    steps: int  # of AdamW
    lr: float
    warmup: int = 100
    final_lr: float = 0.01  # as a share of lr, at the end of the cosine
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    clip: float = 1.0  # largest norm of a step's gradient
    ema_decay: float = 0.0
    save_every: int = 250

    def lr_at(self, step: int) -> float:
        """Of step 0, 1, ...: linear warm-up, then half a cosine down to final_lr * lr."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


class NotFinite(ValueError):
    """A loss or gradient is NaN or infinite. The weights are as they were before that step."""


@dataclass(frozen=True)
class Taken:
    """What is known of a step that was taken."""

    loss: float
    grad_norm: float  # before clipping


class Ema:
    """An exponential moving average of a module's parameters. [Polyak and Juditsky 1992; as used by Ho et al. 2020]"""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Early on the average is short: it forgets the initial weights."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, p in module.named_parameters():
            self.values[name].lerp_(p, 1 - decay)


class Learner:
    """A network, trained in place.

    Args:    fused: AdamW in one kernel.  scaled: scale the loss, as float16 needs.
    """

    def __init__(
        self,
        trained: nn.Module,
        recipe: Recipe,
        device: torch.device | str = "cpu",
        *,
        fused: bool = False,
        scaled: bool = False,
    ) -> None:
        self.trained, self.recipe, self.fused = trained, recipe, fused
        self.optimiser = torch.optim.AdamW(
            trained.parameters(), recipe.lr, recipe.betas, recipe.eps, recipe.weight_decay, fused=fused or None
        )
        self.ema = Ema(trained, recipe.ema_decay) if recipe.ema_decay else None
        self.scaler = torch.amp.GradScaler(torch.device(device).type, enabled=scaled)

    # --- a step ---

    def learn(self, step: int, loss: Tensor) -> Taken:
        """Step 0, 1, ... of the run, on its loss; one without a graph has left its gradients already, unscaled.

        Raises NotFinite before anything is learnt.
        """
        if not math.isfinite(value := loss.item()):
            raise NotFinite(f"the loss at step {step + 1} is {value}")
        if loss.requires_grad:
            self.trained.zero_grad(set_to_none=True)
            self.scaler.scale(loss).backward()
        return Taken(value, self.update(step))

    def update(self, step: int) -> float:
        """Clip the gradients that there are, and learn from them. Returns their norm before clipping."""
        self.scaler.unscale_(self.optimiser)
        norm = float(whole(nn.utils.clip_grad_norm_(self.trained.parameters(), self.recipe.clip)))
        # In float16 large gradients overflow: the step is left out and the scale halved, down to 1
        if not math.isfinite(norm) and not (self.scaler.is_enabled() and self.scaler.get_scale() > 1):
            raise NotFinite(f"the gradient's norm at step {step + 1} is {norm}")
        for group in self.optimiser.param_groups:
            group["lr"] = self.recipe.lr_at(step)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update(self.trained, step)
        return norm

    # --- what a continued run needs ---

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Weights, moments and moving average under their names, whole; every process must go through all of them."""
        parameters = dict(self.trained.named_parameters())
        for name, value in self.trained.state_dict().items():
            yield f"model.{name}", whole(value)
            if name not in parameters:
                continue  # a buffer
            state = self.optimiser.state[parameters[name]]
            for key in MOMENTS:
                yield f"{key}.{name}", whole(state[key]) if state else torch.zeros(value.shape)
            if self.ema is not None:
                yield f"ema.{name}", whole(self.ema.values[name])

    def counters(self) -> dict[str, Any]:
        """What else: how many steps AdamW has taken, which in float16 may be fewer than the run's; the loss scale."""
        updates = max((int(state["step"]) for state in self.optimiser.state.values()), default=0)
        return {"updates": updates, "scaler": self.scaler.state_dict()}

    @torch.no_grad()
    def restore(self, read: Callable[[str], Tensor], counters: Mapping[str, Any]) -> None:
        """Put back what `tensors` and `counters` gave. Args: read: name -> tensor."""
        parameters = dict(self.trained.named_parameters())
        for name, value in self.trained.state_dict().items():
            value.copy_(like(value, read(f"model.{name}")))
            if name not in parameters:
                continue
            p = parameters[name]
            # Copied into memory of torch's own: sums may round differently where a file happens to be mapped
            moments = {key: torch.empty_like(p).copy_(like(p, read(f"{key}.{name}"))) for key in MOMENTS}
            updates = torch.tensor(float(counters["updates"]), device=p.device if self.fused else "cpu")
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
        self.set_weights(self.ema.values)
        try:
            yield self.trained
        finally:
            self.set_weights(before)

    @torch.no_grad()
    def set_weights(self, values: Mapping[str, Tensor]) -> None:
        """Overwrite every parameter."""
        for name, p in self.trained.named_parameters():
            p.copy_(values[name])
