"""Inversion: from an image's latent back to the noise from which a sampler would make it.

ddim_inversion           DDIM's steps backwards, one evaluation a step: close ("naive"); or several, and closer
fixed_point_inversion    the same, every step solved as the fixed point that it is, to a tolerance
cfgpp_inversion          of `ddim_cfgpp`, whose guidance leaves the noise that it goes back to alone
edict, edict_inversion   a sampler of its own on a pair of latents, whose every step has an exact inverse

Guidance. A step back asks for eps at a latent not yet known, and takes eps of the neighbour that is. The error of that
grows with how fast eps changes from one latent to the next, and guidance multiplies the change: under scale g the
difference of two predictions counts g times. At g = 1 neighbours agree and a few iterations settle every step; at
SD1's usual 7.5 it takes more of them, and need not contract at all. What surely leads elsewhere is to invert at one
scale and to sample at another. So invert at guidance 1, under a prompt that describes the image; and to sample at a
larger scale from there, give that prompt as the negative one too: eps + g (eps - eps) = eps, so the image is retraced
at any scale, and guidance acts on what a swapped prompt changes. `ldm bench inversion` measures all of this.

Steps come in reverse: the first has index S - 1, the last 0, so that contexts and `Step.index` keep their
meaning: each goes from its `x_prev` up to its `x_t`, and the last `x_t` is x_T.

Papers: DDIM = Song et al. 2020, arXiv:2010.02502, section 4.3.  AIDI = Pan et al. 2023, arXiv:2309.04907.
EDICT = Wallace et al. 2022, arXiv:2211.12446.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import sqrt

import torch
from torch import Tensor

from ldm.samplers import EpsFn, History, Level, Noise, Step
from ldm.samplers.driver import noise_levels
from ldm.schedule import Schedule

MIXING = 0.93  # EDICT's p, as its authors chose for 50 steps
PATIENCE = 3  # iterations that a fixed point may come no closer before it is left


def ddim_inversion(
    eps_fn: EpsFn,
    x_0: Tensor,
    schedule: Schedule,
    steps: int = 50,
    *,
    iterations: int = 1,
    timesteps: Sequence[float] | None = None,
) -> Iterator[Step]:
    """Run DDIM's steps backwards, from the image to the noise.

    x0_pred = (x_prev - sqrt(1 - a_prev) eps) / sqrt(a_prev)
    x_t     = sqrt(a_t) x0_pred + sqrt(1 - a_t) eps                                          [DDIM, eq. 13 reversed]

    The step down from x_t used eps(x_t, t), but x_t is what is sought. The plain inversion takes eps(x_prev, t)
    for it: close, since neighbours on the path are alike. Every further iteration asks the network again at the x_t
    just found, which converges to the x_t that DDIM steps down from [AIDI, eq. 7].

    Args:    eps_fn: see `ldm.samplers.EpsFn`.  x_0: (B, 4, H/8, W/8) scaled latents, float32.
             steps, timesteps: those that `ddim` will take back.
             iterations: network evaluations a step; 1 is the plain inversion.
    Returns: an iterator of S steps with falling `index`; see this file's head.
    Raises:  ValueError: steps, timesteps or iterations out of range, or eps_fn made for another number of steps; on
             the first `next`.
    """
    if iterations < 1:
        raise ValueError(f"iterations: expected 1 or more, got {iterations}")
    x_prev = x_0
    for index, level, prev in _upwards(eps_fn, x_0, schedule, steps, timesteps):
        x_t = x_prev
        for _ in range(iterations):
            eps = eps_fn(x_t, level.t, index).to(x_0.dtype)
            x0_pred = (x_prev - prev.std * eps) / prev.alpha
            x_t = level.alpha * x0_pred + level.std * eps
        yield Step(index, level.t, x_t, eps, x0_pred, x_prev, evaluations=iterations)
        x_prev = x_t


def fixed_point_inversion(
    eps_fn: EpsFn,
    x_0: Tensor,
    schedule: Schedule,
    steps: int = 50,
    *,
    tolerance: float = 1e-5,
    iterations: int = 30,
    timesteps: Sequence[float] | None = None,
) -> Iterator[Step]:
    """DDIM's steps backwards, each solved until it is settled, so that `ddim` retraces it.

    x_t = g(x_t),  g(x) = c x_prev + d eps(x, t)                                             [AIDI, eq. 7]
    x  <- g(x) - b (g(x) - g(x-)),  b = <r, r - r-> / |r - r-|^2,  r = g(x) - x

    The second line is Anderson's acceleration of depth 1, a secant step: x- and r- are those of the iteration before.
    How fast a step settles depends on how much noise it adds: where eps follows the noise in x, g contracts only by
    1 - sigma_prev / sigma_t. From t = 1 to t = 21 the noise trebles, and that one step takes as long as five others;
    so iterations are given where they are needed. A step whose change shrinks no more, be it for rounding (half
    precision) or for guidance (no contraction), is left at its best.

    Each sample is settled by itself, so a result does not depend on the rest of the batch.

    Args:    eps_fn, x_0, steps, timesteps: as for `ddim_inversion`.  tolerance: of the change |r| / |x_t|.
             iterations: network evaluations a step, at most.
    Returns: as of `ddim_inversion`.
    Raises:  ValueError: as for `ddim_inversion`, or a negative tolerance.
    """
    if iterations < 1:
        raise ValueError(f"iterations: expected 1 or more, got {iterations}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance: expected 0 or more, got {tolerance}")
    x_prev = x_0
    for index, level, prev in _upwards(eps_fn, x_0, schedule, steps, timesteps):
        c, d = _coefficients(prev, level)
        eps, evaluations = _settled_eps(eps_fn, level.t, index, x_prev, c, d, tolerance, iterations)
        x_t = c * x_prev + d * eps
        x0_pred = (x_prev - prev.std * eps) / prev.alpha
        yield Step(index, level.t, x_t, eps, x0_pred, x_prev, evaluations=evaluations)
        x_prev = x_t


def cfgpp_inversion(
    eps_fn: EpsFn,
    x_0: Tensor,
    schedule: Schedule,
    steps: int = 50,
    *,
    iterations: int = 1,
    timesteps: Sequence[float] | None = None,
) -> Iterator[Step]:
    """Run the steps of `ldm.samplers.ddim_cfgpp` backwards.                                [CFG++, section 3.3]

    x0_pred = (x_prev - sqrt(1 - a_prev) eps_uncond) / sqrt(a_prev),   x_t = sqrt(a_t) x0_pred + sqrt(1 - a_t) eps

    Args, Returns, Raises: as for `ddim_inversion`; eps_fn: one that `guided` made, at a guidance scale in 0 .. 1.
    """
    if not 0 <= (scale := getattr(eps_fn, "guidance_scale", 1)) <= 1:
        raise ValueError(f"guidance_scale: cfgpp_inversion expects 0..1, such as 0.6, got {scale:g}")
    if iterations < 1:
        raise ValueError(f"iterations: expected 1 or more, got {iterations}")
    both = getattr(eps_fn, "with_uncond", lambda *asked: (eps_fn(*asked),) * 2)
    x_prev = x_0
    for index, level, prev in _upwards(eps_fn, x_0, schedule, steps, timesteps):
        x_t = x_prev
        for _ in range(iterations):
            eps, eps_uncond = (part.to(x_0.dtype) for part in both(x_t, level.t, index))
            x0_pred = (x_prev - prev.std * eps_uncond) / prev.alpha
            x_t = level.alpha * x0_pred + level.std * eps
        yield Step(index, level.t, x_t, eps, x0_pred, x_prev, evaluations=iterations)
        x_prev = x_t


def _settled_eps(
    eps_fn: EpsFn, t: float, index: int, x_prev: Tensor, c: float, d: float, tolerance: float, iterations: int
) -> tuple[Tensor, int]:
    """eps(x) where x = c x_prev + d eps(x), as nearly as the iteration comes, and how often the network was asked."""
    x = eps = image = change = x_prev
    least = x_prev.new_full((len(x_prev), 1, 1, 1), float("inf"))  # the smallest change so far, of each sample
    idle = torch.zeros_like(least)  # iterations since
    settling = least > tolerance
    for evaluations in range(1, iterations + 1):
        eps_x = eps_fn(x, t, index).to(x.dtype)
        last_image, last_change = image, change
        image = c * x_prev + d * eps_x
        change = image - x
        size = _norm(change) / _norm(image)
        better = settling & (size < least)
        eps = eps_x if evaluations == 1 else torch.where(better, eps_x, eps)
        least, idle = torch.where(better, size, least), torch.where(better, 0, idle + 1)
        settling = settling & (least > tolerance) & (idle < PATIENCE)
        if not bool(settling.any()):
            break
        x = image if evaluations == 1 else image - _secant(change, change - last_change) * (image - last_image)
    return eps, evaluations


def _secant(change: Tensor, turn: Tensor) -> Tensor:
    """b of `fixed_point_inversion`, (B, 1, 1, 1); 0 where the change is the same as before."""
    square = (turn * turn).sum(dim=(1, 2, 3), keepdim=True)
    return torch.where(square > 0, (change * turn).sum(dim=(1, 2, 3), keepdim=True) / square, 0)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True)


# ---- a pair of latents -----------------------------------------------------------------------------


def edict(
    eps_fn: EpsFn,
    x_T: Tensor,
    schedule: Schedule,
    steps: int = 50,
    *,
    start: int = 0,
    history: History = (),
    noise: Noise | None = None,
    timesteps: Sequence[float] | None = None,
    mixing: float = MIXING,
) -> Iterator[Step]:
    """Exact diffusion inversion via coupled transformations, the way down: from a pair of noises to a pair of latents.

    x~ = c x + d eps(y, t)          c = sqrt(a_prev / a_t)
    y~ = c y + d eps(x~, t)         d = sqrt(1 - a_prev) - c sqrt(1 - a_t)         [EDICT, coupling]
    x' = p x~ + (1 - p) y~
    y' = p y~ + (1 - p) x'                                                         [EDICT, mixing]

    c x + d eps is DDIM's step. Each latent moves by what the network sees in the other one, so each half of a step
    can be undone knowing the other half: `edict_inversion`. Mixing keeps the two together: one step shrinks their
    difference by p^2. The latents take turns at being x in these lines, x on even steps, as in the authors' code.

    Args:    as of `ldm.samplers.Sampler`; deterministic, two evaluations a step.
             history: (y,), the partner of x_T, also at the start; () is x_T itself.
             mixing: p, above 0 and at most 1, which is none.
    Returns: an iterator of S - start steps, each with the partner of its x_prev in `history`.
    Raises:  ValueError: as of every `Sampler`; a history that is no partner, or mixing out of range.
    """
    _check_pair(x_T, history, mixing)
    x, (y,) = x_T, history or (x_T,)
    levels = noise_levels(eps_fn, x_T, schedule, steps, start, timesteps=timesteps)
    for index, (level, prev) in list(enumerate(pairwise(levels)))[start:]:
        c, d = _coefficients(level, prev)
        x_t = x
        first, second = _in_turn(index, x, y)
        eps_first = eps_fn(second, level.t, index).to(x.dtype)
        first = c * first + d * eps_first
        eps_second = eps_fn(first, level.t, index).to(x.dtype)
        second = c * second + d * eps_second
        first = mixing * first + (1 - mixing) * second
        second = mixing * second + (1 - mixing) * first
        x, y = _in_turn(index, first, second)
        eps, _ = _in_turn(index, eps_first, eps_second)
        x0_pred = (x_t - level.std * eps) / level.alpha
        yield Step(index, level.t, x_t, eps, x0_pred, x, history=(y,), evaluations=2)


def edict_inversion(
    eps_fn: EpsFn,
    x_0: Tensor,
    schedule: Schedule,
    steps: int = 50,
    *,
    history: History = (),
    timesteps: Sequence[float] | None = None,
    mixing: float = MIXING,
) -> Iterator[Step]:
    """The way up: `edict`'s lines solved for what stood before them, in reverse order. No approximation is made.

    y~ = (y' - (1 - p) x') / p          y = (y~ - d eps(x~, t)) / c
    x~ = (x' - (1 - p) y~) / p          x = (x~ - d eps(y, t)) / c                 [EDICT, inverse]

    So it is exact for any eps_fn that answers alike when asked alike, at any guidance: what is lost is rounding. But
    undoing the mixing spreads the two apart, by 1 / p^2 a step (1400 over 50), and the noise found need not look like
    noise. It is retraced by `edict` from the pair, not by `ddim`.

    Args:    eps_fn, x_0, steps, timesteps: as for `ddim_inversion`.
             history: (y,), the partner of x_0; () is x_0 itself, as for an image.  mixing: p, that of the way down.
    Returns: an iterator of S steps with falling `index`, each with the partner of its x_t in `history`.
    Raises:  ValueError: as for `edict`.
    """
    _check_pair(x_0, history, mixing)
    x, (y,) = x_0, history or (x_0,)
    for index, level, prev in _upwards(eps_fn, x_0, schedule, steps, timesteps):
        c, d = _coefficients(level, prev)
        x_prev = x
        first, second = _in_turn(index, x, y)
        second = (second - (1 - mixing) * first) / mixing
        first = (first - (1 - mixing) * second) / mixing
        eps_second = eps_fn(first, level.t, index).to(x.dtype)
        second = (second - d * eps_second) / c
        eps_first = eps_fn(second, level.t, index).to(x.dtype)
        first = (first - d * eps_first) / c
        x, y = _in_turn(index, first, second)
        eps, _ = _in_turn(index, eps_first, eps_second)
        x0_pred = (x - level.std * eps) / level.alpha
        yield Step(index, level.t, x, eps, x0_pred, x_prev, history=(y,), evaluations=2)


def _upwards(
    eps_fn: EpsFn, x_0: Tensor, schedule: Schedule, steps: int, timesteps: Sequence[float] | None
) -> list[tuple[int, Level, Level]]:
    """(index, noise level, the level below it) of every step of a sampler, in reverse."""
    levels = noise_levels(eps_fn, x_0, schedule, steps, timesteps=timesteps)
    return [(index, level, prev) for index, (level, prev) in enumerate(pairwise(levels))][::-1]


def _coefficients(here: Level, there: Level) -> tuple[float, float]:
    """(c, d): DDIM's step from one noise level to another, down or up, as c x + d eps."""
    c = sqrt(there.alphas_cumprod / here.alphas_cumprod)
    return c, there.std - c * here.std


def _in_turn(index: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Who goes first at a step; applied to its own result, it restores the order."""
    return (x, y) if index % 2 == 0 else (y, x)


def _check_pair(x: Tensor, history: History, mixing: float) -> None:
    if len(history) > 1 or any((y.shape, y.dtype) != (x.shape, x.dtype) for y in history):
        partners = [(tuple(y.shape), y.dtype) for y in history]
        raise ValueError(f"history: expected one partner like x, {tuple(x.shape)} {x.dtype}, or none, got {partners}")
    if not 0 < mixing <= 1:
        raise ValueError(f"mixing: expected above 0 and at most 1, got {mixing}")
