"""The training loop that every network here goes through: AdamW, warm-up and cosine decay, clipping, EMA, restarts.

A run is a function of its seed: the loss of step k must draw its batch and noise from (seed, k) alone, so that a run
that was stopped and restarted equals one that was not.
"""

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """The numbers of one training run. `ema_decay` 0 keeps no moving average."""

    steps: int
    lr: float
    warmup: int = 100
    final_lr: float = 0.01  # as a share of lr, at the end of the cosine
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0
    ema_decay: float = 0.0
    save_every: int = 250

    def lr_at(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to final_lr * lr."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


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


def fit(
    name: str,
    module: nn.Module,
    loss_at: Callable[[int], Tensor],
    recipe: Recipe,
    folder: Path,
) -> None:
    """Train `module` in place and leave it with its final weights: the moving average where one is kept.

    Args:    loss_at: step -> scalar loss, drawing from (seed, step) only.
             folder: holds NAME.safetensors (the newest checkpoint; a run found there is continued) and NAME.jsonl
             (one line per 50 steps: step, mean loss, lr, seconds of this process).
    Raises:  ValueError: when the loss is not finite, naming the step.
    """
    optimiser = torch.optim.AdamW(
        module.parameters(), lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay
    )
    ema = Ema(module, recipe.ema_decay) if recipe.ema_decay else None
    checkpoint = folder / f"{name}.safetensors"
    start = _resume(checkpoint, module, optimiser, ema) if checkpoint.exists() else 0

    module.train()
    recent: list[float] = []
    began = time.monotonic()
    with (folder / f"{name}.jsonl").open("a") as journal:
        for step in tqdm(range(start, recipe.steps), desc=name, initial=start, total=recipe.steps, mininterval=5):
            for group in optimiser.param_groups:
                group["lr"] = recipe.lr_at(step)
            loss = loss_at(step)
            if not math.isfinite(loss.item()):
                raise ValueError(f"{name}: the loss at step {step} is {loss.item()}; try a lower learning rate")
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), recipe.clip)
            optimiser.step()
            if ema is not None:
                ema.update(module, step)

            recent.append(loss.item())
            done = step + 1
            if done % 50 == 0 or done == recipe.steps:
                row = {"step": done, "loss": sum(recent) / len(recent), "lr": recipe.lr_at(step)}
                journal.write(json.dumps(row | {"seconds": round(time.monotonic() - began, 1)}) + "\n")
                journal.flush()
                recent.clear()
            if done % recipe.save_every == 0 or done == recipe.steps:
                _save(checkpoint, done, module, optimiser, ema)
    if ema is not None:
        module.load_state_dict(ema.values, strict=False)  # buffers, if any, stay
    module.eval()


def _save(path: Path, step: int, module: nn.Module, optimiser: torch.optim.AdamW, ema: Ema | None) -> None:
    """Everything that a restart needs, under a temporary name first."""
    tensors: dict[str, Tensor] = {}
    for name, p in module.named_parameters():
        state = optimiser.state[p]
        tensors[f"model.{name}"] = p.detach().contiguous()
        tensors[f"exp_avg.{name}"] = state["exp_avg"].contiguous()
        tensors[f"exp_avg_sq.{name}"] = state["exp_avg_sq"].contiguous()
        if ema is not None:
            tensors[f"ema.{name}"] = ema.values[name].contiguous()
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"step": str(step)})
    partial.replace(path)


def _resume(path: Path, module: nn.Module, optimiser: torch.optim.AdamW, ema: Ema | None) -> int:
    """Put a checkpoint back; returns the step to go on from."""
    with safe_open(path, framework="pt") as file, torch.no_grad():
        step = int(file.metadata()["step"])
        for name, p in module.named_parameters():
            p.copy_(file.get_tensor(f"model.{name}"))
            optimiser.state[p] = {
                "step": torch.tensor(float(step)),
                "exp_avg": torch.empty_like(p).copy_(file.get_tensor(f"exp_avg.{name}")),
                "exp_avg_sq": torch.empty_like(p).copy_(file.get_tensor(f"exp_avg_sq.{name}")),
            }
            if ema is not None:
                ema.values[name].copy_(file.get_tensor(f"ema.{name}"))
    log.info("%s: going on from step %d", path, step)
    return step
