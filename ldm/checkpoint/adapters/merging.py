"""A checkpoint with adapters: the same tensors, some of them changed as they are read."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ldm.checkpoint.adapters.embedding import add_embeddings
from ldm.checkpoint.adapters.lora import Lora, LowRank, read_lora
from ldm.checkpoint.adapters.names import module_table
from ldm.checkpoint.container import CheckpointError, LazyTensor, sha256
from ldm.checkpoint.identification import PART_NAMES, Checkpoint

logger = logging.getLogger(__name__)


def adapted(
    checkpoint: Checkpoint, loras: Sequence[tuple[str | Path, float]] = (), embeddings: Sequence[str | Path] = ()
) -> Checkpoint:
    """A checkpoint with LoRA files merged, each at its weight, and the words of embeddings added.

    Raises: CheckpointError when one of them is of another kind or for another model.
    """
    for path, weight in loras:
        lora = read_lora(path)
        logger.info("%s: %s, at weight %g", path, lora.describe(), weight)
        checkpoint = merge_lora(checkpoint, lora, weight)
    return add_embeddings(checkpoint, embeddings)


def adapter_lines(loras: Sequence[tuple[str | Path, float]], embeddings: Sequence[str | Path]) -> tuple[str, ...]:
    """What was merged and added, for records: "hash  name:weight" and "hash  name", in the order of merging."""
    merged = [f"{sha256(read_lora(path).path)}  {Path(path).name}:{weight:g}" for path, weight in loras]
    return (*merged, *(f"{sha256(path)}  {Path(path).name}" for path in embeddings))


def merge_lora(checkpoint: Checkpoint, lora: Lora, weight: float = 1.0) -> Checkpoint:
    """W + weight * change for each weight that it changes, in both sets of U-Net weights where there are two.

    Raises: CheckpointError when the checkpoint lacks a network, a module or the shape that a change is for.
    """
    parts = dict(checkpoint.parts)
    for part, changes in lora.changes.items():
        if part not in parts:
            raise CheckpointError(f"{lora.path}: changes the {PART_NAMES[part]}, which {checkpoint.path} does not have")
        for own in (part, f"{part}_ema"):
            if own in parts:
                parts[own] = _merged_part(lora.path, part, parts[own], changes, weight)
    return replace(checkpoint, parts=parts)


def _merged_part(
    path: Path, part: str, tensors: Mapping[str, LazyTensor], changes: Mapping[str, LowRank], weight: float
) -> dict[str, LazyTensor]:
    table, merged = module_table(part, tensors), dict(tensors)
    if unknown := [module for module in changes if module not in table]:
        raise CheckpointError(
            f"{path}: {len(unknown)} of {len(changes)} of its modules are none of this {PART_NAMES[part]}'s "
            f"({unknown[0]}): it is for another model"
        )
    for module, change in changes.items():
        name = f"{table[module]}.weight"
        tensor = tensors[name]
        if not change.fits(tensor.shape):
            raise CheckpointError(
                f"{path}: {module} has up {change.up.shape} and down {change.down.shape}, the weight {tensor.shape}: "
                "it is for another model"
            )
        merged[name] = _changed(merged[name], change, weight)
    return merged


def _changed(tensor: LazyTensor, change: LowRank, weight: float) -> LazyTensor:
    def exact() -> Tensor:
        return tensor.values().float() + weight * change.delta(tensor.shape)

    return replace(tensor, fetch=lambda copy: exact().to(tensor.dtype), mapped=False, exact=exact)
