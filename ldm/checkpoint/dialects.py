"""Whose names are these? Every tensor of a file put in its network, whatever wrapper, prefix or layout it was saved in.

    stored name -> without wrappers -> network and what follows its prefix -> our name

The layouts are tables in `layouts`; here they are told apart.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from ldm.checkpoint import layouts
from ldm.checkpoint.container import CheckpointError, LazyTensor
from ldm.checkpoint.quantised import dequantised

Dialect = Literal["single", "folder"]  # CompVis names or ours, which are the folder's

# What compilers and data-parallel wrappers put among the names: anywhere, or in front of them all.
_WRAPPERS_INSIDE = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_WRAPPERS_IN_FRONT = ("module.", "model.", "state_dict.", "ema_model.")

# What stands in front of a network's names in a file that holds several. The first match wins.
PREFIXES = {
    "cond_stage_model.transformer.": "clip",
    "text_encoders.clip_l.transformer.": "clip",
    "clip_l.transformer.": "clip",
    "text_encoder.": "clip",
    "first_stage_model.": "vae",
    "vae.": "vae",
    "model.diffusion_model.": "unet",
    "diffusion_model.": "unet",
    "unet.": "unet",
}

# What a network's names begin with after their prefix, or when nothing stands in front of them.
_MARKS: tuple[tuple[str, Dialect, str], ...] = (
    ("unet", "single", r"(input_blocks|middle_block|output_blocks|time_embed)\."),
    ("unet", "folder", r"(down_blocks|mid_block|up_blocks|time_embedding)\."),
    ("vae", "single", r"(encoder|decoder)\.(mid|down|up)\."),
    ("vae", "folder", r"(encoder|decoder)\.(mid_block|down_blocks|up_blocks)\."),
    ("clip", "folder", r"(text_model\.)?(embeddings\.(token|position)_embedding|encoder\.layers|final_layer_norm)\."),
)

Tensors = dict[str, LazyTensor]


@dataclass(frozen=True)
class Sorted:
    """A file's tensors by network, unread.

    parts: "clip", "vae", "unet", "unet_ema" -> our names -> tensors. Names that are not SD1.5's are among them where
    the file is one network's own.  rest: names without wrappers -> what no network holds.
    several: whether prefixes told networks apart, as in a single file.
    single_names: whether any network has CompVis names.  old_vae_names: see `layouts.OLD_VAE_NAMES`.
    ema_only: whether "unet" is the moving average, and the trained weights are not there.
    scales: the stored names of scales that quantised weights were multiplied with.
    """

    parts: Mapping[str, Mapping[str, LazyTensor]]
    rest: Mapping[str, LazyTensor]
    several: bool = False
    single_names: bool = False
    old_vae_names: bool = False
    ema_only: bool = False
    scales: tuple[str, ...] = ()


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """Stored names -> the same without what wrappers added.

    Raises: CheckpointError when two names become one.
    """
    plain = {name: _WRAPPERS_INSIDE.sub("", name) for name in names}
    while wrapper := next((front for front in _WRAPPERS_IN_FRONT if _wraps(front, plain.values())), None):
        plain = {name: short.removeprefix(wrapper) for name, short in plain.items()}
    seen: dict[str, str] = {}
    for name, short in plain.items():
        if (first := seen.setdefault(short, name)) != name:
            raise CheckpointError(f"holds two tensors of one name, {first} and {name}: keep one of them")
    return plain


def _wraps(front: str, names: Iterable[str]) -> bool:
    """Whether all names begin with it, and it is no part of a network's own prefix."""
    names = list(names)
    known = (*PREFIXES, layouts.EMA_PREFIX)
    return bool(names) and all(name.startswith(front) and not name.startswith(known) for name in names)


