"""Refusals: what a path may hold instead of an SD1.5 model, each named in one line that says what to do."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.checkpoint.container import CheckpointError

PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")

_GET = "get the .safetensors version"

# Files of other formats, by the ends of their names.
_SUFFIXES = {
    ".onnx": f"an ONNX graph: {_GET}",
    ".gguf": f"a GGUF file: {_GET}",
    ".msgpack": f"Flax weights: {_GET}",
    ".h5": f"an HDF5 file: {_GET}",
    ".npz": f"a NumPy archive: {_GET}",
    ".engine": f"a TensorRT engine: {_GET}",
    ".plan": f"a TensorRT engine: {_GET}",
    ".zip": "an archive: unpack it first",
    ".tar": "an archive: unpack it first",
    ".gz": "an archive: unpack it first",
    ".7z": "an archive: unpack it first",
    ".partial": "a download that is not finished: fetch it again",
    ".incomplete": "a download that is not finished: fetch it again",
    ".crdownload": "a download that is not finished: fetch it again",
}

# First bytes of files that are taken for weights.
_FORMATS = (
    (
        rb"version https://git-lfs",
        "a Git LFS pointer, not the weights themselves: run `git lfs pull`, or fetch the file",
    ),
    (rb"\s*<(!doctype|html|\?xml)", "a web page, not weights: the download was answered with an error or a login page"),
    (rb"PK\x03\x04|\x80[\x02-\x05]", "a pickle: never read here, since it can run code; get its .safetensors version"),
    (rb"GGUF", f"a GGUF file: {_GET}"),
    (rb"\x89HDF", f"an HDF5 file: {_GET}"),
    (rb"\x08[\x01-\x10]\x12.[\x20-\x7e]{3}", f"an ONNX graph: {_GET}"),
    (rb"\x1f\x8b|7z\xbc\xaf|Rar!", "an archive: unpack it first"),
    (rb"\x89PNG|\xff\xd8\xff|RIFF....WEBP", "an image, not weights"),
    (rb"[\x20-\x7e\t\r\n]{16,}", "a text file, not weights"),
)

_WHOLE_MODEL = "only whole SD1.5 models, and networks of theirs, are read here"
_LORA = "changes to a model and no model: give it as --lora FILE beside the model's --weights"
_EMBEDDING = "a textual inversion embedding, a word and no model: give it as --embedding FILE beside --weights"

# Names that only other models have. The first match wins: a LoRA of SDXL is refused as a LoRA.
_MODELS = (
    (r"^(image_proj|ip_adapter)\.|to_[kv]_ip\.", f"an IP-Adapter: {_WHOLE_MODEL}"),
    (
        r"\.(hada_w|lokr_w|oft_|boft_|glora)",
        "a LyCORIS adapter (LoHa, LoKr or the like): not read here; get a plain LoRA",
    ),
    (r"lora[_.]", f"a LoRA, {_LORA}, or merge it (ldm convert --lora)"),
    (r"^control_model\.|controlnet_|zero_convs|input_hint_block|^lllite_", f"a ControlNet: {_WHOLE_MODEL}"),
    (r"motion_modules|temporal_transformer", f"a motion module: {_WHOLE_MODEL}"),
    (
        r"(^|\.)body\.\d+\.(resnets\.\d+\.)?(block[12]|in_conv|down_opt)\.",
        f"a T2I-Adapter: {_WHOLE_MODEL}",
    ),
    (r"rdb1\.conv1|RDB1\.conv1", f"an upscaler of images (ESRGAN): {_WHOLE_MODEL}"),
    (r"^(emb_params|string_to_param\b.*)$", _EMBEDDING),
    (r"^clip_g$", "an embedding for SDXL, another architecture: get one for SD1.5"),
    (
        r"conditioner\.embedders\.|label_emb\.|^(unet\.)?add_embedding\.",
        "SDXL, another architecture: get an SD1.5 model",
    ),
    (
        r"^(model\.diffusion_model\.|model\.|unet\.)?(joint_blocks|double_blocks|single_blocks|transformer_blocks"
        r"|single_transformer|x_embedder|adaln_single|double_stream)",
        "a diffusion transformer (SD3, Flux or the like), another architecture: get an SD1.5 model",
    ),
    (r"^(encoder\.block\.\d+\.layer\.|shared\.weight$)", "a T5 text encoder, of SD3 or Flux: get an SD1.5 model"),
    (r"^cond_stage_model\.model\.", "SD2, whose text encoder is another: get an SD1.5 model"),
    (
        r"^(transformer\.resblocks|visual\.transformer|visual\.conv1)\.",
        "a CLIP model in OpenAI's or open_clip's names: get the text encoder of an SD1.5 folder",
    ),
    (
        r"time_embedding\.cond_proj\.|time_embed_cond|guidance_embed",
        "an LCM or other distilled U-Net, which takes the guidance scale as an input: get a plain SD1.5 model",
    ),
    (r"^(encoder|decoder)\.layers\.\d+\.(weight|conv\.)|^taesd_", f"a tiny autoencoder (TAESD): {_WHOLE_MODEL}"),
    (r"^concept_embeds(_weights)?$", f"the safety checker: {_WHOLE_MODEL}"),
    (
        r"\.(absmax|quant_map|SCB|qweight|qzeros)$|quant_state",
        "a model quantised to 4 or 8 bit integers: get it in fp16",
    ),
)

_CONTEXT_WIDTHS = {1024: "SD2", 1280: "SDXL's refiner", 2048: "SDXL"}
_TEXT_WIDTHS = {1024: "the text encoder of SD2", 1280: "the second text encoder of SDXL or SD3"}
_EXTRA_INPUTS = {9: "an inpainting model", 8: "an InstructPix2Pix model", 5: "a depth model", 7: "an upscaler"}

# What a config.json may call itself, and model_index.json's folders, beside SD1.5's.
_CLASSES = {
    "ControlNet": f"a ControlNet: {_WHOLE_MODEL}",
    "MotionAdapter": f"a motion module: {_WHOLE_MODEL}",
    "UNetMotionModel": f"a U-Net with motion modules: {_WHOLE_MODEL}",
    "T2IAdapter": f"a T2I-Adapter: {_WHOLE_MODEL}",
    "MultiAdapter": f"a T2I-Adapter: {_WHOLE_MODEL}",
    "AutoencoderTiny": f"a tiny autoencoder (TAESD): {_WHOLE_MODEL}",
    "Transformer2D": "a diffusion transformer, another architecture: get an SD1.5 model",
    "Prior": "a prior of Kandinsky or unCLIP, another architecture: get an SD1.5 model",
    "SafetyChecker": f"the safety checker: {_WHOLE_MODEL}",
    "CLIPVision": f"an encoder of images: {_WHOLE_MODEL}",
    "T5Encoder": "a T5 text encoder, of SD3 or Flux: get an SD1.5 model",
}
_SUBFOLDERS = {
    "text_encoder_2": "SDXL, it has a second text encoder: get an SD1.5 model",
    "transformer": "a diffusion transformer (SD3, Flux or the like): get an SD1.5 model",
    "prior": "a pipeline with a prior (Kandinsky, Cascade), another architecture: get an SD1.5 model",
    "controlnet": "a pipeline with a ControlNet, which is not read here: get the model without it",
    "motion_adapter": "a pipeline with motion modules, which are not read here: get the model without them",
    "adapter": "a pipeline with a T2I-Adapter, which is not read here: get the model without it",
}


def refuse_other_formats(path: Path) -> None:
    """Raises CheckpointError when there is no file, or one of another format than safetensors."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: empty, 0 bytes: fetch it again")
    with path.open("rb") as file:
        first_bytes = file.read(256)
    suffix = path.suffix.lower()
    if suffix in PICKLE_SUFFIXES:
        raise CheckpointError(
            f"{path}: a {path.suffix} file is a pickle: never read here, since it can run code; "
            "get its .safetensors version"
        )
    if suffix in _SUFFIXES:
        raise CheckpointError(f"{path}: {_SUFFIXES[suffix]}")
    for pattern, what in _FORMATS:
        if re.match(pattern, first_bytes, re.IGNORECASE | re.DOTALL):
            raise CheckpointError(f"{path}: {what}")


