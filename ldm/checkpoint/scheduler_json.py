"""scheduler_config.json, and what single files tell of it: what the U-Net predicts, and its noise levels.

Single files have no agreed place. ComfyUI reads empty tensors named v_pred and ztsnr, ModelSpec a metadata field, and
ours is a JSON under `ldm.diffusion`.
"""

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ldm.checkpoint.container import CheckpointError
from ldm.checkpoint.foreign import read_json
from ldm.config import SD15_DIFFUSION, DiffusionConfig, Prediction

logger = logging.getLogger(__name__)

DIFFUSION_KEY = "ldm.diffusion"
MODELSPEC_KEY = "modelspec.prediction_type"
V_KEY, ZERO_SNR_KEY = "v_pred", "ztsnr"  # names of tensors that only say something

_PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "v": "v", "sample": "x0"}
_WORDS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
_SPACINGS = {name: name for name in ("leading", "trailing", "linspace")}
_BETAS = {name: name for name in ("scaled_linear", "linear", "squaredcos_cap_v2")}

# What would compute something that is not built here -> the value that does not. clip_sample is not among them: SD1.5's
# pipeline switches it off whatever the file says.
_FIXED = {
    "thresholding": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_flow_sigmas": False,
    "use_lu_lambdas": False,
}
# Those whose last step is told by set_alpha_to_one; the others are ours, which end where SD1.5 ends.
_TOLD_TO_END = ("DDIM", "PNDM", "DDPM", "LCM", "TCD", "DEIS")


def read_scheduler(path: Path) -> DiffusionConfig | None:
    """What a folder's scheduler_config.json tells, SD1.5's where it is silent; None when there is no such file.

    Raises: CheckpointError for what is not built here.
    """
    fields = read_json(path)
    if not fields:
        return None
    told = {name: value for name, value in fields.items() if value is not None}
    for name, built in _FIXED.items():
        if told.get(name, built) != built:
            raise CheckpointError(
                f"{path}: {name} is {told[name]!r}, which is not built here: choose a sampler and a spacing "
                "(--sampler, --spacing) and set the field to false"
            )
    if told.get("timestep_spacing") == "linspace" and not told.get("use_karras_sigmas"):
        _say_what_differs(path, str(told.get("_class_name", "DDIM")))
    betas = told.get("trained_betas")
    try:
        return DiffusionConfig(
            prediction=_one_of(path, "prediction_type", told.get("prediction_type", "epsilon"), _PREDICTIONS),
            beta_schedule=_one_of(
                path, "beta_schedule", told.get("beta_schedule", SD15_DIFFUSION.beta_schedule), _BETAS
            ),
            beta_start=float(told.get("beta_start", SD15_DIFFUSION.beta_start)),
            beta_end=float(told.get("beta_end", SD15_DIFFUSION.beta_end)),
            train_steps=int(told.get("num_train_timesteps", SD15_DIFFUSION.train_steps)),
            trained_betas=None if betas is None else tuple(map(float, betas)),
            zero_terminal_snr=bool(told.get("rescale_betas_zero_snr", False)),
            final_alpha_one=_ends_without_noise(told),
            spacing="karras"
            if told.get("use_karras_sigmas")
            else _one_of(path, "timestep_spacing", told.get("timestep_spacing", "leading"), _SPACINGS),
            steps_offset=int(told.get("steps_offset", SD15_DIFFUSION.steps_offset)),
        )
    except (TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: not the settings of a scheduler ({error})") from error


def _say_what_differs(path: Path, scheduler: str) -> None:
    """Of linspace: the levels of diffusers' Euler and its like are had by an option, those of its DDIM are not."""
    if scheduler.startswith(("DDIM", "PNDM")):
        how = "diffusers' DDIM rounds its timesteps, and steps by T // N from each; here a step goes to the next one"
    else:
        how = "diffusers' runs end without noise, those of Euler and Heun at t = 0 before: --end zero does so"
    logger.warning("%s: timestep_spacing is linspace, whose runs end at t = 0 here; %s", path, how)


def _ends_without_noise(told: Mapping[str, Any]) -> bool:
    named = str(told.get("_class_name", "DDIM"))
    return bool(told.get("set_alpha_to_one", False)) and named.startswith(_TOLD_TO_END)


def _one_of(path: Path, name: str, value: Any, known: Mapping[str, Any]) -> Any:
    if value not in known:
        raise CheckpointError(f"{path}: {name} is {value!r}, expected one of {', '.join(known)}")
    return known[value]


def diffusion_of_file(metadata: Mapping[str, str], names: Iterable[str]) -> DiffusionConfig:
    """What a single file tells, in its metadata or by tensors that only say something."""
    names = set(names)
    if DIFFUSION_KEY in metadata:
        try:
            fields = json.loads(metadata[DIFFUSION_KEY])
            betas = fields.pop("trained_betas", None)
            return DiffusionConfig(**fields, trained_betas=None if betas is None else tuple(map(float, betas)))
        except (ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"its metadata {DIFFUSION_KEY!r} tells no schedule ({error})") from error
    told = metadata.get(MODELSPEC_KEY, "epsilon")
    if told not in _PREDICTIONS:
        raise CheckpointError(f"its metadata {MODELSPEC_KEY} is {told!r}, expected one of {', '.join(_PREDICTIONS)}")
    prediction = "v" if V_KEY in names else _PREDICTIONS[told]
    config = DiffusionConfig(prediction=prediction)
    return replace(config, zero_terminal_snr=True, spacing="trailing") if ZERO_SNR_KEY in names else config


def to_metadata(config: DiffusionConfig) -> dict[str, str]:
    """For a single file that must say it: everything under our key, the prediction under ModelSpec's too."""
    told = json.dumps(asdict(config), separators=(",", ":"), sort_keys=True)
    return {DIFFUSION_KEY: told, MODELSPEC_KEY: "v" if config.prediction == "v" else _WORDS[config.prediction]}


def to_json(config: DiffusionConfig) -> str:
    """scheduler_config.json, as a DDIMScheduler of diffusers reads it."""
    fields = {
        "_class_name": "DDIMScheduler",
        "beta_end": config.beta_end,
        "beta_schedule": config.beta_schedule,
        "beta_start": config.beta_start,
        "clip_sample": False,
        "num_train_timesteps": config.train_steps,
        "prediction_type": _WORDS[config.prediction],
        "rescale_betas_zero_snr": config.zero_terminal_snr,
        "set_alpha_to_one": config.final_alpha_one,
        "steps_offset": config.steps_offset,
        "timestep_spacing": config.spacing if config.spacing in _SPACINGS else "linspace",
        "trained_betas": config.trained_betas,
    }
    if config.spacing == "karras":
        fields |= {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True}
    return json.dumps(fields, indent=2, sort_keys=True) + "\n"
