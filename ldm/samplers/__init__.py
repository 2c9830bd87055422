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

from ldm.samplers import multistep, one_step
from ldm.samplers.driver import EpsFn, History, Level, Noise, Run, Sampler, Step, StepFn, noise_levels
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
euler_ancestral = Sampler("euler_ancestral", one_step.euler_ancestral, order=None, random=True)
ddpm = Sampler("ddpm", one_step.ddpm, order=None, random=True, from_pure_noise=True)

SAMPLERS: dict[str, Sampler] = {
    sampler.name: sampler
    for sampler in (
        *(ddim, plms, euler, heun, lms, dpm_solver_2s, dpm_solver_pp_2m, dpm_solver_pp_3m, unipc),
        *(euler_ancestral, ddpm),
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
    "ddpm",
    "dpm_solver_2s",
    "dpm_solver_pp_2m",
    "dpm_solver_pp_3m",
    "euler",
    "euler_ancestral",
    "heun",
    "initial_noise",
    "lms",
    "noise_levels",
    "plms",
    "step_noise",
    "unipc",
]
