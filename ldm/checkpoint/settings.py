"""From tensors to a configuration.

Widths and depths show in the tensors' shapes. Numbers of heads, groups of the norms, epsilons and sizes of images do
not: they are SD1.5's unless the checkpoint carries them, as metadata (our own files) or in config.json (folders).
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from ldm.checkpoint.container import CheckpointError
from ldm.config import SD15, CLIPConfig, UNetConfig, VAEConfig

PartConfig = CLIPConfig | VAEConfig | UNetConfig
Shapes = Mapping[str, tuple[int, ...]]  # our names -> shapes

# The fields that no shape shows; all others are told from the tensors.
HIDDEN_FIELDS = {
    "clip": ("heads", "norm_eps"),
    "vae": ("norm_groups", "scaling_factor", "norm_eps"),
    "unet": (
        "sample_size",
        "mid_attention",
        "transformer_depth",
        "heads",
        "norm_groups",
        "resnet_norm_eps",
        "transformer_norm_eps",
        "layer_norm_eps",
    ),
}


def infer_config(part: str, shapes: Shapes, hidden: Mapping[str, Any] | None = None) -> PartConfig:
    """The configuration of one network.

    Args:    part: "clip", "vae" or "unet".  shapes: our names -> shapes; where a telling tensor is missing or damaged,
             SD1.5's number is taken, so that the report can say what is wrong.
             hidden: what shapes do not show, such as {"heads": 4}; other fields in it are ignored.
    Raises:  ValueError: when the numbers do not go together.
    """
    hidden = {name: value for name, value in (hidden or {}).items() if name in HIDDEN_FIELDS[part]}
    if wrong := [f"{name} = {value!r}" for name, value in hidden.items() if not isinstance(value, int | float)]:
        raise CheckpointError(f"{part}: {', '.join(wrong)}, expected one number as in SD1.5")
    if part == "clip":
        return _infer_clip(shapes, hidden)
    return _infer_vae(shapes, hidden) if part == "vae" else _infer_unet(shapes, hidden)


def _infer_clip(shapes: Shapes, hidden: Mapping[str, Any]) -> CLIPConfig:
    vocabulary = _size(shapes, "text_model.embeddings.token_embedding.weight", 0, SD15.clip.vocabulary)
    width = _size(shapes, "text_model.embeddings.token_embedding.weight", 1, SD15.clip.width)
    tokens = _size(shapes, "text_model.embeddings.position_embedding.weight", 0, SD15.clip.tokens)
    mlp_width = _size(shapes, "text_model.encoder.layers.0.mlp.fc1.weight", 0, 4 * width)
    layers = _count(shapes, "text_model.encoder.layers.{}.") or SD15.clip.layers
    config = CLIPConfig(vocabulary, tokens, width, layers, heads=max(1, width // 64), mlp_width=mlp_width)
    return replace(config, **hidden)


def _infer_vae(shapes: Shapes, hidden: Mapping[str, Any]) -> VAEConfig:
    widths = _widths(shapes, "encoder.down_blocks.{}.") or SD15.vae.widths
    latent_channels = _size(shapes, "decoder.conv_in.weight", 1, SD15.vae.latent_channels)
    image_channels = _size(shapes, "encoder.conv_in.weight", 1, SD15.vae.image_channels)
    resnets = _count(shapes, "encoder.down_blocks.0.resnets.{}.") or SD15.vae.resnets_per_level
    return replace(VAEConfig(image_channels, latent_channels, widths, resnets), **hidden)


def _infer_unet(shapes: Shapes, hidden: Mapping[str, Any]) -> UNetConfig:
    widths = _widths(shapes, "down_blocks.{}.") or SD15.unet.widths
    contexts = [_size(shapes, name, 1, 0) for name in shapes if name.endswith(".attn2.to_k.weight")]
    return UNetConfig(
        latent_channels=_size(shapes, "conv_in.weight", 1, SD15.unet.latent_channels),
        widths=widths,
        resnets_per_level=_count(shapes, "down_blocks.0.resnets.{}.") or SD15.unet.resnets_per_level,
        attention=tuple(_count(shapes, f"down_blocks.{i}.attentions.{{}}.") > 0 for i in range(len(widths))),
        context_width=next(filter(None, contexts), SD15.unet.context_width),
        **hidden,
    )


def _size(shapes: Shapes, name: str, axis: int, default: int) -> int:
    """One size of a tensor; the default where the tensor is missing, empty or has no such axis."""
    shape = shapes.get(name, ())
    return shape[axis] if axis < len(shape) and 0 not in shape else default


def _count(shapes: Shapes, pattern: str) -> int:
    """How many of pattern.format(0), pattern.format(1), .. begin a name."""
    count = 0
    while any(name.startswith(pattern.format(count)) for name in shapes):
        count += 1
    return count


def _widths(shapes: Shapes, level: str) -> tuple[int, ...]:
    levels = range(_count(shapes, level))
    return tuple(_size(shapes, f"{level.format(i)}resnets.0.conv1.weight", 0, 320) for i in levels)


def hidden_from_metadata(metadata: Mapping[str, str], key: str) -> dict[str, dict[str, Any]]:
    """What our own files tell: a JSON of {part: {field: value}} under `key` of the file's metadata."""
    try:
        fields = json.loads(metadata.get(key, "{}"))
        return {part: dict(values) for part, values in fields.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"its metadata {key!r} is no configuration ({error})") from error


def config_to_metadata(configs: Mapping[str, PartConfig]) -> str:
    """The inverse of `hidden_from_metadata`."""
    return json.dumps({part: asdict(config) for part, config in sorted(configs.items())}, separators=(",", ":"))
