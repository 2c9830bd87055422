"""Samplers: from noise to a latent, one short step function a method, and one loop for all.

A sampler yields a `Step` for every step that it completes and holds no other state, so whatever a caller wants of the
trajectory is a `for` loop away:

    for step in ddim(eps_fn, x_T, schedule, steps=50):
        ...
    latents = step.x_prev

All have one signature, `Sampler.__call__`, so a comparison is a loop over `SAMPLERS`. What a multistep method remembers
travels in `Step.history`: whoever resumes a run, or leaves it for another prompt, hands it on or drops it.

Nothing here switches gradients off: wrap the loop in `torch.no_grad()` to sample.
"""

from ldm.samplers import adaptive, multistep, one_step, stochastic
from ldm.samplers.driver import (
    EpsFn,
    History,
    Level,
    Noise,
    Run,
    Sampler,
    Step,
    StepFn,
    final_level,
    noise_levels,
    visited_levels,
)
from ldm.samplers.noise import initial_noise, step_noise

ddim = Sampler("ddim", one_step.ddim, order=1, eta=0.0, from_pure_noise=True)
plms = Sampler("plms", multistep.plms, order=2, starting=1, memory=3, even=True)
euler = Sampler("euler", one_step.euler, order=1)
heun = Sampler("heun", one_step.heun, order=2, evaluations=2)
lms = Sampler("lms", multistep.lms, order=4, memory=3)
dpm_solver_2s = Sampler("dpm_solver_2s", one_step.dpm_solver_2s, order=2, evaluations=2)
dpm_solver_pp_2m = Sampler("dpm_solver_pp_2m", multistep.dpm_solver_pp_2m, order=2, memory=1)
dpm_solver_pp_3m = Sampler("dpm_solver_pp_3m", multistep.dpm_solver_pp_3m, order=3, memory=2)
unipc = Sampler("unipc", multistep.unipc, order=3, memory=3)
deis = Sampler("deis", multistep.deis, order=3, memory=2)
ipndm = Sampler("ipndm", multistep.ipndm, order=2, memory=3, even=True)
dpm_solver_3s = Sampler("dpm_solver_3s", one_step.dpm_solver_3s, order=3, evaluations=3)
dpm_adaptive = Sampler("dpm_adaptive", adaptive.dpm_adaptive, order=3, evaluations=3, varies=True)
ddim_cfgpp = Sampler("ddim_cfgpp", one_step.ddim_cfgpp, order=1, uncond=True)

euler_ancestral = Sampler("euler_ancestral", one_step.euler_ancestral, order=None, random=True)
ddpm = Sampler("ddpm", one_step.ddpm, order=None, random=True, from_pure_noise=True)
dpm2_ancestral = Sampler("dpm2_ancestral", stochastic.dpm2_ancestral, order=None, evaluations=2, random=True)
dpm_solver_pp_2s_ancestral = Sampler(
    "dpm_solver_pp_2s_ancestral", stochastic.dpm_solver_pp_2s_ancestral, order=None, evaluations=2, random=True
)
dpm_solver_pp_sde = Sampler("dpm_solver_pp_sde", stochastic.dpm_solver_pp_sde, order=None, evaluations=2, random=True)
dpm_solver_pp_2m_sde = Sampler(
    "dpm_solver_pp_2m_sde", stochastic.dpm_solver_pp_2m_sde, order=None, memory=1, random=True
)
dpm_solver_pp_3m_sde = Sampler(
    "dpm_solver_pp_3m_sde", stochastic.dpm_solver_pp_3m_sde, order=None, memory=2, random=True
)
er_sde = Sampler("er_sde", stochastic.er_sde, order=None, memory=2, random=True)
restart = Sampler("restart", stochastic.restart, order=None, evaluations=2, random=True, varies=True)
lcm = Sampler("lcm", stochastic.lcm, order=None, random=True, from_pure_noise=True)

SAMPLERS: dict[str, Sampler] = {
    sampler.name: sampler
    for sampler in (
        *(ddim, plms, euler, heun, lms, dpm_solver_2s, dpm_solver_pp_2m, dpm_solver_pp_3m, unipc),
        *(deis, ipndm, dpm_solver_3s, dpm_adaptive, ddim_cfgpp),
        *(euler_ancestral, ddpm, dpm2_ancestral, dpm_solver_pp_2s_ancestral, dpm_solver_pp_sde),
        *(dpm_solver_pp_2m_sde, dpm_solver_pp_3m_sde, er_sde, restart, lcm),
    )
}

__all__ = [
    "SAMPLERS",
    "EpsFn",
    "History",
    "Level",
    "Noise",
    "Run",
    "Sampler",
    "Step",
    "StepFn",
    "ddim",
    "ddim_cfgpp",
    "ddpm",
    "deis",
    "dpm2_ancestral",
    "dpm_adaptive",
    "dpm_solver_2s",
    "dpm_solver_3s",
    "dpm_solver_pp_2m",
    "dpm_solver_pp_2m_sde",
    "dpm_solver_pp_2s_ancestral",
    "dpm_solver_pp_3m",
    "dpm_solver_pp_3m_sde",
    "dpm_solver_pp_sde",
    "er_sde",
    "euler",
    "euler_ancestral",
    "final_level",
    "heun",
    "initial_noise",
    "ipndm",
    "lcm",
    "lms",
    "noise_levels",
    "plms",
    "restart",
    "step_noise",
    "unipc",
    "visited_levels",
]
