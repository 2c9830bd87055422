"""DPM-Solver whose strides are set by the error that it estimates.

Papers: DPM-Solver = Lu et al. 2022, arXiv:2206.00927.  The control is Crowson's, k-diffusion, of torchsde's kind.
"""

from __future__ import annotations

from math import atan, isnan

import torch
from torch import Tensor

from ldm.samplers.driver import Level, Run
from ldm.samplers.one_step import embedded_pair

FIRST_STRIDE = 0.05  # in lambda
RELATIVE, ABSOLUTE = 0.05, 0.0078  # tolerances of the difference between the two orders; k-diffusion's
ACCEPTED = 0.81  # the least factor for the next stride at which a stride counts


def dpm_adaptive(now: Level, then: Level, x_t: Tensor, eps: Tensor, run: Run) -> Tensor:
    """DPM-Solver-23 from level to level, in as many strides as its error asks for. Order 3.  [DPM-Solver, appendix C]

    error  = rms((y_2 - y_3) / max(0.0078, 0.05 |y_2|, 0.05 |y_2 before|))          y_k: x / alpha as of order k
    factor = 1 + arctan(error^(-1/3) - 1)        by which the next stride is longer; this one counts from 0.81 on

    Each latent is controlled by itself, so none depends on the batch, and control begins anew in each step of the run:
    contexts change between steps, not within. Few steps leave it the choice; with 50 each is one short stride.
    """
    if then.std == 0:
        return run.x0_pred
    rows = [run.row(i) for i in range(len(x_t))]
    found = [_controlled(now, then, x_t[i : i + 1], eps[i : i + 1], row) for i, row in enumerate(rows)]
    run.evaluations += sum(row.evaluations for row in rows) / len(rows)
    return torch.cat(found)


def _controlled(now: Level, then: Level, x: Tensor, eps: Tensor, run: Run) -> Tensor:
    """One latent, from one level to another."""
    stride, before = FIRST_STRIDE, x / now.alpha
    while True:
        target = now.log_snr + stride
        there = then if target > then.log_snr - 1e-5 else run.level_at(target)
        low, high = (x / there.alpha for x in embedded_pair(now, there, x, eps, run))
        allowed = torch.maximum(low.abs(), before.abs()).mul(RELATIVE).clamp(min=ABSOLUTE)
        error = float(((low - high) / allowed).square().mean().sqrt())
        if isnan(error):
            return x * error  # for whoever watches the run to name
        factor = 1 + atan((1 / (error + 1e-8)) ** (1 / 3) - 1)
        stride *= factor
        if factor < ACCEPTED:
            continue
        x, before, now = there.alpha * high, low, there
        if there is then:
            return x
        eps = run.eps(x, now)
