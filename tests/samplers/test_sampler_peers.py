"""Every step of k-diffusion's and diffusers' samplers, on the mixture's exact eps, and what is different in theirs.

tests/golden/sampler_peers.npz: k-diffusion 0.1.1.post1 and diffusers 0.42.1 on CPU, in float64 and stored as float32,
from x_T = linspace(-2, 2, 64) as (1, 4, 4, 4). Noise is `step_noise([7], ...)`: given to k-diffusion as `noise_sampler`
and to diffusers as `variance_noise`; LCM's own draw was replaced by it. k-diffusion: 10 Karras levels from t = 999
to 0, then none, latents divided by alpha; adaptive: from t = 999 to 0 at its defaults, in float32. diffusers: SD1.5's,
"linspace" of 10; DEIS, DPM++ 2M and 3M, UniPC: no lower_order_final, ending at sigma_min; LCM: 4 steps to alpha 1.
"""

from functools import partial
from math import expm1, sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
from mixture import Mixture
from torch import Tensor

from ldm import samplers
from ldm.samplers import SAMPLERS, History, Level, Run, Sampler, Step, step_noise
from ldm.samplers.multistep import newton_rest
from ldm.samplers.stochastic import _towards, _up
from ldm.schedule import Schedule

STORED = np.load(Path(__file__).parents[1] / "golden" / "sampler_peers.npz")
SCHEDULE = Schedule.sd15()
TO_ZERO = SCHEDULE.ending_at("zero")
MIXTURE = Mixture(SCHEDULE)
X_T = torch.linspace(-2, 2, 64, dtype=torch.float64).view(1, 4, 4, 4)
NOISE = step_noise([7], (4, 4, 4))
# Measured: 3e-8, the rounding of what is stored, but for diffusers' own float32 sigmas and, in DEIS, its differences of
# logarithms of them in float32 (8e-6).
KDIFFUSION, DIFFUSERS, DIFFUSERS_DEIS = 1e-7, 1e-6, 3e-5


def run_of(sampler: Sampler, schedule: Schedule, timesteps: np.ndarray) -> list[Step]:
    ts = timesteps.tolist()
    return list(sampler(MIXTURE.eps, X_T, schedule, len(ts), noise=NOISE, timesteps=ts))


def undivided(run: list[Step], schedule: Schedule) -> Tensor:
    """The latents after each step as EDM has them."""
    after = [schedule.alphas_cumprod_at(step.t) for step in run[1:]] + [schedule.final_alpha_cumprod]
    return torch.cat([step.x_prev / sqrt(a) for step, a in zip(run, after, strict=True)])


def error(name: str, found: Tensor) -> float:
    stored = torch.from_numpy(STORED[name]).double()
    assert stored.shape == found.shape
    return float((found - stored).norm() / stored.norm())


def kdiffusion_error(name: str, sampler: Sampler) -> float:
    return error(f"k.{name}", undivided(run_of(sampler, TO_ZERO, STORED["timesteps"]), TO_ZERO))


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("dpm_2", "dpm_solver_2s"),
        ("heun", "heun"),
        ("lms", "lms"),
        ("dpmpp_2m", "dpm_solver_pp_2m"),
        ("euler_ancestral", "euler_ancestral"),
        ("dpm_2_ancestral", "dpm2_ancestral"),
        ("dpmpp_2s_ancestral", "dpm_solver_pp_2s_ancestral"),
        ("dpmpp_sde", "dpm_solver_pp_sde"),
        ("dpmpp_2m_sde", "dpm_solver_pp_2m_sde"),
    ],
)
def test_every_step_is_k_diffusions(name, ours):
    assert kdiffusion_error(name, SAMPLERS[ours]) < KDIFFUSION


def test_the_adaptive_run_is_k_diffusions():
    (step,) = run_of(samplers.dpm_adaptive, SCHEDULE, np.array([999]))
    assert (
        error("k.dpm_adaptive", step.x_prev / sqrt(SCHEDULE.final_alpha_cumprod)) < 1.5e-5
    )  # measured 4e-6, of float32
    # It counts 3 for each of 10 strides; the 2 that it refused had their first eps already.
    assert (step.evaluations, int(STORED["k.dpm_adaptive.nfe"])) == (28, 30)


@pytest.mark.parametrize(
    ("name", "ours", "schedule", "tolerance"),
    [
        ("deis", "deis", SCHEDULE, DIFFUSERS_DEIS),
        ("2m", "dpm_solver_pp_2m", SCHEDULE, DIFFUSERS),
        ("2m_sde", "dpm_solver_pp_2m_sde", TO_ZERO, DIFFUSERS),
        ("unipc", "unipc", SCHEDULE, DIFFUSERS),
        ("lcm", "lcm", TO_ZERO, DIFFUSERS),
    ],
)
def test_every_step_is_diffusers(name, ours, schedule, tolerance):
    run = run_of(SAMPLERS[ours], schedule, STORED[f"d.{name}.timesteps"])
    assert error(f"d.{name}", torch.cat([step.x_prev for step in run])) < tolerance


# ---- the halved curvature of both 3M -----------------------------------------------------------------


def halved_3m(now: Level, then: Level, x_t: Tensor, eps: Tensor, run: Run) -> tuple[Tensor, History]:
    """DPM-Solver++(3M) with half the curvature's weight, and the second step 2M's, as diffusers has it."""
    if len(run.history) == 1:
        x_prev, _ = SAMPLERS["dpm_solver_pp_2m"].step(now, then, x_t, eps, run)
        return x_prev, (run.x0_pred, *run.history)
    h = then.log_snr - now.log_snr
    w_1 = h + expm1(-h)
    integral = -expm1(-h) * run.x0_pred + newton_rest(run.x0_pred, w_1, h**2 / 2 - w_1, now, run)
    return then.std / now.std * x_t + then.alpha * integral, (run.x0_pred, *run.history)[:2]


def halved_3m_sde(now: Level, then: Level, x_t: Tensor, eps: Tensor, run: Run) -> tuple[Tensor, History]:
    """Likewise as an SDE, as k-diffusion has it."""
    history = (run.x0_pred, *run.history)[:2]
    if then.std == 0:
        return run.x0_pred, history
    h = then.log_snr - now.log_snr
    w_1 = h + expm1(-2 * h) / 2
    drift = _towards(run.x0_pred, x_t / now.alpha, 2 * h)
    drift = drift + newton_rest(run.x0_pred, w_1, (h**2 - w_1) / 2, now, run)
    return then.alpha * (drift + _up(now, then) * run.brownian(now, then, x_t)), history


def test_their_3m_differ_from_ours_in_half_the_curvature():
    ours = partial(Sampler, order=None, memory=2)
    sde = ours("halved", halved_3m_sde, random=True)
    assert kdiffusion_error("dpmpp_3m_sde", sde) < KDIFFUSION
    assert kdiffusion_error("dpmpp_3m_sde", samplers.dpm_solver_pp_3m_sde) > 1e-2
    halved, whole = (
        error("d.3m", torch.cat([step.x_prev for step in run_of(method, SCHEDULE, STORED["d.3m.timesteps"])]))
        for method in (ours("halved", halved_3m), samplers.dpm_solver_pp_3m)
    )
    assert halved < DIFFUSERS
    assert whole > 5e-2
