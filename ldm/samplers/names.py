"""Names that users of k-diffusion, ComfyUI, Automatic1111 and diffusers know: a sampler of ours and, often, a spacing.

"dpmpp_2m_sde_karras", "DPM++ 2M SDE Karras" -> dpm_solver_pp_2m_sde, karras
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

SAMPLER_NAMES = {
    "ddim_cfg_pp": "ddim_cfgpp",
    "deis_multistep": "deis",
    "dpm2": "dpm_solver_2s",  # without churn the two are one step
    "dpm2_a": "dpm2_ancestral",
    "dpm_2": "dpm_solver_2s",
    "dpm_2_a": "dpm2_ancestral",
    "dpm_2_ancestral": "dpm2_ancestral",
    "dpm_solver_pp_2s_a": "dpm_solver_pp_2s_ancestral",
    "dpmpp": "dpm_solver_pp_2m",
    "dpmpp_2m": "dpm_solver_pp_2m",
    "dpmpp_2m_sde": "dpm_solver_pp_2m_sde",
    "dpmpp_2s_a": "dpm_solver_pp_2s_ancestral",
    "dpmpp_2s_ancestral": "dpm_solver_pp_2s_ancestral",
    "dpmpp_3m": "dpm_solver_pp_3m",
    "dpmpp_3m_sde": "dpm_solver_pp_3m_sde",
    "dpmpp_sde": "dpm_solver_pp_sde",
    "euler_a": "euler_ancestral",
    "kdpm2": "dpm_solver_2s",
    "kdpm2_ancestral": "dpm2_ancestral",
    "pndm": "plms",
    "uni_pc": "unipc",
}
SPACING_NAMES = {
    "ays": "align_your_steps",
    "beta": "beta",
    "exponential": "exponential",
    "karras": "karras",
    "kl_optimal": "kl_optimal",
    "laplace": "laplace",
    "polyexponential": "polyexponential",
    "sgm_uniform": "linspace",
    "trailing": "trailing",
}


class Meaning(NamedTuple):
    """What a name stands for; spacing None: it says nothing of it."""

    sampler: str
    spacing: str | None


def understood(name: str, samplers: Collection[str]) -> Meaning | None:
    """What a user's name means, given the samplers that there are; None where it means none of them.

    Case, blanks and hyphens do not matter, ++ is pp, a k_ before it and a spacing after it are taken off.
    """
    if name in samplers:
        return Meaning(name, None)
    plain = re.sub(r"[\s_-]+", "_", name.strip().lower().replace("++", "pp")).removeprefix("k_")
    for suffix, spacing in (("", None), *SPACING_NAMES.items()):
        if plain.endswith(suffix):
            base = plain[: len(plain) - len(suffix)].rstrip("_")
            sampler = SAMPLER_NAMES.get(base, base)
            if sampler in samplers:
                return Meaning(sampler, spacing)
    return None


def meaning(
    name: str, spacing: str | Sequence[float] | None, samplers: Collection[str]
) -> tuple[str, str | Sequence[float] | None]:
    """As `understood`, beside a spacing that was asked for; ValueError for an unknown name, or for two spacings."""
    found = understood(name, samplers)
    if found is None:
        raise ValueError(
            f"sampler: expected one of {', '.join(samplers)}, FILE.py:NAME or a name for one, got {name!r}"
        )
    if spacing is not None and found.spacing not in (None, spacing):
        raise ValueError(f"spacing: got {spacing!r} beside sampler {name!r}, whose name says {found.spacing}")
    return found.sampler, found.spacing or spacing
