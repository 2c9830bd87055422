"""The noise schedule of Stable Diffusion 1, and the timesteps that a sampler visits.

`alphas_cumprod[t]` is DDPM's alpha-bar_t, the DDIM paper's alpha_t. DPM-Solver's lambda is half the log of the signal-
to-noise ratio, e^-lambda the sigma of EDM and k-diffusion; between two entries of the table it is a straight line in t.

Papers: DDPM = Ho et al. 2020, arXiv:2006.11239.  EDM = Karras et al. 2022, arXiv:2206.00364.  DPM-Solver = Lu et al.
2022, arXiv:2206.00927.  AYS = Sabour et al. 2024, arXiv:2404.14507.  Lin et al. 2023, arXiv:2305.08891.
DDIM = Song et al. 2020, arXiv:2010.02502.  Beta sampling = Lee et al. 2024, arXiv:2407.12173.  Laplace = Hang et al.
2024, arXiv:2407.03297.  Time shift = Li et al. 2023, arXiv:2305.15583.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ldm.config import DiffusionConfig

ENDS = ("sigma_min", "zero")  # where a run can end
TRAIN_STEPS = 1000  # T: the network was trained on t = 0 (almost clean) .. 999 (almost pure noise)


@dataclass(frozen=True, eq=False)
class Schedule:
    """How much noise x_t holds at each timestep t; float64 on the CPU, rounded once when it meets a latent."""

    betas: Tensor  # (T,) variance added by forward step t
    alphas_cumprod: Tensor  # (T,) share of x_0's variance left in x_t
    final_alpha_cumprod: float  # stands for alphas_cumprod[-1] when the last step leaves the table
    spacing: str = "leading"  # how it is visited unless told otherwise: one of SPACINGS
    steps_offset: int = 1  # of leading
    to_zero: bool = False  # runs visit t = 0 and step on to no noise at all; see `ending_at`

    @classmethod
    def from_betas(cls, betas: Tensor) -> Schedule:
        """The schedule of (T,) betas, which must lie in (0, 1), else ValueError."""
        # The last step lands on alphas_cumprod[0], not on 1, as SD1's published samplers do: its decoder was only ever
        # given latents with that last trace of noise.
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
        """The schedule of a model, in diffusers' words; ValueError for a beta_schedule of another name."""
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

    def ending_at(self, end: str) -> Schedule:
        """The schedule whose runs end at one of `ENDS`: sigma_min, t = 0's level; zero, one step further.

        Under zero, as in k-diffusion, levels that are spread to the clean end visit t = 0; leading and trailing do not.
        """
        if end not in ENDS:
            raise ValueError(f"end: expected one of {', '.join(ENDS)}, got {end!r}")
        final = 1.0 if end == "zero" else float(self.alphas_cumprod[0])
        return replace(self, final_alpha_cumprod=final, to_zero=end == "zero")

    def __len__(self) -> int:
        """T, the number of training timesteps."""
        return len(self.betas)

    @cached_property
    def lambdas(self) -> Tensor:
        """(T,) half the log signal-to-noise ratio of every timestep, falling: 3.5 at t = 0, -2.7 at t = 999."""
        return 0.5 * torch.log(self.alphas_cumprod / (1 - self.alphas_cumprod))

    def alphas_cumprod_at(self, t: float) -> float:
        """alphas_cumprod at any t in 0 .. T-1, whole or not."""
        if t == int(t):
            return float(self.alphas_cumprod[int(t)])
        lambda_t = float(np.interp(t, np.arange(len(self)), self.lambdas.numpy()))
        return 1 / (1 + math.exp(-2 * lambda_t))

    def timestep_at(self, lambda_t: float) -> float:
        """The timestep, whole or not, that has this lambda; beyond the table's ends, the end."""
        return float(np.interp(-lambda_t, -self.lambdas.numpy(), np.arange(len(self))))

    def add_noise(self, x_0: Tensor, eps: Tensor, t: Tensor | int) -> Tensor:
        """Noise clean latents x_0 (B, ...) with eps, like x_0, to timestep t, one int or (B,); ValueError out of range.

        x_t = sqrt(alphas_cumprod[t]) x_0 + sqrt(1 - alphas_cumprod[t]) eps                   [DDPM, eq. 4]
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


class ToldTime(float):
    """A timestep by which a latent's noise level goes, where the network is told another one.   [Time shift]"""

    told: float

    def __new__(cls, t: float, told: float) -> ToldTime:
        timestep = super().__new__(cls, t)
        timestep.told = told
        return timestep

    def __getnewargs__(self) -> tuple[float, float]:  # type: ignore[override]
        """(t, told), by which a copy is made."""
        return float(self), self.told


