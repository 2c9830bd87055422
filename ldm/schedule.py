"""The noise schedule of Stable Diffusion 1 and the timesteps that a sampler visits.

Papers: DDPM = Ho et al. 2020, arXiv:2006.11239.  DDIM = Song et al. 2020, arXiv:2010.02502.
EDM = Karras et al. 2022, arXiv:2206.00364.  DPM-Solver = Lu et al. 2022, arXiv:2206.00927.
AYS = Sabour et al. 2024, "Align Your Steps", arXiv:2404.14507.  Lin et al. 2023, arXiv:2305.08891.

Naming: `alphas_cumprod[t]` is DDPM's alpha-bar_t. The DDIM paper calls the same quantity alpha_t.
Half the logarithm of the signal-to-noise ratio is DPM-Solver's lambda, and e^-lambda the sigma of EDM and k-diffusion:

    lambda_t = log(sqrt(alphas_cumprod[t]) / sqrt(1 - alphas_cumprod[t]))

Between two entries of the table lambda is a straight line in t: what is to be evaluated at a noise level between them
asks the network at a fractional timestep.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ldm.config import DiffusionConfig

TRAIN_STEPS = 1000  # T: the network was trained on t = 0 (almost clean) .. 999 (almost pure noise)


@dataclass(frozen=True, eq=False)
class Schedule:
    """How much noise x_t holds at each training timestep t.

    Everything is float64 on the CPU: 1 - alphas_cumprod[t] cancels for small t, and a cumulative
    product of 1000 float32 factors is already off by 9e-7. Samplers round once, when they apply
    a coefficient to a latent.
    """

    betas: Tensor  # (T,) variance added by forward step t
    alphas_cumprod: Tensor  # (T,) share of x_0's variance left in x_t
    final_alpha_cumprod: float  # stands for alphas_cumprod[-1] when the last step leaves the table
    spacing: str = "leading"  # how it is visited unless told otherwise: one of SPACINGS
    steps_offset: int = 1  # of leading

    @classmethod
    def from_betas(cls, betas: Tensor) -> Schedule:
        """The schedule of any betas in (0, 1).

        alphas_cumprod[t] = prod_{s <= t} (1 - betas[s])                      [DDPM, eq. 4]

        The last sampling step lands on alphas_cumprod[0], not on 1: SD1's published samplers leave
        that last trace of noise in, and the decoder was only ever fed such latents. (Landing on 1
        instead moves the final latent by 3e-4, relative.)

        Args:    betas: (T,) any float dtype.
        Returns: a schedule in float64.
        Raises:  ValueError: when betas is not a vector with values strictly between 0 and 1.
        """
        if betas.ndim != 1 or not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError(f"betas: expected a vector of values in (0, 1), got shape {tuple(betas.shape)}: {betas}")
        betas = betas.to("cpu", torch.float64)
        alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        return cls(betas, alphas_cumprod, final_alpha_cumprod=float(alphas_cumprod[0]))

    @classmethod
    def sd15(cls) -> Schedule:
        """ "Scaled linear": the square roots of the betas are evenly spaced, 0.00085 ... 0.012."""
        roots = torch.linspace(0.00085**0.5, 0.012**0.5, TRAIN_STEPS, dtype=torch.float64)
        return cls.from_betas(roots**2)

    @classmethod
    def of(cls, config: DiffusionConfig) -> Schedule:
        """The schedule that a model was trained on, in diffusers' words: scaled_linear is `sd15`'s kind.

        Raises: ValueError for a beta_schedule of another name, or betas outside (0, 1).
        """
        first, last, count = config.beta_start, config.beta_end, config.train_steps
        if config.trained_betas is not None:
            betas = torch.tensor(config.trained_betas, dtype=torch.float64)
        elif config.beta_schedule == "scaled_linear":
            betas = torch.linspace(first**0.5, last**0.5, count, dtype=torch.float64) ** 2
        elif config.beta_schedule == "linear":
            betas = torch.linspace(first, last, count, dtype=torch.float64)
        elif config.beta_schedule == "squaredcos_cap_v2":
            bars = torch.cos((torch.linspace(0, 1, count + 1, dtype=torch.float64) + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = (1 - bars[1:] / bars[:-1]).clamp(max=0.999)
        else:
            raise ValueError(
                f"beta_schedule: expected scaled_linear, linear or squaredcos_cap_v2, got {config.beta_schedule!r}"
            )
        schedule = cls.from_betas(betas)
        if config.zero_terminal_snr:
            schedule = schedule.ending_in_noise()
        return replace(
            schedule,
            final_alpha_cumprod=1.0 if config.final_alpha_one else schedule.final_alpha_cumprod,
            spacing=config.spacing,
            steps_offset=config.steps_offset,
        )

    def ending_in_noise(self) -> Schedule:
        """The schedule shifted and stretched so that x_T holds no signal: alphas_cumprod[T-1] = 0.

        sqrt(a_t) <- (sqrt(a_t) - sqrt(a_T-1)) sqrt(a_0) / (sqrt(a_0) - sqrt(a_T-1))          [Lin et al., algorithm 1]
        """
        roots = self.alphas_cumprod.sqrt()
        roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
        alphas_cumprod = roots**2
        alphas = torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
        return replace(self, betas=1 - alphas, alphas_cumprod=alphas_cumprod)

    def __len__(self) -> int:
        """T, the number of training timesteps."""
        return len(self.betas)

    @property
    def lambdas(self) -> Tensor:
        """(T,) half the log signal-to-noise ratio of every timestep, falling: 3.5 at t = 0, -2.7 at t = 999."""
        return 0.5 * torch.log(self.alphas_cumprod / (1 - self.alphas_cumprod))

    def alphas_cumprod_at(self, t: float) -> float:
        """alphas_cumprod of any t in 0..T-1: the table's own entry where t is whole, else from the line of lambda."""
        if t == int(t):
            return float(self.alphas_cumprod[int(t)])
        lambda_t = float(np.interp(t, np.arange(len(self)), self.lambdas.numpy()))
        return 1 / (1 + math.exp(-2 * lambda_t))

    def timestep_at(self, lambda_t: float) -> float:
        """The timestep, whole or not, that has this lambda; beyond the table's ends, the end."""
        return float(np.interp(-lambda_t, -self.lambdas.numpy(), np.arange(len(self))))

    def add_noise(self, x_0: Tensor, eps: Tensor, t: Tensor | int) -> Tensor:
        """Jump from a clean latent straight to its noised version at t.

        x_t = sqrt(alphas_cumprod[t]) x_0 + sqrt(1 - alphas_cumprod[t]) eps   [DDPM, eq. 4]

        Args:    x_0: (B, ...) scaled latents.  eps: like x_0, standard normal.  t: int or (B,) int64 in [0, T-1].
        Returns: x_t, shape, dtype and device of x_0.
        Raises:  ValueError: when a timestep lies outside the table or t's length is not B.
        """
        t = torch.as_tensor(t, device=x_0.device)
        if t.ndim > 1 or (t.ndim == 1 and len(t) != len(x_0)):
            raise ValueError(f"t: expected an int or ({len(x_0)},), one timestep a sample, got shape {tuple(t.shape)}")
        if int(t.min()) < 0 or int(t.max()) >= len(self):
            raise ValueError(f"t: expected timesteps in 0..{len(self) - 1}, got {int(t.min())}..{int(t.max())}")
        alpha = self.alphas_cumprod.to(x_0.device)[t].view(-1, *[1] * (x_0.ndim - 1))
        return alpha.sqrt().to(x_0.dtype) * x_0 + (1 - alpha).sqrt().to(x_0.dtype) * eps


