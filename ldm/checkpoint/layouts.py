"""Two names for every weight: the single file's and ours, which are the diffusers folder's.

The single file (CompVis) numbers the U-Net's blocks in one row, counts the decoder's levels from the highest
resolution, and stores the autoencoder's attention weights as 1x1 convolutions. Each network has one table of prefixes
here, built for its depth and read in both directions; all that follows a prefix is the same in both layouts.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ldm.config import CLIPConfig, UNetConfig, VAEConfig

PARTS = ("clip", "vae", "unet")
SINGLE_PREFIXES = {
    "clip": "cond_stage_model.transformer.",
    "vae": "first_stage_model.",
    "unet": "model.diffusion_model.",
}
FOLDERS = {"clip": "text_encoder", "vae": "vae", "unet": "unet"}

EMA_PREFIX = "model_ema."

# What training left in files, what networks compute for themselves, and other models' tensors that travel with SD1.5's
# and that it does not use: no weights of its networks.
UNNEEDED = re.compile(
    # the schedule, and numbers of the training
    r"betas|(log_one_minus_|sqrt_|sqrt_one_minus_|sqrt_recip_|sqrt_recipm1_)?alphas_cumprod(_prev)?"
    r"|posterior_(variance|log_variance_clipped|mean_coef1|mean_coef2)|lvlb_weights|logvar|scale_factor"
    r"|epoch|iter|iteration|step|global_step|__index_timestep_zero__|v_pred|ztsnr"
    r"|model_ema\.(decay|num_updates)"
    # the text encoder's positions; the rest of CLIP, which compares texts with images
    r"|(cond_stage_model\.(transformer\.)?|text_encoder\.|(text_encoders\.)?clip_l\.(transformer\.)?)?"
    r"((text_model\.)?embeddings\.position_ids|logit_scale|text_projection(\.weight)?|visual_projection\.weight"
    r"|vision_model\..*)"
    # the autoencoder's discriminator and perceptual loss, and its own moving average
    r"|(first_stage_model\.)?(loss\..*|model_ema\.(decay|num_updates|(encoder|decoder|quant_conv|post_quant_conv).*))"
    # embeddings that came along with a model, the filter of images
    r"|bundle_emb\..*|embedding_manager\..*|safety_checker\..*"
)

Pairs = list[tuple[str, str]]  # (prefix in the single file, prefix in ours)

_RESNET = (
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
)


class Depth(NamedTuple):
    """All of a network's shape that its names depend on. attention: one a level, in the U-Net only."""

    levels: int
    resnets: int
    attention: tuple[bool, ...] = ()


def depth_of(config: CLIPConfig | UNetConfig | VAEConfig) -> Depth:
    if isinstance(config, CLIPConfig):
        return Depth(config.layers, 0)
    attention = config.attention if isinstance(config, UNetConfig) else ()
    return Depth(len(config.widths), config.resnets_per_level, attention)


def unet_depth(names: Iterable[str]) -> Depth:
    """The depth that a single file's U-Net names tell (without their prefix).

    input_blocks: 0 is the first convolution; each level then has its resnets and, but for the last, a downsampler.
    """
    modules = {".".join(name.split(".")[:4]) for name in names}
    blocks = max(1, 1 + _highest(modules, "input_blocks."))
    stride = next((i for i in range(1, blocks) if f"input_blocks.{i}.0.op" in modules), blocks)
    attention = tuple(f"input_blocks.{1 + first}.1.norm" in modules for first in range(0, blocks, stride))
    return Depth(len(attention), stride - 1, attention)


def vae_depth(names: Iterable[str]) -> Depth:
    """The depth that a single file's autoencoder names tell (without their prefix)."""
    names = list(names)
    return Depth(1 + _highest(names, "encoder.down."), 1 + _highest(names, "encoder.down.0.block."))


def _highest(names: Iterable[str], prefix: str) -> int:
    """The highest number that follows the prefix; -1 when there is none. Three digits, so that no name costs memory."""
    pattern = re.compile(re.escape(prefix) + r"(\d{1,3})\.")
    return max((int(found[1]) for name in names if (found := pattern.match(name))), default=-1)


def unet_table(depth: Depth) -> Pairs:
    last = depth.levels - 1
    pairs: Pairs = [
        ("time_embed.0", "time_embedding.linear_1"),
        ("time_embed.2", "time_embedding.linear_2"),
        ("input_blocks.0.0", "conv_in"),
        ("middle_block.1", "mid_block.attentions.0"),
        ("out.0", "conv_norm_out"),
        ("out.2", "conv_out"),
    ]

    def resnet(single: str, ours: str) -> None:
        pairs.extend((f"{single}.{a}", f"{ours}.{b}") for a, b in _RESNET)

    resnet("middle_block.0", "mid_block.resnets.0")
    resnet("middle_block.2", "mid_block.resnets.1")

    block = 1
    for level, attention in enumerate(depth.attention):
        for i in range(depth.resnets):
            resnet(f"input_blocks.{block}.0", f"down_blocks.{level}.resnets.{i}")
            if attention:
                pairs.append((f"input_blocks.{block}.1", f"down_blocks.{level}.attentions.{i}"))
            block += 1
        if level < last:
            pairs.append((f"input_blocks.{block}.0.op", f"down_blocks.{level}.downsamplers.0.conv"))
            block += 1

    block = 0
    for level, attention in enumerate(reversed(depth.attention)):
        for i in range(depth.resnets + 1):
            resnet(f"output_blocks.{block}.0", f"up_blocks.{level}.resnets.{i}")
            if attention:
                pairs.append((f"output_blocks.{block}.1", f"up_blocks.{level}.attentions.{i}"))
            block += 1
        if level < last:  # the upsampler shares the number of the level's last resnet, and comes after its attention
            place = 2 if attention else 1
            pairs.append((f"output_blocks.{block - 1}.{place}.conv", f"up_blocks.{level}.upsamplers.0.conv"))
    return pairs


