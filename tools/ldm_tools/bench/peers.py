"""k-diffusion's and diffusers' samplers on our network, for `ldm bench samplers --against`.

Both are imported where they are asked for; neither is a dependency. k-diffusion's samplers take any levels, and so
visit ours. diffusers' schedulers choose theirs: they run as their users run them, by the spacing of the same name.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.bench.against import Eps, Peer, PeerRun
from ldm.samplers.driver import final_level
from ldm.schedule import Schedule

# Ours -> theirs, and what it is called with.
K_DIFFUSION: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("sample_euler", {}),
    "euler": ("sample_euler", {}),
    "heun": ("sample_heun", {}),
    "lms": ("sample_lms", {}),
    "dpm_solver_2s": ("sample_dpm_2", {}),
    "dpm_solver_pp_2m": ("sample_dpmpp_2m", {}),
    "dpm_solver_pp_3m": ("sample_dpmpp_3m_sde", {"eta": 0.0, "noise_sampler": lambda *_: 0.0}),
}
DIFFUSERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "dpm_solver_2s": ("KDPM2DiscreteScheduler", {}),
    "dpm_solver_pp_2m": ("DPMSolverMultistepScheduler", {"solver_order": 2}),
    "dpm_solver_pp_3m": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "unipc": ("UniPCMultistepScheduler", {"solver_order": 3}),
    "deis": ("DEISMultistepScheduler", {"solver_order": 3}),
}
DIFFUSERS_SPACINGS: dict[str, dict[str, Any]] = {
    "leading": {"timestep_spacing": "leading"},
    "trailing": {"timestep_spacing": "trailing"},
    "linspace": {"timestep_spacing": "linspace"},
    "karras": {"timestep_spacing": "linspace", "use_karras_sigmas": True},
    "log_snr": {"timestep_spacing": "linspace", "use_exponential_sigmas": True},
    "exponential": {"timestep_spacing": "linspace", "use_exponential_sigmas": True},
    "beta": {"timestep_spacing": "linspace", "use_beta_sigmas": True},
}


def load(name: str) -> Peer:
    """The samplers of the peer of this name. Raises ValueError where it cannot be imported."""
    return KDiffusion(library(name)) if name == "k-diffusion" else Diffusers(library(name))


def library(name: str) -> Any:
    """k_diffusion.sampling or diffusers, as installed by whoever asks. ValueError where it cannot be imported."""
    try:
        if name == "k-diffusion":
            import k_diffusion.sampling

            return k_diffusion.sampling
        import diffusers

        return diffusers
    except ImportError as error:
        raise ValueError(f"--against {name}: it cannot be imported here ({error}); install it beside ldm") from error


class KDiffusion:
    """k_diffusion.sampling, at our levels."""

    def __init__(self, sampling: Any) -> None:
        self.name, self.sampling = "k-diffusion" + _version("k-diffusion"), sampling

    def __call__(
        self, eps: Eps, x_T: Tensor, schedule: Schedule, sampler: str, spacing: str, timesteps: Sequence[float]
    ) -> PeerRun | None:
        """Theirs divides latents by alpha, and asks a model for x_0 at sigma."""
        if sampler not in K_DIFFUSION:
            return None
        function, settings = K_DIFFUSION[sampler]
        a_t = torch.tensor([*map(schedule.alphas_cumprod_at, timesteps), final_level(schedule).alphas_cumprod])
        sigmas, alphas = ((1 - a_t) / a_t).sqrt().to(x_T), a_t.sqrt().to(x_T)

        def denoised(x: Tensor, sigma: Tensor) -> Tensor:
            level = float(sigma.flatten()[0])
            t = round(schedule.timestep_at(-float(torch.tensor(level, dtype=torch.float64).log())), 4)
            return x - level * eps(x / (1 + level**2) ** 0.5, t)

        x = getattr(self.sampling, function)(denoised, x_T / alphas[0], sigmas, disable=True, **settings)
        return PeerRun(alphas[-1] * x, clean=False)


class Diffusers:
    """diffusers' schedulers at their own levels, ending at sigma_min where they can."""

    def __init__(self, module: Any) -> None:
        self.name, self.module = f"diffusers {module.__version__}", module

    def __call__(
        self, eps: Eps, x_T: Tensor, schedule: Schedule, sampler: str, spacing: str, timesteps: Sequence[float]
    ) -> PeerRun | None:
        """The loop that its pipelines have."""
        if sampler not in DIFFUSERS or spacing not in DIFFUSERS_SPACINGS:
            return None
        kind, settings = DIFFUSERS[sampler]
        made = getattr(self.module, kind)
        known = set(inspect.signature(made.__init__).parameters)
        wanted = {**settings, **DIFFUSERS_SPACINGS[spacing]}
        if not wanted.keys() <= known:
            return None
        usual: dict[str, Any] = {"steps_offset": schedule.steps_offset, "clip_sample": False, "set_alpha_to_one": False}
        usual |= {"final_sigmas_type": "sigma_min"}
        scheduler = made(
            trained_betas=schedule.betas.tolist(), **{name: usual[name] for name in usual.keys() & known}, **wanted
        )
        scheduler.set_timesteps(len(timesteps))
        x = x_T * float(scheduler.init_noise_sigma)
        for t in scheduler.timesteps:
            x_t = scheduler.scale_model_input(x, t)
            x = scheduler.step(eps(x_t.to(x_T), float(t)), t, x).prev_sample
        return self._as_ours(scheduler, x.to(x_T))

    @staticmethod
    def _as_ours(scheduler: Any, x: Tensor) -> PeerRun:
        sigmas = getattr(scheduler, "sigmas", None)
        if sigmas is None:
            return PeerRun(x, clean=False)
        divided = float(scheduler.init_noise_sigma) != 1  # by alpha
        last = float(sigmas[-1])
        return PeerRun(x / (1 + last**2) ** 0.5 if divided else x, clean=last == 0)


def _version(distribution: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f" {version(distribution)}"
    except PackageNotFoundError:
        return ""
