"""Refusals: what a path may hold instead of an SD1.5 model, each named in one line that says what to do."""

import re
from collections.abc import Mapping
from pathlib import Path

from ldm.checkpoint.container import CheckpointError

PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")

# First bytes of files that are taken for weights.
_FORMATS = (
    (
        rb"version https://git-lfs",
        "a Git LFS pointer, not the weights themselves: run `git lfs pull`, or fetch the file",
    ),
    (rb"\s*<(!doctype|html|\?xml)", "a web page, not weights: the download was answered with an error or a login page"),
    (rb"PK\x03\x04|\x80[\x02-\x05]", "a pickle: never read here, since it can run code; get its .safetensors version"),
    (rb"GGUF", "a GGUF file: get the .safetensors version"),
    (rb"\x89HDF", "an HDF5 file: get the .safetensors version"),
    (rb"[\x20-\x7e\t\r\n]{16,}", "a text file, not weights"),
)

_WHOLE_MODEL = "only whole SD1.5 models, and networks of theirs, are read here"

# Names that only other models have. The first match wins: a LoRA of SDXL is refused as a LoRA.
_MODELS = (
    (
        r"lora[_.]|\.(hada|lokr|oft)_",
        f"a LoRA, changes to a model and no model: merge it into one first ({_WHOLE_MODEL})",
    ),
    (r"^control_model\.|controlnet_|zero_convs|input_hint_block", f"a ControlNet: {_WHOLE_MODEL}"),
    (r"motion_modules", f"a motion module: {_WHOLE_MODEL}"),
    (r"^(emb_params|string_to_param\b.*)$", f"a textual inversion embedding: {_WHOLE_MODEL}"),
    (r"^conditioner\.embedders\.|label_emb\.|^add_embedding\.", "SDXL, another architecture: get an SD1.5 model"),
    (
        r"^(model\.diffusion_model\.)?(joint_blocks|double_blocks|single_blocks|transformer_blocks|single_transformer)",
        "a diffusion transformer (SD3, Flux or the like), another architecture: get an SD1.5 model",
    ),
    (r"^cond_stage_model\.model\.", "SD2, whose text encoder is another: get an SD1.5 model"),
)

_CONTEXT_WIDTHS = {1024: "SD2", 1280: "SDXL's refiner", 2048: "SDXL"}
_EXTRA_INPUTS = {9: "an inpainting model", 8: "an InstructPix2Pix model", 5: "a depth model", 7: "an upscaler"}


def refuse_other_formats(path: Path) -> None:
    """Raises CheckpointError when there is no file, or one of another format than safetensors."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: empty, 0 bytes: fetch it again")
    with path.open("rb") as file:
        first_bytes = file.read(256)
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise CheckpointError(
            f"{path}: a {path.suffix} file is a pickle: never read here, since it can run code; "
            "get its .safetensors version"
        )
    for pattern, what in _FORMATS:
        if re.match(pattern, first_bytes, re.IGNORECASE):
            raise CheckpointError(f"{path}: {what}")


def refuse_other_models(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises CheckpointError when the tensors' names and shapes are those of another model than SD1.5's."""
    names = "\n".join(shapes)
    for pattern, what in _MODELS:
        if re.search(pattern, names, re.MULTILINE):
            raise CheckpointError(f"{path}: {what}")

    context_width = next(
        (shape[-1] for name, shape in shapes.items() if shape and name.endswith(".attn2.to_k.weight")), None
    )
    if context_width in _CONTEXT_WIDTHS:
        raise CheckpointError(
            f"{path}: {_CONTEXT_WIDTHS[context_width]}, its contexts are {context_width} wide and SD1.5's 768: "
            "get an SD1.5 model"
        )

    for prefix, first, last in (("model.diffusion_model.", "input_blocks.0.0", "out.2"), ("", "conv_in", "conv_out")):
        first_shape, last_shape = shapes.get(f"{prefix}{first}.weight", ()), shapes.get(f"{prefix}{last}.weight", ())
        if len(first_shape) == len(last_shape) == 4 and first_shape[1] != last_shape[0]:
            what = _EXTRA_INPUTS.get(first_shape[1], "another model")
            raise CheckpointError(
                f"{path}: {what}, its U-Net takes {first_shape[1]} channels to predict {last_shape[0]}: "
                "get a plain SD1.5 model, which takes as many as it predicts"
            )


def refuse_other_folders(path: Path) -> None:
    """Raises CheckpointError when a folder holds another pipeline's parts."""
    if (path / "text_encoder_2").exists():
        raise CheckpointError(f"{path}: SDXL, it has a second text encoder: get an SD1.5 model")
    if (path / "transformer").exists():
        raise CheckpointError(f"{path}: a diffusion transformer (SD3, Flux or the like): get an SD1.5 model")