def sort_tensors(stored: Mapping[str, LazyTensor], part: str | None = None) -> Sorted:
    """Put the tensors of one file in their networks.

    part: the network that the file must hold, from the folder that it lies in; None: told from the names.
    Raises: CheckpointError when two names become one.
    """
    tensors = {short: stored[name] for name, short in unwrapped(stored).items()}
    groups, averages = ({}, {}) if part else (_by_prefix(tensors), _averages(tensors))
    ema_only = bool(averages) and "unet" not in groups
    if ema_only:
        groups["unet"] = averages
    several = bool(groups)
    if not several and (alone := part or _network_of(tensors)):
        groups = {alone: {name: name for name in tensors}}

    parts: dict[str, Tensors] = {}
    placed: set[str] = set()
    scales: list[str] = []
    single_names = old_vae_names = False
    for network, names in groups.items():
        local, used = dequantised({name: tensors[full] for name, full in names.items()})
        scales += [local_scale.key for local_scale in used.values()]
        placed |= {names[name] for name in used}
        renamed, dialect = _our_names(network, local)
        single_names |= dialect == "single"
        old_vae_names |= network == "vae" and dialect == "folder" and any(n != ours for n, ours in renamed.items())
        known = {name: ours or name for name, ours in renamed.items() if ours or not (several or _unneeded(name))}
        parts[network] = {ours: _as_ours(ours, local[name]) for name, ours in known.items()}
        placed |= {names[name] for name in known}
        if network == "unet" and not ema_only:
            keys = {ours: layouts.ema_key(layouts.SINGLE_PREFIXES["unet"] + name) for name, ours in known.items()}
            parts["unet_ema"] = {ours: tensors[key] for ours, key in keys.items() if key in tensors}
            placed |= {key for key in keys.values() if key in tensors}
    rest = {name: tensor for name, tensor in tensors.items() if name not in placed}
    parts = {network: named for network, named in parts.items() if named}
    return Sorted(parts, rest, several, single_names, old_vae_names, ema_only, tuple(scales))


def _by_prefix(tensors: Tensors) -> dict[str, dict[str, str]]:
    """Network -> what follows the prefix -> the whole name."""
    groups: dict[str, dict[str, str]] = {}
    for name in tensors:
        if prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), None):
            groups.setdefault(PREFIXES[prefix], {}).setdefault(name.removeprefix(prefix), name)
    return groups


def _averages(tensors: Tensors) -> dict[str, str]:
    """The U-Net's moving average: its single-file names without prefix -> the names without dots."""
    singles = {name: layouts.from_ema_key(name) for name in tensors if name.startswith(layouts.EMA_PREFIX)}
    prefix = layouts.SINGLE_PREFIXES["unet"]
    return {single.removeprefix(prefix): name for name, single in singles.items() if single is not None}


def _network_of(names: Iterable[str]) -> str | None:
    """The network that a file without prefixes holds; None when no name tells."""
    names = list(names)
    return next((part for part, _, mark in _MARKS if any(re.match(mark, name) for name in names)), None)


def _our_names(part: str, names: Iterable[str]) -> tuple[dict[str, str | None], Dialect]:
    """One network's names after their prefix -> ours, None where no network has them; and what layout they are in."""
    names = list(names)
    if part == "clip":
        roots = ("embeddings.", "encoder.", "final_layer_norm.")
        return {n: f"text_model.{n}" if n.startswith(roots) else n if _is_text(n) else None for n in names}, "folder"
    marks = ((dialect, mark) for network, dialect, mark in _MARKS if network == part)
    dialect: Dialect = next((d for d, mark in marks if any(re.match(mark, name) for name in names)), "folder")
    if dialect == "single":
        return layouts.from_single(part, names), dialect
    to_new = dict(layouts.OLD_VAE_NAMES) if part == "vae" else {}
    return {name: None if _unneeded(name) else layouts.rename(name, to_new) or name for name in names}, dialect


def _unneeded(name: str) -> bool:
    return layouts.UNNEEDED.fullmatch(name) is not None


def _is_text(name: str) -> bool:
    return name.startswith("text_model.")


def _as_ours(name: str, tensor: LazyTensor) -> LazyTensor:
    """The autoencoder's attention weights as matrices: (C, C, 1, 1) -> (C, C)."""
    if layouts.is_vae_attention_weight(name) and tensor.shape[2:] == (1, 1):
        return tensor.reshaped(tensor.shape[:2])
    return tensor
