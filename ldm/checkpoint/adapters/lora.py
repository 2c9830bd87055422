"""LoRA: a change of low rank to each of some weights. [Hu et al. 2021]

    W' = W + weight * scale * up down,    scale = alpha / rank

up (out, r), down (r, in); of a convolution up is a 1x1 and down has the kernel. Each tool tells alpha in its own way:
kohya by a tensor beside each pair, diffusers (since 0.35) in the file's metadata, PEFT in adapter_config.json, where it
may be by module and divided by the root of the rank. Where nothing tells it, kohya's alpha is the rank, and diffusers'
the rank of the network's first module: the scale is 1 where all ranks are equal.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint.adapters import names
from ldm.checkpoint.container import CheckpointError, LazyTensor, TensorFile
from ldm.checkpoint.foreign import read_json, refuse_other_formats

PEFT_CONFIG = "adapter_config.json"
FOLDER_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
METADATA_KEY = "lora_adapter_metadata"  # diffusers'
_PARTS = {"unet": "unet", "text_encoder": "clip"}


@dataclass(frozen=True)
class LowRank:
    """The change of one weight. mid: (r, r, ...), between the two in convolutions that keep the kernel there."""

    down: LazyTensor
    up: LazyTensor
    mid: LazyTensor | None
    scale: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def delta(self, shape: tuple[int, ...]) -> Tensor:
        """scale * up down as float32, in the shape of the weight. Raises CheckpointError when it has not that many."""
        down, up = self.down.fetch(True).float(), self.up.fetch(True).float()
        if self.mid is not None:
            product = torch.einsum("or,rs...,si->oi...", up.flatten(1), self.mid.fetch(True).float(), down.flatten(1))
        else:
            product = up.flatten(1) @ down.flatten(1)
        return self.scale * product.reshape(shape)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether it is a change of a weight of this shape."""
        if self.mid is not None:
            kernel = self.mid.shape[2:]
            rows, columns = math.prod(self.up.shape[1:]), math.prod(self.down.shape[1:])
            found = (self.up.shape[0], columns, *kernel)
            return self.mid.shape[:2] == (rows, self.rank) and found == shape
        inner = math.prod(self.up.shape[1:]) == self.rank
        return inner and (self.up.shape[0], math.prod(self.down.shape[1:])) == (shape[0], math.prod(shape[1:]))


@dataclass(frozen=True)
class Lora:
    """One file of changes. changes: "unet" and "clip" -> the module's name in the file -> its change."""

    path: Path
    tool: str
    changes: Mapping[str, Mapping[str, LowRank]]

    def describe(self) -> str:
        """What it is, in a few words."""
        every = [change for part in self.changes.values() for change in part.values()]
        ranks, scales = sorted({change.rank for change in every}), sorted({round(change.scale, 6) for change in every})
        words = {"unet": "the U-Net", "clip": "the text encoder"}
        counts = {name: len(self.changes.get(name, {})) for name in words}
        where = " and ".join(f"{count} weights of {words[name]}" for name, count in counts.items() if count)
        return f"LoRA in {self.tool} names, {where}, rank {_range(ranks)}, scale {_range(scales)}"


