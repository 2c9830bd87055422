"""config.json, in which diffusers and transformers keep what a network is: read, held to what is built here, written.

Every field has one of three fates. It sets a number of ours; or it repeats what the tensors' shapes say, and must
agree with them; or it switches something that is built in one way only, and must have that way's value. A field of no
known name is said in the log.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.checkpoint.container import CheckpointError
from ldm.checkpoint.foreign import read_json
from ldm.checkpoint.settings import PartConfig
from ldm.config import CLIPConfig, VAEConfig

logger = logging.getLogger(__name__)

# Fields of ours that no shape shows -> their names in config.json. `attention_head_dim` is the number of heads in
# SD1.5's files, whatever its name says (diffusers issue 2011).
SETTINGS: dict[str, dict[str, str]] = {
    "clip": {"heads": "num_attention_heads", "norm_eps": "layer_norm_eps"},
    "vae": {"norm_groups": "norm_num_groups", "scaling_factor": "scaling_factor"},
    "unet": {
        "sample_size": "sample_size",
        "transformer_depth": "transformer_layers_per_block",
        "heads": "attention_head_dim",
        "norm_groups": "norm_num_groups",
        "resnet_norm_eps": "norm_eps",
    },
}

# What is built in one way only -> the values that mean this way.
_FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "clip": {"hidden_act": ("quick_gelu",), "model_type": ("clip_text_model", "clip")},
    "vae": {
        "_class_name": ("AutoencoderKL",),
        "act_fn": ("silu", "swish"),
        "latents_mean": (None,),
        "latents_std": (None,),
        "mid_block_add_attention": (True,),
        "shift_factor": (None, 0),
        "use_post_quant_conv": (True,),
        "use_quant_conv": (True,),
    },
    "unet": {
        "_class_name": ("UNet2DConditionModel",),
        "act_fn": ("silu", "swish"),
        "addition_embed_type": (None,),
        "addition_time_embed_dim": (None,),
        "attention_type": ("default",),
        "center_input_sample": (False,),
        "class_embed_type": (None,),
        "class_embeddings_concat": (False,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "cross_attention_norm": (None,),
        "downsample_padding": (1,),
        "dual_cross_attention": (False,),
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "flip_sin_to_cos": (True,),
        "freq_shift": (0,),
        "mid_block_only_cross_attention": (None, False),
        "mid_block_scale_factor": (1,),
        "num_attention_heads": (None,),
        "num_class_embeds": (None,),
        "only_cross_attention": (False,),
        "projection_class_embeddings_input_dim": (None,),
        "resnet_out_scale_factor": (1,),
        "resnet_skip_time_act": (False,),
        "resnet_time_scale_shift": ("default",),
        "reverse_transformer_layers_per_block": (None,),
        "time_cond_proj_dim": (None,),
        "time_embedding_act_fn": (None,),
        "time_embedding_dim": (None,),
        "time_embedding_type": ("positional",),
        "timestep_post_act": (None,),
        "use_linear_projection": (False,),
    },
}

# What changes no image: sizes and dtypes that a user chooses, numbers of training, and of outputs not taken here.
# upcast_attention: scores are summed in float32 by every attention used here. force_upcast: the autoencoder runs in
# float32 whatever the U-Net does.
_OF_NO_EFFECT: dict[str, tuple[str, ...]] = {
    "clip": (
        "attention_dropout",
        "dropout",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "initializer_factor",
        "initializer_range",
        "projection_dim",
        "logit_scale_init_value",
        "torch_dtype",
        "dtype",
        "transformers_version",
        "architectures",
        "text_config",
        "text_config_dict",
        "vision_config",
        "vision_config_dict",
        "return_dict",
        "output_hidden_states",
        "output_attentions",
        "use_cache",
    ),
    "vae": ("force_upcast", "sample_size"),
    "unet": ("dropout", "upcast_attention", "addition_embed_type_num_heads"),
}

# What the tensors' shapes show too.
_SHOWN: dict[str, tuple[str, ...]] = {
    "clip": ("hidden_size", "intermediate_size", "max_position_embeddings", "num_hidden_layers", "vocab_size"),
    "vae": (
        "block_out_channels",
        "down_block_types",
        "in_channels",
        "latent_channels",
        "layers_per_block",
        "out_channels",
        "up_block_types",
    ),
    "unet": (
        "block_out_channels",
        "cross_attention_dim",
        "down_block_types",
        "in_channels",
        "layers_per_block",
        "mid_block_type",
        "out_channels",
        "up_block_types",
    ),
}

_MIDDLES = {"UNetMidBlock2DCrossAttn": True, "UNetMidBlock2D": False}


def settings_in(path: Path, part: str) -> dict[str, Any]:
    """What a folder's config.json tells beyond the shapes, by our names of fields; empty when there is no such file.

    Raises: CheckpointError when it is no JSON, or tells of a network that cannot be built here.
    """
    fields = _fields(path, part)
    for name, built in _FIXED[part].items():
        if name in fields and not any(_same(fields[name], value) for value in built):
            raise CheckpointError(
                f"{path}: {name} is {fields[name]!r}, SD1.5 has {built[0]!r} and only that is built here: get a model "
                "with it, or correct the field where it is wrong"
            )
    known = {*SETTINGS[part].values(), *_FIXED[part], *_OF_NO_EFFECT[part], *_SHOWN[part]}
    if unknown := sorted(name for name in fields if name not in known and not name.startswith("_")):
        logger.warning("%s: unknown fields, which change nothing here: %s", path, ", ".join(unknown))
    told = {ours: fields[theirs] for ours, theirs in SETTINGS[part].items() if fields.get(theirs) is not None}
    if part == "unet" and "mid_block_type" in fields:
        middle = fields["mid_block_type"]
        if not isinstance(middle, str) or middle not in _MIDDLES:
            raise CheckpointError(f"{path}: mid_block_type is {middle!r}, expected one of {', '.join(_MIDDLES)}")
        told["mid_attention"] = _MIDDLES[middle]
    return told


def require_agreement(path: Path, config: PartConfig) -> None:
    """Raises CheckpointError when config.json tells another size or kind of block than the tensors' shapes do."""
    part = "clip" if isinstance(config, CLIPConfig) else "vae" if isinstance(config, VAEConfig) else "unet"
    fields, ours = _fields(path, part), written(config)
    for name in _SHOWN[part]:
        expected = _uniform(json.loads(json.dumps(ours.get(name))))
        if fields.get(name) is not None and name in ours and fields[name] != expected:
            raise CheckpointError(
                f"{path}: {name} is {fields[name]!r}, its weights have {expected!r}: correct one of the two"
            )