def told_at(t: float) -> float:
    """What the network is told at a timestep of a spacing: the timestep itself, or another."""
    return t.told if isinstance(t, ToldTime) else t


def leading(steps: int, offset: int = 1, train_steps: int = TRAIN_STEPS) -> tuple[int, ...]:
    """Each of N equal intervals of 0 .. T-1 entered at its clean end, noisiest first: 50 steps visit 981 ... 21, 1.

    t_i = floor(i T / N) + offset,  i = N-1 ... 0
    """
    # Where N divides T this is what CompVis and diffusers run. Elsewhere those step by floor(T / N), which gives other
    # numbers of steps, or walks off the table. For N = T there is no room to shift: the offset gives way.
    _check_steps(steps, train_steps)
    if offset < 0:
        raise ValueError(f"offset: expected 0 or more, got {offset}")
    entries = [i * train_steps // steps for i in range(steps)]
    offset = min(offset, train_steps - 1 - entries[-1])
    return tuple(t + offset for t in reversed(entries))


def trailing(steps: int, train_steps: int = TRAIN_STEPS) -> tuple[int, ...]:
    """Each of N equal intervals entered at its noisy end: 50 steps visit 999, 979 ... 39, 19.

    t_i = round(T (1 - i / N)) - 1,  i = 0 ... N-1                                        [Lin et al., section 3.3]
    """
    _check_steps(steps, train_steps)
    return tuple(round(train_steps * (1 - i / steps)) - 1 for i in range(steps))


def linspace(steps: int, train_steps: int = TRAIN_STEPS, *, endpoint: bool = False) -> tuple[float, ...]:
    """From T-1 in equal strides, whole or not: 20 steps visit 999, 949.05 ... 49.95.

    t_i = (T - 1) (1 - i / N),  i = 0 ... N-1        with `endpoint`: i / (N - 1)
    """
    _check_steps(steps, train_steps)
    return tuple((train_steps - 1) * (1 - u) for u in _fractions(steps, endpoint))


def karras(steps: int, schedule: Schedule, *, rho: float = 7.0, endpoint: bool = False) -> tuple[float, ...]:
    """Equal strides in sigma^(1/rho): short ones where there is little noise. `endpoint`: i / (N - 1), as EDM has it.

    sigma_i = (sigma_max^(1/rho) + i/N (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho                 [EDM, eq. 5]
    """
    _check_steps(steps, len(schedule))
    _check_signal(schedule)
    high, low = (math.exp(-float(lambda_t) / rho) for lambda_t in schedule.lambdas[[-1, 0]])
    return _at_sigmas(schedule, [(high + u * (low - high)) ** rho for u in _fractions(steps, endpoint)])


def log_snr(steps: int, schedule: Schedule, *, endpoint: bool = False) -> tuple[float, ...]:
    """Equal strides in lambda: each lifts the signal-to-noise ratio by the same factor. [DPM-Solver, section 3.4]"""
    _check_steps(steps, len(schedule))
    _check_signal(schedule)
    noisy, clean = (float(lambda_t) for lambda_t in schedule.lambdas[[-1, 0]])
    return _at_sigmas(schedule, [math.exp(-noisy - u * (clean - noisy)) for u in _fractions(steps, endpoint)])


def exponential(steps: int, schedule: Schedule, *, endpoint: bool = False) -> tuple[float, ...]:
    """Equal strides in log sigma: `log_snr` by the name that k-diffusion's users know."""
    return log_snr(steps, schedule, endpoint=endpoint)


def polyexponential(steps: int, schedule: Schedule, *, rho: float = 1.0, endpoint: bool = False) -> tuple[float, ...]:
    """A power of equal strides in log sigma: rho above 1 has shorter ones where it is clean; 1 is `exponential`.

    log sigma_i = log sigma_min + (1 - u)^rho log(sigma_max / sigma_min)                           [k-diffusion]
    """
    return _in_log_sigma(steps, schedule, endpoint, lambda u, noisy, clean: clean + (1 - u) ** rho * (noisy - clean))


def kl_optimal(steps: int, schedule: Schedule, *, endpoint: bool = False) -> tuple[float, ...]:
    """Equal strides in arctan sigma: best for a Gaussian of unit width.                      [AYS, section 3]"""

    def log_sigma(u: np.ndarray, noisy: float, clean: float) -> np.ndarray:
        ends = np.arctan(np.exp([noisy, clean]))
        return np.log(np.tan(ends[0] + u * (ends[1] - ends[0])))

    return _in_log_sigma(steps, schedule, endpoint, log_sigma)


def laplace(steps: int, schedule: Schedule, *, scale: float = 0.5, endpoint: bool = False) -> tuple[float, ...]:
    """Quantiles of Laplace's distribution of log sigma around 0, cut off at the schedule's ends.        [Laplace]

    log sigma_i = F^-1((1 - u) F(log sigma_max) + u F(log sigma_min)),   F(x) = 1 - e^(-x / scale) / 2 for x > 0
    """

    def log_sigma(u: np.ndarray, noisy: float, clean: float) -> np.ndarray:
        # By tails, which keep their digits: at the noisy end 1 - F is 0.002.
        above, below = 0.5 * math.exp(-noisy / scale), 0.5 * math.exp(clean / scale)
        upper = above + u * (1 - above - below)  # 1 - F of each level
        lower = below + (1 - u) * (1 - above - below)
        return np.where(upper < 0.5, -scale * np.log(2 * upper), scale * np.log(2 * lower))

    return _in_log_sigma(steps, schedule, endpoint, log_sigma)


def quadratic(steps: int, train_steps: int = TRAIN_STEPS, *, endpoint: bool = False) -> tuple[float, ...]:
    """Equal strides in the root of t: (T - 1) (1 - u)^2, whole or not.                   [DDIM, appendix D.2]"""
    _check_steps(steps, train_steps)
    return tuple((train_steps - 1) * (1 - u) ** 2 for u in _fractions(steps, endpoint))


def beta(
    steps: int, train_steps: int = TRAIN_STEPS, *, a: float = 0.6, b: float = 0.6, endpoint: bool = False
) -> tuple[float, ...]:
    """Quantiles of Beta(a, b) in t: dense at both ends. t_i = (T - 1) F^-1(1 - u)             [Beta sampling]"""
    from scipy.special import betaincinv

    _check_steps(steps, train_steps)
    quantiles = betaincinv(a, b, 1 - np.array(_fractions(steps, endpoint)))
    return tuple(round(t, 9) for t in ((train_steps - 1) * quantiles).tolist())


AYS_SD15_SIGMAS = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)