def _range(values: list[Any]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"


def read_lora(path: str | Path) -> Lora:
    """Read the header of a LoRA: a file, or the folder that PEFT or diffusers writes.

    Raises: CheckpointError when it is another kind of adapter, of another model, or lacks half of a pair.
    """
    path = _file_of(Path(path))
    refuse_other_formats(path)
    file = TensorFile(path)
    stored = file.tensors()
    names.refuse_other_kinds(path, stored)
    placed = {name: names.place(name) for name in stored}
    if unknown := [name for name, where in placed.items() if where is None]:
        whole = "" if any(placed.values()) else ", it is no LoRA"
        raise CheckpointError(f"{path}: {len(unknown)} tensors are no part of a LoRA ({unknown[0]}){whole}")
    grouped: dict[str, dict[str, dict[str, LazyTensor]]] = {}
    for name, where in placed.items():
        assert where is not None
        roles = grouped.setdefault(where.part, {}).setdefault(where.module, {})
        if where.role in roles:
            raise CheckpointError(f"{path}: two tensors for one place, {roles[where.role].key} and {name}")
        roles[where.role] = stored[name]
    if not grouped:
        raise CheckpointError(f"{path}: no tensor in it")
    for modules in grouped.values():
        for roles in modules.values():
            _require_pair(path, roles)
    tool, settings = _tool_and_settings(file)
    if tool == "diffusers":
        settings = {part: settings.get(part) or {"lora_alpha": _first_rank(grouped[part])} for part in grouped}
    return Lora(
        path,
        tool,
        {
            part: {module: _low_rank(path, module, roles, settings.get(part)) for module, roles in modules.items()}
            for part, modules in grouped.items()
        },
    )


def _first_rank(modules: Mapping[str, Mapping[str, LazyTensor]]) -> int | None:
    """The rank of what diffusers comes to first: the U-Net's in the file's order, a text encoder's in running order."""
    projections = ("k_proj", "v_proj", "q_proj", "out_proj")
    first = next((roles for end in projections for name, roles in modules.items() if name.endswith(end)), None)
    shape = (first or next(iter(modules.values())))["down"].shape
    return shape[0] if shape else None


def _file_of(path: Path) -> Path:
    """The weights of a LoRA's folder; a file is itself."""
    if not path.is_dir():
        return path
    if found := [path / name for name in FOLDER_FILES if (path / name).exists()]:
        return found[0]
    pickled = sorted(entry.name for entry in path.glob("*.bin"))
    advice = f" ({pickled[0]} is a pickle, never read here)" if pickled else ""
    raise CheckpointError(f"{path}: none of {', '.join(FOLDER_FILES)} in this folder{advice}")


def _require_pair(path: Path, roles: Mapping[str, LazyTensor]) -> None:
    if "down" not in roles or "up" not in roles:
        there = next(iter(roles.values())).key
        raise CheckpointError(f"{path}: half of a pair, {there} without its other half: fetch the file again")
    down = roles["down"]
    if not down.shape or not down.shape[0]:
        raise CheckpointError(f"{path}: {down.key} has shape {down.shape}, expected (rank, inputs)")


def _low_rank(path: Path, module: str, roles: Mapping[str, LazyTensor], config: Mapping[str, Any] | None) -> LowRank:
    down, up = roles["down"], roles["up"]
    rank = down.shape[0]
    if "alpha" in roles:
        scale = _number(path, roles["alpha"]) / rank or 1.0  # kohya takes an alpha of 0 as none
    else:
        scale = _scale(path, module, rank, config) if config else 1.0
    return LowRank(down, up, roles.get("mid"), scale)


def _number(path: Path, tensor: LazyTensor) -> float:
    if math.prod(tensor.shape) != 1:
        raise CheckpointError(f"{path}: {tensor.key} has shape {tensor.shape}, expected one number")
    value = float(tensor.fetch(True).float())
    if not math.isfinite(value):
        raise CheckpointError(f"{path}: {tensor.key} is {value}: it was trained to no number, get another")
    return value


def _scale(path: Path, module: str, rank: int, config: Mapping[str, Any]) -> float:
    """PEFT's rule: alpha by module where alpha_pattern names it, over the rank or its root."""
    pattern = config.get("alpha_pattern") or {}
    if not isinstance(pattern, dict):
        raise CheckpointError(f"{path}: alpha_pattern is {pattern!r}, expected modules and their alphas")
    own = next((pattern[key] for key in pattern if module == key or module.endswith(f".{key}")), None)
    alpha = own if own is not None else config.get("lora_alpha", rank)
    if not isinstance(alpha, int | float):
        raise CheckpointError(f"{path}: lora_alpha is {alpha!r}, expected a number")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _tool_and_settings(file: TensorFile) -> tuple[str, dict[str, Mapping[str, Any]]]:
    """Who wrote it, and part -> the settings of PEFT where the file or its folder has them."""
    stored = list(file.header.entries)
    if any(name.startswith("base_model.model.") for name in stored):
        config = read_json(file.path.with_name(PEFT_CONFIG))
        if not config:
            raise CheckpointError(
                f"{file.path}: no {PEFT_CONFIG} beside it, which tells alpha: give PEFT's whole folder"
            )
        _refuse_other_settings(file.path, config)
        return "PEFT", {"unet": config, "clip": config}
    if any(name.startswith(("lora_unet_", "lora_te")) for name in stored):
        return "kohya", {}
    try:
        told = json.loads(file.header.metadata.get(METADATA_KEY, "{}"))
        fields = [key.split(".", 1) for key in dict(told) if "." in key]
        settings = {
            ours: {key: told[f"{front}.{key}"] for first, key in fields if first == front}
            for front, ours in _PARTS.items()
        }
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file.path}: its metadata {METADATA_KEY} is no configuration ({error})") from error
    for config in settings.values():
        _refuse_other_settings(file.path, config)
    return "diffusers", {part: config for part, config in settings.items() if config}


def _refuse_other_settings(path: Path, config: Mapping[str, Any]) -> None:
    """Raises CheckpointError for settings of PEFT under which its layers compute something else."""
    plain = {"peft_type": "LORA", "use_dora": False, "fan_in_fan_out": False, "bias": "none", "lora_bias": False}
    plain |= {"modules_to_save": None, "use_qalora": False}
    for name, value in plain.items():
        if config.get(name, value) not in (value, None, []):
            raise CheckpointError(f"{path}: {name} is {config[name]!r}, only {value!r} is read here: get a plain LoRA")
