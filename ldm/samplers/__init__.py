"""Samplers: hand-written loops from noise to a latent, one self-contained generator each.

A sampler yields a `Step` for every step that it completes and holds no other state, so whatever a caller wants of the
trajectory is a `for` loop away:

    for step in ddim(eps_fn, x_T, schedule, steps=50):
        ...
    latents = step.x_t

All have one signature, `Sampler`, so a comparison is a loop over `SAMPLERS`. What a multistep method remembers
travels in `Step.history`: whoever resumes a run, or leaves it for another prompt, hands it on or drops it.

Nothing here switches gradients off: wrap the loop in `torch.no_grad()` to sample.
"""

from ldm.samplers.ddim import ddim, ddpm
from ldm.samplers.dpm_solver import dpm_solver_2s, dpm_solver_pp_2m, dpm_solver_pp_3m
from ldm.samplers.euler import euler, euler_ancestral, heun, lms
from ldm.samplers.noise import initial_noise, step_noise
from ldm.samplers.plms import plms
from ldm.samplers.step import EpsFn, History, Noise, Sampler, Step
from ldm.samplers.unipc import unipc

SAMPLERS: dict[str, Sampler] = {
    "ddim": ddim,
    "plms": plms,
    "euler": euler,
    "heun": heun,
    "lms": lms,
    "dpm_solver_2s": dpm_solver_2s,
    "dpm_solver_pp_2m": dpm_solver_pp_2m,
    "dpm_solver_pp_3m": dpm_solver_pp_3m,
    "unipc": unipc,
    "euler_ancestral": euler_ancestral,
    "ddpm": ddpm,
}

RANDOM = ("euler_ancestral", "ddpm")  # those that cannot do without `noise`

__all__ = [
    "RANDOM",
    "SAMPLERS",
    "EpsFn",
    "History",
    "Noise",
    "Sampler",
    "Step",
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
    "plms",
    "step_noise",
    "unipc",
]
