"""Classifier-free guidance: a U-Net and its contexts become the `eps_fn` that samplers call.

Paper: Ho and Salimans 2022, "Classifier-Free Diffusion Guidance", arXiv:2207.12598.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ldm.fast import ops
from ldm.fast.projections import Unchanged, differentiated, keep, recording

UNetFn = Callable[[Tensor, float, Tensor], Tensor]
"""eps = unet(x_t, t, context): (B, 4, H/8, W/8), training timestep, (B, L, D); all in the network's dtype."""


class Contexts(Protocol):
    """What is asked of an embedding schedule: its length and the (B or 1, L, D) context of a step."""

    def at(self, step: int, /) -> Tensor: ...

    def __len__(self) -> int: ...


def guided(
    unet: UNetFn,
    schedule: Contexts,
    guidance_scale: float = 7.5,
    uncond: Tensor | Contexts | None = None,
    *,
    max_batch: int | None = None,
) -> GuidedEps:
    """Bind a U-Net to the contexts of a run.

    eps = eps_uncond + g (eps_cond - eps_uncond)

    In this convention g = 1 is no guidance at all (the paper's w is g - 1), and costs one evaluation
    instead of two.

    Args:    unet: see `UNetFn`.  schedule: the contexts of the prompt, one for every step, in the U-Net's dtype.
             guidance_scale: g; SD1's usual value is 7.5.
             uncond: what guidance pushes away from: the empty prompt's (L, D) or (B or 1, L, D) context, or a
             negative prompt's own embedding schedule; needed unless g is 1.
             max_batch: most rows in one U-Net call; None: all of them. Under guidance a latent has two, which stay
             together, so a call then has at least two. It bounds memory. Results then agree to the last bits of
             float32, not bit for bit, as a matrix product of another size adds up in another order; `max_batch=1`
             gives every latent a call of its own, and a result that does not depend on the rest of the batch.
    Returns: eps_fn(x_t, t, step), eps in x_t's dtype whatever the U-Net's: float32 latents under a half-precision
             network are rounded for each call only. It counts the U-Net rows evaluated in `.rows`; `.steps` is
             the schedule's length, which a sampler compares with its own. It is for one run: what the network makes
             of a prompt is made once, so weights that change between steps may go unheard.
    Raises:  ValueError: uncond missing, or of another length, (L, D), dtype or device than the schedule's contexts.
    """
    if max_batch is not None and max_batch < 1:
        raise ValueError(f"max_batch: expected 1 or more, or None, got {max_batch}")
    if guidance_scale == 1:
        return GuidedEps(unet, schedule, 1.0, None, max_batch)

    if uncond is None:
        raise ValueError(f"uncond: expected the empty prompt's context for guidance_scale {guidance_scale}, got None")
    if isinstance(uncond, Tensor):
        uncond = _Always(uncond, len(schedule))
    if len(uncond) != len(schedule):
        raise ValueError(f"uncond: expected {len(schedule)} steps, as the prompt's schedule, got {len(uncond)}")
    want, got = schedule.at(0), uncond.at(0)
    if (got.shape[1:], got.dtype, got.device) != (want.shape[1:], want.dtype, want.device):
        raise ValueError(
            f"uncond: expected (L, D), dtype and device of the prompt's contexts, {tuple(want.shape[1:])} "
            f"{want.dtype} on {want.device}, got {tuple(got.shape[1:])} {got.dtype} on {got.device}"
        )
    return GuidedEps(unet, schedule, guidance_scale, uncond, max_batch)


def rows_a_latent(guidance_scale: float) -> int:
    """Of the U-Net's batch: with the prompt, and under guidance without it too."""
    return 1 if guidance_scale == 1 else 2