def vae_table(depth: Depth) -> Pairs:
    pairs: Pairs = [("quant_conv", "quant_conv"), ("post_quant_conv", "post_quant_conv")]

    def resnet(single: str, ours: str) -> None:
        pairs.extend((f"{single}.{name}", f"{ours}.{name}") for name in ("norm1", "conv1", "norm2", "conv2"))
        pairs.append((f"{single}.nin_shortcut", f"{ours}.conv_shortcut"))

    for side in ("encoder", "decoder"):
        pairs += [
            (f"{side}.conv_in", f"{side}.conv_in"),
            (f"{side}.norm_out", f"{side}.conv_norm_out"),
            (f"{side}.conv_out", f"{side}.conv_out"),
        ]
        resnet(f"{side}.mid.block_1", f"{side}.mid_block.resnets.0")
        resnet(f"{side}.mid.block_2", f"{side}.mid_block.resnets.1")
        names = (("norm", "group_norm"), ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0"))
        pairs += [(f"{side}.mid.attn_1.{a}", f"{side}.mid_block.attentions.0.{b}") for a, b in names]

    for level in range(depth.levels):
        for i in range(depth.resnets):
            resnet(f"encoder.down.{level}.block.{i}", f"encoder.down_blocks.{level}.resnets.{i}")
        pairs.append((f"encoder.down.{level}.downsample", f"encoder.down_blocks.{level}.downsamplers.0"))
        up = depth.levels - 1 - level  # the single file counts from the highest resolution, ours in running order
        for i in range(depth.resnets + 1):
            resnet(f"decoder.up.{level}.block.{i}", f"decoder.up_blocks.{up}.resnets.{i}")
        pairs.append((f"decoder.up.{level}.upsample", f"decoder.up_blocks.{up}.upsamplers.0"))
    return pairs


CLIP_TABLE: Pairs = [("text_model", "text_model")]

# The autoencoder's attention in folders published before diffusers 0.18, and today's names.
OLD_VAE_NAMES: Pairs = [
    (f"{side}.mid_block.attentions.0.{old}", f"{side}.mid_block.attentions.0.{new}")
    for side in ("encoder", "decoder")
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
]


def rename(name: str, table: Mapping[str, str]) -> str | None:
    """`name` with the longest of its prefixes in the table replaced; None when the table has none of them.

    Prefixes end at a dot: "out.0" is one of "out.0.weight", not of "out.01.weight".
    """
    prefix = name
    while prefix not in table:
        prefix, dot, _ = prefix.rpartition(".")
        if not dot:
            return None
    return table[prefix] + name[len(prefix) :]


def from_single(part: str, names: Iterable[str]) -> dict[str, str | None]:
    """One part's names in a single file (without their prefix) -> ours; None for a name that is not SD1.5's."""
    names = list(names)
    if part == "unet":
        table = dict(unet_table(unet_depth(names)))
    elif part == "vae":
        table = dict(vae_table(vae_depth(names)))
    else:
        table = dict(CLIP_TABLE)
    return {name: rename(name, table) for name in names}


def to_single(part: str, names: Iterable[str], depth: Depth) -> dict[str, str]:
    """Our names of one part -> the single file's, with their prefix. depth: as `depth_of` gives it.

    Raises: KeyError for a name that the network of this depth does not have.
    """
    pairs = {"unet": unet_table, "vae": vae_table, "clip": lambda depth: CLIP_TABLE}[part](depth)
    table = {ours: single for single, ours in pairs}
    renamed = {name: rename(name, table) for name in names}
    if unknown := [name for name, single in renamed.items() if single is None]:
        raise KeyError(f"{part}: {unknown[0]} is no name of this network")
    return {name: SINGLE_PREFIXES[part] + single for name, single in renamed.items() if single is not None}


def ema_key(single_name: str) -> str:
    """Where the full single file keeps the moving average of a U-Net weight: its name after `model.`, without dots."""
    return EMA_PREFIX + single_name.removeprefix("model.").replace(".", "")


# The words of a U-Net's names in the single file. Of two numbers in a row the second has one digit.
_EMA_WORDS = re.compile(
    r"diffusion_model|(?:input|output)_blocks\d+(?=\d)|middle_block|time_embed|transformer_blocks\d+|skip_connection"
    r"|(?:in|emb|out)_layers|proj_in|proj_out|attn[12]|to_[qkv]|to_out|norm\d?|ff|net|proj|conv|out|op|weight|bias|\d"
)


def from_ema_key(key: str) -> str | None:
    """The inverse of `ema_key`; None for a name that is not made of a U-Net's words."""
    words = _EMA_WORDS.findall(key.removeprefix(EMA_PREFIX))
    dotted = ".".join(re.sub(r"(?<=blocks)(\d+)", r".\1", word) for word in words)
    single = f"model.{dotted}"
    return single if words[:1] == ["diffusion_model"] and ema_key(single) == key else None


def is_vae_attention_weight(name: str) -> bool:
    """Whether the single file stores this weight (ours: (C, C)) as a 1x1 convolution (C, C, 1, 1).

    Weights only: a reshaped bias is what diffusers' issue 6226 was about.
    """
    return ".mid_block.attentions.0.to_" in name and name.endswith(".weight")
