"""The noise schedule of Stable Diffusion 1 and the timesteps that a sampler visits.

Papers: DDPM = Ho et al. 2020, arXiv:2006.11239.  DDIM = Song et al. 2020, arXiv:2010.02502.
Naming: `alphas_cumprod[t]` is DDPM's alpha-bar_t. The DDIM paper calls the same quantity alpha_t.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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

    def __len__(self) -> int:
        """T, the number of training timesteps."""
        return len(self.betas)

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
    if not 1 <= steps <= train_steps:
        raise ValueError(f"steps: expected 1..{train_steps}, got {steps}")
    if offset < 0:
        raise ValueError(f"offset: expected 0 or more, got {offset}")
    entries = [i * train_steps // steps for i in range(steps)]
    offset = min(offset, train_steps - 1 - entries[-1])
    return tuple(t + offset for t in reversed(entries))