# ---- spacings: the N timesteps that a run visits -----------------------------------------------------
#
# A run of N steps has N + 1 noise levels: one at each timestep that it visits, and the one that it ends at, which is
# the schedule's `final_alpha_cumprod`. SD1's is that of t = 0, so most spacings leave t = 0 to the end. `endpoint`
# has it visited instead: for a run that ends without any noise (final_alpha_cumprod 1), as k-diffusion's do.


def leading(steps: int, offset: int = 1, train_steps: int = TRAIN_STEPS) -> tuple[int, ...]:
    """The timesteps of an N-step run, noisiest first: 50 steps visit 981, 961 ... 21, 1.

    t_i = floor(i T / N) + offset,  i = N-1 ... 0

    "Leading": each of N equal intervals of 0..T-1 is entered at its clean end. SD1 shifts the lot by
    offset 1. Where N divides T this is what CompVis and diffusers both run. Elsewhere they disagree:
    they step by floor(T / N), whereupon CompVis runs more steps than asked (7 -> 8), or walks off the
    table (N = 3), and diffusers stops short of the noise (501 steps would begin at t = 501).
    Taking the floor last keeps N steps, evenly spread. For N = T there is no room to shift, so the
    offset gives way and t = 999 ... 0.

    Args:    steps: N in 1..T.  offset: added to every timestep as far as the table reaches.
    Returns: N ints, strictly falling, all in [0, T-1].
    Raises:  ValueError: steps outside 1..T, or a negative offset.
    """
    _check_steps(steps, train_steps)
    if offset < 0:
        raise ValueError(f"offset: expected 0 or more, got {offset}")
    entries = [i * train_steps // steps for i in range(steps)]
    offset = min(offset, train_steps - 1 - entries[-1])
    return tuple(t + offset for t in reversed(entries))


def trailing(steps: int, train_steps: int = TRAIN_STEPS) -> tuple[int, ...]:
    """Each of N equal intervals entered at its noisy end: 50 steps visit 999, 979 ... 39, 19.

    t_i = round(T (1 - i / N)) - 1,  i = 0 ... N-1                                        [Lin et al., section 3.3]

    Returns: N ints, strictly falling from T-1.
    Raises:  ValueError: steps outside 1..T.
    """
    _check_steps(steps, train_steps)
    return tuple(round(train_steps * (1 - i / steps)) - 1 for i in range(steps))


def linspace(steps: int, train_steps: int = TRAIN_STEPS, *, endpoint: bool = False) -> tuple[float, ...]:
    """From T-1 in equal strides, whole or not: 20 steps visit 999, 949.05 ... 49.95.

    t_i = (T - 1) (1 - i / N),  i = 0 ... N-1        with `endpoint`: i / (N - 1)

    Raises:  ValueError: steps outside 1..T.
    """
    _check_steps(steps, train_steps)
    return tuple((train_steps - 1) * (1 - u) for u in _fractions(steps, endpoint))


def karras(steps: int, schedule: Schedule, *, rho: float = 7.0, endpoint: bool = False) -> tuple[float, ...]:
    """Strides in sigma^(1/rho): short ones where there is little noise, and few where there is much.

    sigma_i = (sigma_max^(1/rho) + i/N (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho                 [EDM, eq. 5]

    Args:    endpoint: i / (N - 1), as EDM has it.
    Returns: N timesteps, most of them fractional, falling from T-1.
    Raises:  ValueError: steps outside 1..T.
    """
    _check_steps(steps, len(schedule))
    _check_signal(schedule)
    high, low = (math.exp(-float(lambda_t) / rho) for lambda_t in schedule.lambdas[[-1, 0]])
    return _at_sigmas(schedule, [(high + u * (low - high)) ** rho for u in _fractions(steps, endpoint)])


def log_snr(steps: int, schedule: Schedule, *, endpoint: bool = False) -> tuple[float, ...]:
    """Equal strides in lambda, so that every step lifts the signal-to-noise ratio by the same factor.

    lambda_i = lambda_{T-1} + i/N (lambda_0 - lambda_{T-1})                              [DPM-Solver, section 3.4]

    Args, returns, raises: as for `karras`.
    """
    _check_steps(steps, len(schedule))
    _check_signal(schedule)
    noisy, clean = (float(lambda_t) for lambda_t in schedule.lambdas[[-1, 0]])
    return _at_sigmas(schedule, [math.exp(-noisy - u * (clean - noisy)) for u in _fractions(steps, endpoint)])


AYS_SD15_SIGMAS = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)


