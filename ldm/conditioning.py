"""Contexts as data: what the U-Net is told at every step, for every row of the batch.

Changing the prompt during a run touches neither the U-Net nor a sampler. [Wu et al. 2023, arXiv:2212.08698]

    contexts.at(i)[b] = sum_k weights[i, b, k] prompts[k, b]         swap: one 1 a row; blend: (1 - lambda_i, lambda_i)

Letters: S steps, K contexts, B batch (or 1 for all samples), L tokens, D width.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Indexing = Literal["steps", "authors"]


@dataclass(frozen=True, eq=False)
class Contexts:
    """The contexts of S steps without S copies of them; ValueError where shapes do not fit."""

    prompts: Tensor  # (K, B or 1, L, D)
    weights: Tensor  # (S, B or 1, K) float64 on the CPU

    def __post_init__(self) -> None:
        if self.prompts.ndim != 4 or not self.prompts.is_floating_point():
            raise ValueError(f"prompts: expected floating-point (K, B, L, D), got {_describe(self.prompts)}")
        stored, batch = self.prompts.shape[:2]
        fits = self.weights.ndim == 3 and len(self.weights) > 0 and self.weights.shape[2] == stored
        if not fits or (batch > 1 and self.weights.shape[1] not in (1, batch)):
            raise ValueError(f"weights: expected (S, 1 or {batch}, {stored}) with S > 0, got {_describe(self.weights)}")
        if not bool(self.weights.isfinite().all()):
            raise ValueError("weights: expected finite values, got NaN or infinity")

    def __len__(self) -> int:
        """S, the number of steps."""
        return len(self.weights)

    def at(self, step: int) -> Tensor:
        """The context of step 0 .. S-1, counted from noise: (B or 1, L, D), dtype and device of the prompts."""
        # Where one weight is 1 and the rest 0 this is that prompt itself, bit for bit: no rounding may tell a swap from
        # a run that had the prompt from the start.
        if not 0 <= step < len(self):
            raise ValueError(f"step: expected 0..{len(self) - 1}, as many as there are contexts for, got {step}")
        weights = self.weights[step]  # (B or 1, K)
        chosen = weights.argmax(dim=1)
        if torch.equal(weights, torch.nn.functional.one_hot(chosen, len(self.prompts)).to(weights)):
            if bool((chosen == chosen[0]).all()):
                return self.prompts[chosen[0]]
            return self.prompts.expand(-1, len(chosen), -1, -1)[chosen, torch.arange(len(chosen))]
        precision = torch.promote_types(self.prompts.dtype, torch.float32)
        shares = weights.T[..., None, None].to(self.prompts.device, precision)
        return (shares * self.prompts).sum(dim=0).to(self.prompts.dtype)


# ---- one prompt, or several in turn ----------------------------------------------------------------


def constant(context: Tensor, steps: int) -> Contexts:
    """The same context, (B or 1, L, D), at every step: ordinary sampling."""
    return piecewise([context], [], steps)


def swap(context: Tensor, other: Tensor, at: int = 20, steps: int = 50, indexing: Indexing = "steps") -> Contexts:
    """`context` for `at` steps, `other` from there on, both (B or 1, L, D); ValueError unless 0 <= at <= S."""
    # "authors": one step more before the swap, as the paper's published code counts (its callback runs after the step).
    return piecewise([context, other], [neutral_steps(at, steps, indexing)], steps)


def neutral_steps(at: int, steps: int, indexing: Indexing = "steps") -> int:
    """How many steps are taken before a swap "at" this step: `at`, or at + 1 as the authors count."""
    if indexing not in ("steps", "authors"):
        raise ValueError(f"indexing: expected 'steps' or 'authors', got {indexing!r}")
    taken = at + 1 if indexing == "authors" else at
    if not 0 <= taken <= steps:
        raise ValueError(f"at: expected a swap after 0..{steps} steps, got {at} ({taken} with indexing {indexing!r})")
    return taken


def piecewise(contexts: Sequence[Tensor], boundaries: Sequence[int], steps: int) -> Contexts:
    """Several swaps in a row: contexts[k], (B or 1, L, D), from step boundaries[k-1] to boundaries[k]."""
    stacked = _stack(contexts)
    _check_steps(steps)
    if len(boundaries) != len(contexts) - 1:
        raise ValueError(f"boundaries: expected {len(contexts) - 1} for {len(contexts)} contexts, got {boundaries}")
    if list(boundaries) != sorted(boundaries) or not all(0 <= step <= steps for step in boundaries):
        raise ValueError(f"boundaries: expected rising steps in 0..{steps}, got {boundaries}")
    # A step lies in piece k when k boundaries are at or before it.
    pieces = torch.tensor([bisect_right(boundaries, step) for step in range(steps)])
    return Contexts(stacked, torch.nn.functional.one_hot(pieces, len(contexts)).double()[:, None])


def blend(context: Tensor, other: Tensor, weights: Sequence[float] | Tensor) -> Contexts:
    """Mix two prompts, (B or 1, L, D): c_i = (1 - lambda_i) context + lambda_i other, with S lambdas in 0 .. 1."""
    lambdas = torch.as_tensor(weights, dtype=torch.float64, device="cpu")
    if lambdas.ndim != 1 or len(lambdas) == 0 or not bool(((lambdas >= 0) & (lambdas <= 1)).all()):
        raise ValueError(f"weights: expected one value in 0..1 for every step, got {weights}")
    return Contexts(_stack([context, other]), torch.stack([1 - lambdas, lambdas], dim=1)[:, None])


def ramp(context: Tensor, other: Tensor, begin: int, end: int, steps: int = 50) -> Contexts:
    """A blend in a straight line: the last pure `context` at step `begin`, pure `other` from `end` on."""
    _check_steps(steps)
    if not 0 <= begin < end <= steps:
        raise ValueError(f"begin, end: expected 0 <= begin < end <= {steps}, got {begin}, {end}; see also swap")
    return blend(context, other, [min(max((i - begin) / (end - begin), 0.0), 1.0) for i in range(steps)])


# ---- rows that differ ------------------------------------------------------------------------------


def side_by_side(rows: Sequence[Contexts]) -> Contexts:
    """One batch of several contexts, of as many steps each; in the batch they follow one another."""
    if len(rows) == 0:
        raise ValueError("rows: expected at least one, got none")
    if len({len(contexts) for contexts in rows}) > 1:
        raise ValueError(f"rows: expected as many steps each, got {[len(contexts) for contexts in rows]}")
    stored = max(len(contexts.prompts) for contexts in rows)
    prompts = [torch.cat([c.prompts, c.prompts[:1].expand(stored - len(c.prompts), -1, -1, -1)]) for c in rows]
    weights = [torch.nn.functional.pad(c.weights, (0, stored - len(c.prompts))) for c in rows]
    batches = [max(p.shape[1], w.shape[1]) for p, w in zip(prompts, weights, strict=True)]
    _check_alike([p[0] for p in prompts])
    return Contexts(
        torch.cat([p.expand(-1, n, -1, -1) for p, n in zip(prompts, batches, strict=True)], dim=1),
        torch.cat([w.expand(-1, n, -1) for w, n in zip(weights, batches, strict=True)], dim=1),
    )


# ---- checks: made here, once, so that no run fails halfway -----------------------------------------


def _stack(contexts: Sequence[Tensor]) -> Tensor:
    """-> (K, B or 1, L, D), after making sure that the contexts can share a run."""
    if len(contexts) == 0:
        raise ValueError("contexts: expected at least one, got none")
    _check_alike(contexts)
    batches = {len(context) for context in contexts} - {1}
    if len(batches) > 1:
        raise ValueError(f"contexts: expected one batch size (or 1), got {[len(context) for context in contexts]}")
    batch = max(batches, default=1)
    return torch.stack([context.expand(batch, -1, -1) for context in contexts])


def _check_alike(contexts: Sequence[Tensor]) -> None:
    first = contexts[0]
    for k, context in enumerate(contexts):
        if context.ndim != 3 or not context.is_floating_point():
            raise ValueError(f"context {k}: expected floating-point (B, L, D), got {_describe(context)}")
        if (context.shape[1:], context.dtype, context.device) != (first.shape[1:], first.dtype, first.device):
            raise ValueError(
                f"context {k}: expected (L, D), dtype and device of context 0, {_describe(first)}, "
                f"got {_describe(context)}"
            )


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"steps: expected 1 or more, got {steps}")


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