def require_one_meaning(path: Path, from_json: Mapping[str, Any], from_metadata: Mapping[str, Any]) -> None:
    """Raises CheckpointError when a config.json and the metadata of the weights beside it tell different numbers."""
    for name, value in from_json.items():
        if name in from_metadata and from_metadata[name] != value:
            raise CheckpointError(
                f"{path}: {name} is {value!r} here and {from_metadata[name]!r} in the metadata of the weights beside "
                "it: they were edited apart, make them one (ldm convert writes both anew)"
            )


def _fields(path: Path, part: str) -> dict[str, Any]:
    fields = read_json(path)
    if part == "clip" and isinstance(fields.get("text_config"), dict):  # of a whole CLIP, texts and images
        fields = {**fields, **fields["text_config"]}
        fields.pop("model_type", None)
    return {name: _uniform(value) for name, value in fields.items()}


def _uniform(value: Any) -> Any:
    """[8, 8, 8, 8] is 8: diffusers takes a list with an entry for each level."""
    if isinstance(value, list) and value and len({*map(repr, value)}) == 1:
        return value[0]
    return value


def _same(value: Any, built: Any) -> bool:
    """Equal, and not merely so as True equals 1."""
    return bool(value == built) and isinstance(value, bool) == isinstance(built, bool)


def written(config: PartConfig) -> dict[str, Any]:
    """The fields of config.json for one network, in the words of diffusers and transformers."""
    if isinstance(config, CLIPConfig):
        fields: dict[str, Any] = {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            "hidden_act": "quick_gelu",
            "hidden_size": config.width,
            "intermediate_size": config.mlp_width,
            "layer_norm_eps": config.norm_eps,
            "max_position_embeddings": config.tokens,
            "num_attention_heads": config.heads,
            "num_hidden_layers": config.layers,
            "projection_dim": config.width,
            "vocab_size": config.vocabulary,
        }
    elif isinstance(config, VAEConfig):
        levels = len(config.widths)
        fields = {
            "_class_name": "AutoencoderKL",
            "act_fn": "silu",
            "block_out_channels": config.widths,
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "in_channels": config.image_channels,
            "latent_channels": config.latent_channels,
            "layers_per_block": config.resnets_per_level,
            "norm_num_groups": config.norm_groups,
            "out_channels": config.image_channels,
            "scaling_factor": config.scaling_factor,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
        }
    else:
        fields = {
            "_class_name": "UNet2DConditionModel",
            "act_fn": "silu",
            "attention_head_dim": config.heads,
            "block_out_channels": config.widths,
            "center_input_sample": False,
            "cross_attention_dim": config.context_width,
            "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in config.attention],
            "downsample_padding": 1,
            "flip_sin_to_cos": True,
            "freq_shift": 0,
            "in_channels": config.latent_channels,
            "layers_per_block": config.resnets_per_level,
            "mid_block_scale_factor": 1,
            "norm_eps": config.resnet_norm_eps,
            "norm_num_groups": config.norm_groups,
            "out_channels": config.latent_channels,
            "sample_size": config.sample_size,
            "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(config.attention)],
        }
        if config.transformer_depth > 1:
            fields["transformer_layers_per_block"] = config.transformer_depth
        if not config.mid_attention:
            fields["mid_block_type"] = "UNetMidBlock2D"
    return fields


def to_json(config: PartConfig) -> str:
    """config.json for one network."""
    return json.dumps(written(config), indent=2, sort_keys=True) + "\n"
