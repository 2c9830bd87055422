"""A distribution whose probability flow is known exactly: every pixel a mixture of Gaussians, independent of the rest.

In one dimension the flow cannot let two points pass each other, so each keeps its quantile: the exact x at one noise
level is F^-1(G(y)) of the exact y at another, with F and G the mixture's distribution functions at those levels.
"""

import math

import torch
from torch import Tensor

from ldm.schedule import Schedule

WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
MEANS = torch.tensor([-1.2, 0.4, 1.5], dtype=torch.float64)
DEVIATIONS = torch.tensor([0.5, 0.3, 0.6], dtype=torch.float64)


class Mixture:
    """The noised mixture of a schedule. Sizes: x any shape, float64."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def eps(self, x_t: Tensor, t: float, step: int = 0) -> Tensor:
        """The exact eps: -sigma times the score of x_t's distribution."""
        a_t = self.schedule.alphas_cumprod_at(t)
        means, deviations = self._at(a_t)
        z = (x_t[..., None] - means) / deviations
        shares = torch.softmax(torch.log(WEIGHTS / deviations) - 0.5 * z**2, dim=-1)
        return math.sqrt(1 - a_t) * (shares * z / deviations).sum(-1)

    def flow(self, x: Tensor, a_from: float, a_to: float) -> Tensor:
        """Where the flow takes x from one noise level (alphas_cumprod) to another, by bisection of the quantile."""
        quantile = self._cdf(x, a_from)
        low, high = torch.full_like(x, -30.0), torch.full_like(x, 30.0)
        for _ in range(60):
            middle = (low + high) / 2
            below = self._cdf(middle, a_to) < quantile
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def _cdf(self, x: Tensor, a_t: float) -> Tensor:
        means, deviations = self._at(a_t)
        return (WEIGHTS * torch.special.ndtr((x[..., None] - means) / deviations)).sum(-1)

    @staticmethod
    def _at(a_t: float) -> tuple[Tensor, Tensor]:
        return math.sqrt(a_t) * MEANS, torch.sqrt(a_t * DEVIATIONS**2 + 1 - a_t)