class GuidedEps:
    """The eps_fn that `guided` returns. rows: U-Net rows evaluated since it was made.  steps: of its schedule."""

    def __init__(
        self,
        unet: UNetFn,
        schedule: Contexts,
        guidance_scale: float,
        uncond: Contexts | None,
        max_batch: int | None,
    ) -> None:
        self.unet = unet
        self.schedule = schedule
        self.guidance_scale = guidance_scale
        self.uncond = uncond
        self.latents_a_call = max_batch and max(1, max_batch // rows_a_latent(guidance_scale))
        self.rows = 0
        self.steps = len(schedule)
        self._prompts: tuple[Unchanged, Tensor] | None = None  # of the last call, and their context

    def __call__(self, x_t: Tensor, t: float, step: int) -> Tensor:
        """eps of (B, 4, H/8, W/8), see `guided`; ValueError when a context's batch is neither B nor 1."""
        if self.uncond is None:
            return torch.cat([self._evaluate(x, t, context) for x, context in self._calls(x_t, step)])
        eps_uncond, eps_cond = self._both(x_t, t, step)
        return eps_uncond + self.guidance_scale * (eps_cond - eps_uncond)

    def ddim_step(
        self, x_t: Tensor, t: float, step: int, a_t: float, a_prev: float
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """x_prev, x0_pred and eps of a deterministic DDIM step, guidance and step in one kernel; None without one."""
        plain = type(self) is GuidedEps and x_t.dtype in (torch.float32, *ops.HALF)  # a subclass may guide otherwise
        if self.uncond is None or not plain or torch.is_grad_enabled() or not ops.fused(x_t):
            return None
        eps_uncond, eps_cond = self._both(x_t, t, step)
        return ops.guided_ddim_step(x_t, eps_uncond, eps_cond, self.guidance_scale, a_t, a_prev)

    def _both(self, x_t: Tensor, t: float, step: int) -> tuple[Tensor, Tensor]:
        """eps without and with the prompt: two halves of each call, the unconditional one first, as CompVis has it."""
        halves = [self._evaluate(torch.cat([x, x]), t, context).chunk(2) for x, context in self._calls(x_t, step)]
        eps_uncond, eps_cond = (_joined(of_calls) for of_calls in zip(*halves, strict=True))
        return eps_uncond, eps_cond

    def _calls(self, x_t: Tensor, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The latents and the context of each call."""
        size = self.latents_a_call or len(x_t)
        return zip(x_t.split(size), self._contexts(step, len(x_t), size), strict=True)

    def _contexts(self, step: int, batch: int, size: int) -> list[Tensor]:
        """What the rows of each call are told.

        While one call takes the whole batch, and its prompts stay, it is the same tensor, of which the network may keep
        keys and values. Several calls a step would each keep as much, and `max_batch` is there to save memory.
        """
        rows = [_for_batch("context", self.schedule.at(step), batch)]
        if self.uncond is not None:
            rows.insert(0, _for_batch("uncond", self.uncond.at(step), batch))
        changing = torch.compiler.is_compiling() or any(differentiated(x) or recording(x) for x in rows)
        if size < batch or changing:
            return [_joined(parts) for parts in zip(*(context.split(size) for context in rows), strict=True)]
        prompts = self._prompts
        if prompts is None or not prompts[0](*rows):
            prompts = self._prompts = Unchanged(*rows), keep(_joined(rows))
        return [prompts[1]]

    def _evaluate(self, x_t: Tensor, t: float, context: Tensor) -> Tensor:
        self.rows += len(x_t)
        return self.unet(x_t.to(context.dtype), t, context).to(x_t.dtype)


class _Always:
    """One context at every step."""

    def __init__(self, context: Tensor, steps: int) -> None:
        if context.ndim not in (2, 3):
            raise ValueError(f"uncond: expected (L, D) or (B, L, D), got {tuple(context.shape)}")
        self.context = context if context.ndim == 3 else context[None]
        self.steps = steps

    def at(self, step: int, /) -> Tensor:
        return self.context

    def __len__(self) -> int:
        return self.steps


def _joined(batches: Sequence[Tensor]) -> Tensor:
    return batches[0] if len(batches) == 1 else torch.cat(list(batches))


def _for_batch(name: str, context: Tensor, batch: int) -> Tensor:
    """(B or 1, L, D) -> (B, L, D), as a view."""
    if len(context) not in (1, batch):
        raise ValueError(f"{name}: expected a batch of 1 or {batch}, as x_t's, got {len(context)}")
    return context.expand(batch, -1, -1)