def align_your_steps(steps: int, schedule: Schedule, *, endpoint: bool = False) -> tuple[float, ...]:
    """Levels optimised for SD1.5 and 10 steps; for other N straight lines in log sigma between them. [AYS, table 3]"""
    _check_steps(steps, len(schedule))
    at = np.linspace(0, 1, len(AYS_SD15_SIGMAS))
    log_sigmas = np.interp(_fractions(steps, endpoint), at, np.log(AYS_SD15_SIGMAS))
    return _at_sigmas(schedule, np.exp(log_sigmas).tolist())


Spacing = Callable[[int, Schedule], tuple[float, ...]]
"""timesteps = spacing(steps, schedule)"""

SPACINGS: dict[str, Spacing] = {
    "leading": lambda steps, schedule: leading(steps, schedule.steps_offset, len(schedule)),
    "trailing": lambda steps, schedule: trailing(steps, len(schedule)),
    "linspace": lambda steps, schedule: linspace(steps, len(schedule), endpoint=schedule.to_zero),
    "quadratic": lambda steps, schedule: quadratic(steps, len(schedule), endpoint=schedule.to_zero),
    "beta": lambda steps, schedule: beta(steps, len(schedule), endpoint=schedule.to_zero),
    "karras": lambda steps, schedule: karras(steps, schedule, endpoint=schedule.to_zero),
    "log_snr": lambda steps, schedule: log_snr(steps, schedule, endpoint=schedule.to_zero),
    "exponential": lambda steps, schedule: exponential(steps, schedule, endpoint=schedule.to_zero),
    "polyexponential": lambda steps, schedule: polyexponential(steps, schedule, endpoint=schedule.to_zero),
    "laplace": lambda steps, schedule: laplace(steps, schedule, endpoint=schedule.to_zero),
    "kl_optimal": lambda steps, schedule: kl_optimal(steps, schedule, endpoint=schedule.to_zero),
    "align_your_steps": lambda steps, schedule: align_your_steps(steps, schedule, endpoint=schedule.to_zero),
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


def _in_log_sigma(
    steps: int, schedule: Schedule, endpoint: bool, log_sigma: Callable[[np.ndarray, float, float], np.ndarray]
) -> tuple[float, ...]:
    """Timesteps at log_sigma(u, noisiest, cleanest), for u along the run."""
    _check_steps(steps, len(schedule))
    _check_signal(schedule)
    noisy, clean = (-float(lambda_t) for lambda_t in schedule.lambdas[[-1, 0]])
    return _at_sigmas(schedule, np.exp(log_sigma(np.array(_fractions(steps, endpoint)), noisy, clean)).tolist())


def _at_sigmas(schedule: Schedule, sigmas: Sequence[float]) -> tuple[float, ...]:
    # Rounded, so that the ends are 999 and 0 and not 1e-13 away from them.
    return tuple(round(schedule.timestep_at(-math.log(sigma)), 9) for sigma in sigmas)