def refuse_other_models(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises CheckpointError when the tensors' names and shapes are those of another model than SD1.5's."""
    names = "\n".join(shapes)
    for pattern, what in _MODELS:
        if re.search(pattern, names, re.MULTILINE):
            raise CheckpointError(f"{path}: {what}")
    if is_embedding(shapes):
        raise CheckpointError(f"{path}: {_EMBEDDING}")
    if "vision_model." in names and "text_model." not in names and "unet" not in names and "diffusion" not in names:
        raise CheckpointError(f"{path}: an encoder of images: {_WHOLE_MODEL}")
    _refuse_other_widths(path, shapes)
    _refuse_other_inputs(path, shapes)


def is_embedding(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether all that a file holds is a few vectors under words: a textual inversion as diffusers writes it."""
    return 0 < len(shapes) <= 64 and all(
        "." not in name and len(shape) in (1, 2) and shape[-1] in (768, 1024, 1280) for name, shape in shapes.items()
    )


def _refuse_other_widths(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    quantises = any(name.endswith("quant_conv.weight") for name in shapes)  # which those of SD3 and Flux left out
    for name, shape in shapes.items():
        width = shape[-1] if shape else 0
        if name.endswith(".attn2.to_k.weight") and width in _CONTEXT_WIDTHS:
            raise CheckpointError(
                f"{path}: {_CONTEXT_WIDTHS[width]}, its contexts are {width} wide and SD1.5's 768: get an SD1.5 model"
            )
        if name.endswith("embeddings.token_embedding.weight") and width in _TEXT_WIDTHS:
            raise CheckpointError(f"{path}: {_TEXT_WIDTHS[width]}, {width} wide and SD1.5's 768: get an SD1.5 model")
        if name.endswith("decoder.conv_in.weight") and len(shape) == 4 and shape[1] == 16 and not quantises:
            raise CheckpointError(f"{path}: the autoencoder of SD3 or Flux, 16 latent channels and SD1.5's 4")
        if re.search(r"(attentions\.\d+|blocks\.\d+\.1|middle_block\.1)\.proj_in\.weight$", name) and len(shape) == 2:
            raise CheckpointError(
                f"{path}: a U-Net with linear projections (use_linear_projection), as SD2 has; SD1.5's are "
                "convolutions: get an SD1.5 model"
            )


def _refuse_other_inputs(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    fronts = ("model.diffusion_model.", "diffusion_model.", "unet.", "")
    ends = (("input_blocks.0.0", "out.2"), ("conv_in", "conv_out"))
    for prefix, (first, last) in ((prefix, pair) for prefix in fronts for pair in ends):
        first_shape, last_shape = shapes.get(f"{prefix}{first}.weight", ()), shapes.get(f"{prefix}{last}.weight", ())
        if len(first_shape) == len(last_shape) == 4 and first_shape[1] != last_shape[0]:
            what = _EXTRA_INPUTS.get(first_shape[1], "another model")
            raise CheckpointError(
                f"{path}: {what}, its U-Net takes {first_shape[1]} channels to predict {last_shape[0]}: "
                "get a plain SD1.5 model, which takes as many as it predicts"
            )


def refuse_other_folders(path: Path) -> None:
    """Raises CheckpointError when a folder holds another pipeline's parts, or something else than a model."""
    for subfolder, what in _SUBFOLDERS.items():
        if (path / subfolder).exists():
            raise CheckpointError(f"{path}: {what}")
    if (path / "adapter_config.json").exists():
        raise CheckpointError(f"{path}: a PEFT adapter, {_LORA}")
    if list(path.glob("*lora_weights.safetensors")):
        raise CheckpointError(f"{path}: a LoRA, {_LORA}")
    if list(path.glob("learned_embeds*.safetensors")):
        raise CheckpointError(f"{path}: {_EMBEDDING}")
    if any(list(path.glob(pattern)) for pattern in ("*.onnx", "unet/*.onnx", "*/model.onnx")):
        raise CheckpointError(f"{path}: an ONNX pipeline: {_GET}")
    if any(list(path.glob(pattern)) for pattern in ("*.mlpackage", "*.mlmodelc", "*/*.mlpackage", "*/*.mlmodelc")):
        raise CheckpointError(f"{path}: a Core ML pipeline: {_GET}")
    if (path / "scheduler_config.json").exists():
        raise CheckpointError(f"{path}: settings of a scheduler and no weights: give the folder above it")
    if (path / "vocab.json").exists() and not list(path.glob("*.safetensors")):
        raise CheckpointError(f"{path}: a tokenizer and no weights: give the folder above it")


def refuse_other_classes(path: Path, fields: Mapping[str, Any]) -> None:
    """Raises CheckpointError when a config.json says that it belongs to another network than SD1.5's three."""
    several = fields.get("architectures")
    names = [str(fields.get("_class_name") or ""), *(map(str, several) if isinstance(several, list) else ())]
    for name in names:
        for pattern, what in _CLASSES.items():
            if pattern in name:
                raise CheckpointError(f"{path}: {what}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty when there is no such file. Raises CheckpointError when it is no such object."""
    if not path.exists():
        return {}
    try:
        fields = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a configuration ({error})") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: not a configuration (a {type(fields).__name__}, expected names and values)")
    return fields