def align_your_steps(steps: int, schedule: Schedule, *, endpoint: bool = False) -> tuple[float, ...]:
    """The levels that were optimised for SD1.5 and 10 steps, straight lines in log sigma between them for other N.

    They are of SD1.5 on photographs: for another model they are a guess as good as any.  [AYS, table 3 and section 4]

    Args, returns, raises: as for `karras`.
    """
    _check_steps(steps, len(schedule))
    at = np.linspace(0, 1, len(AYS_SD15_SIGMAS))
    log_sigmas = np.interp(_fractions(steps, endpoint), at, np.log(AYS_SD15_SIGMAS))
    return _at_sigmas(schedule, np.exp(log_sigmas).tolist())


Spacing = Callable[[int, Schedule], tuple[float, ...]]
"""timesteps = spacing(steps, schedule)"""

SPACINGS: dict[str, Spacing] = {
    "leading": lambda steps, schedule: leading(steps, schedule.steps_offset, len(schedule)),
    "trailing": lambda steps, schedule: trailing(steps, len(schedule)),
    "linspace": lambda steps, schedule: linspace(steps, len(schedule)),
    "karras": karras,
    "log_snr": log_snr,
    "align_your_steps": align_your_steps,
}
EVEN_SPACINGS = ("leading", "trailing", "linspace")  # in t, up to rounding


def _check_steps(steps: int, train_steps: int) -> None:
    if not 1 <= steps <= train_steps:
        raise ValueError(f"steps: expected 1..{train_steps}, got {steps}")


def _check_signal(schedule: Schedule) -> None:
    if not float(schedule.alphas_cumprod[-1]):
        raise ValueError(
            "spacing: this schedule begins in pure noise (zero terminal SNR), which has no lambda; expected trailing, "
            "leading or linspace"
        )


def _fractions(steps: int, endpoint: bool) -> list[float]:
    """How far along the run each step begins: from 0 to just before 1, or to 1 itself."""
    return np.linspace(0, 1, steps, endpoint=endpoint).tolist()


def _at_sigmas(schedule: Schedule, sigmas: Sequence[float]) -> tuple[float, ...]:
    # Rounded, so that the ends are 999 and 0 and not 1e-13 away from them.
    return tuple(round(schedule.timestep_at(-math.log(sigma)), 9) for sigma in sigmas)
