"""Every sampler that independent implementations have too, step by step: CompVis and diffusers on the small U-Net.

The prompt changes during the runs: step i of n sees prompt floor(3 i / n), at all evaluations of the step.
"""

from dataclasses import replace
from functools import cache

import pytest
import torch
from networks import small
from reference import TRAJECTORY_G1, TRAJECTORY_G75, Golden, golden
from small_networks import reference_run_inputs

from ldm.conditioning import Contexts, constant, piecewise
from ldm.guidance import guided
from ldm.samplers import EpsFn, Sampler, Step, dpm_solver_pp_2m, euler, heun, plms
from ldm.schedule import Schedule, karras, leading, linspace

SCHEDULE = Schedule.sd15()
TO_ZERO = replace(SCHEDULE, final_alpha_cumprod=1.0)  # diffusers ends these runs without any noise
GUIDANCE = [pytest.param(1.0, id="g1"), pytest.param(7.5, id="g7.5")]
# Measured: at most 1.3e-6 at guidance 1 and 3.4e-5 (Heun) at 7.5, so what two references' DDIM are held to will do.
TOLERANCE = {1.0: TRAJECTORY_G1, 7.5: TRAJECTORY_G75}


def contexts(steps: int) -> Contexts:
    return piecewise(reference_run_inputs()[1], [-(-k * steps // 3) for k in (1, 2)], steps)


def eps_of(schedule: Contexts, scale: float) -> EpsFn:
    return guided(small("unet"), schedule, scale, reference_run_inputs()[2])


def whole_timesteps(eps_fn: EpsFn) -> EpsFn:
    """diffusers asks the network at the nearest whole timestep, whatever the noise level."""
    return lambda x_t, t, step: eps_fn(x_t, round(t), step)


def undivided(run: list[Step], schedule: Schedule) -> torch.Tensor:
    """The latents after each step as EDM has them, x_t / alpha."""
    after = [schedule.alphas_cumprod_at(step.t) for step in run[1:]] + [schedule.final_alpha_cumprod]
    return torch.cat([step.x_prev / a**0.5 for step, a in zip(run, after, strict=True)])


@cache
def fifty_steps_of_plms(scale: float) -> list[Step]:
    return list(plms(eps_of(contexts(50), scale), reference_run_inputs()[0], SCHEDULE, 50))


@pytest.mark.parametrize("scale", GUIDANCE)
def test_every_step_of_plms_is_compvis(scale):
    stored = golden(f"plms50_swap_g{scale:g}")
    run = fifty_steps_of_plms(scale)
    assert [step.t for step in run] == stored["timesteps"].tolist()
    assert [step.evaluations for step in run] == [2] + [1] * 49
    assert stored.error("x", torch.cat([step.x_prev for step in run])) < TOLERANCE[scale]


def test_the_result_of_plms_is_diffusers_pndm():
    # Which spreads 50 steps over 51 timesteps; what is stored was made with the contexts of the steps all the same.
    stored = golden("plms50_swap_g1")
    assert stored["pndm_eval_timesteps"].tolist()[:3] == [981, 961, 961]
    assert stored.error("x.final.pndm", fifty_steps_of_plms(1.0)[-1].x_prev) < TRAJECTORY_G1


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("scale", GUIDANCE)
def test_short_runs_of_plms_are_compvis(scale, steps):
    eps_fn = eps_of(constant(reference_run_inputs()[1][0], steps), scale)
    run = list(plms(eps_fn, reference_run_inputs()[0], SCHEDULE, steps))
    error = golden(f"misc_samplers_g{scale:g}").error(f"noswap{steps}.compvis.x", torch.cat([s.x_prev for s in run]))
    assert error < TOLERANCE[scale]


def edm_run(sampler: Sampler, stored: Golden, timesteps: tuple[float, ...], scale: float) -> list[Step]:
    """diffusers begins at x_T times sigma_max (or, "leading", times sqrt(sigma_max^2 + 1)), all divided by alpha."""
    alpha = SCHEDULE.alphas_cumprod_at(timesteps[0]) ** 0.5
    x_T = reference_run_inputs()[0] * float(stored["init_noise_sigma"]) * alpha
    return list(sampler(eps_of(contexts(20), scale), x_T, TO_ZERO, 20, timesteps=timesteps))


EDM_TIMESTEPS = {
    "": linspace(20, endpoint=True),
    "_karras": karras(20, SCHEDULE, endpoint=True),
    "_leading": leading(20),
}


@pytest.mark.parametrize("spacing", EDM_TIMESTEPS)
@pytest.mark.parametrize("scale", GUIDANCE)
def test_every_step_of_euler_is_diffusers(scale, spacing):
    stored = golden(f"euler20{spacing}_swap_g{scale:g}")
    timesteps = EDM_TIMESTEPS[spacing]
    assert timesteps == pytest.approx(stored["timesteps"].tolist(), abs=2e-3)  # found in float32 there
    run = edm_run(euler, stored, timesteps, scale)
    assert stored.error("x", undivided(run, TO_ZERO)) < TOLERANCE[scale]


@pytest.mark.parametrize("scale", GUIDANCE)
def test_every_step_of_heun_is_diffusers_and_both_evaluations_see_the_steps_context(scale):
    stored = golden(f"heun20_swap_g{scale:g}")
    run = edm_run(heun, stored, linspace(20, endpoint=True), scale)
    assert sum(step.evaluations for step in run) == len(stored["timesteps"])
    assert stored.error("x", undivided(run, TO_ZERO)) < TOLERANCE[scale]


@pytest.mark.parametrize("spacing", ["", "_karras", "_leading"])
@pytest.mark.parametrize("scale", GUIDANCE)
def test_every_step_of_dpm_solver_pp_2m_is_diffusers(scale, spacing):
    stored = golden(f"dpmpp2m20{spacing}_swap_g{scale:g}")
    timesteps = karras(20, SCHEDULE, endpoint=True) if spacing == "_karras" else stored["timesteps"].tolist()
    eps_fn = whole_timesteps(eps_of(contexts(20), scale))
    run = list(dpm_solver_pp_2m(eps_fn, reference_run_inputs()[0], TO_ZERO, 20, timesteps=timesteps))
    assert [round(step.t) for step in run] == stored["timesteps"].tolist()
    assert stored.error("x", torch.cat([step.x_prev for step in run])) < TOLERANCE[scale]


@pytest.mark.parametrize("scale", GUIDANCE)
def test_the_result_of_dpm_solver_pp_2m_is_compvis(scale):
    # Evenly spaced down to t = 0, at fractional timesteps.
    eps_fn = eps_of(constant(reference_run_inputs()[1][0], 20), scale)
    *_, last = dpm_solver_pp_2m(eps_fn, reference_run_inputs()[0], SCHEDULE, 20, timesteps=linspace(20))
    stored = golden(f"misc_samplers_g{scale:g}")
    assert stored.error("compvis_dpm_solver20.noswap.final", last.x_prev) < TOLERANCE[scale]
