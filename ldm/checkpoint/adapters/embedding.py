"""Textual inversion: a few vectors under a new word, rows behind the text encoder's table. [Gal et al. 2022]

A1111 writes them as `emb_params`, and the file's name is the word; diffusers under the word itself.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoint.container import CheckpointError, LazyTensor, TensorFile
from ldm.checkpoint.foreign import refuse_other_formats
from ldm.checkpoint.identification import Checkpoint

logger = logging.getLogger(__name__)

TABLE = "text_model.embeddings.token_embedding.weight"
A1111_KEYS = ("emb_params", "string_to_param.*")


@dataclass(frozen=True)
class Embedding:
    """word: what a prompt must say.  vectors: (n, D), n rows for the word, unread."""

    path: Path
    word: str
    vectors: LazyTensor

    @property
    def rows(self) -> int:
        return self.vectors.shape[0]


def read_embedding(path: str | Path) -> list[Embedding]:
    """The words of an embedding's file.

    Raises: CheckpointError when it is no embedding, a pickle, or one of another model.
    """
    path = Path(path)
    refuse_other_formats(path)
    tensors = TensorFile(path).tensors()
    if {"clip_g", "clip_l"} & tensors.keys():
        raise CheckpointError(f"{path}: an embedding for SDXL, another architecture: get one for SD1.5")
    known = {name: tensor for name, tensor in tensors.items() if name in A1111_KEYS}
    words = {path.stem: next(iter(known.values()))} if known else tensors
    if not words or any("." in word and not known for word in words):
        raise CheckpointError(f"{path}: no embedding (its first tensor: {next(iter(tensors), 'none')})")
    return [Embedding(path, word, _matrix(path, vectors)) for word, vectors in words.items()]


def _matrix(path: Path, vectors: LazyTensor) -> LazyTensor:
    """(D,) or (n, D) -> (n, D)."""
    if len(vectors.shape) == 1:
        vectors = vectors.reshaped((1, *vectors.shape))
    if len(vectors.shape) != 2 or 0 in vectors.shape or not vectors.dtype.is_floating_point:
        raise CheckpointError(f"{path}: {vectors.key} has shape {vectors.shape}, expected vectors (n, 768)")
    return vectors


def add_embeddings(checkpoint: Checkpoint, paths: Sequence[str | Path]) -> Checkpoint:
    """The same checkpoint with these words in its vocabulary, and their vectors behind its table.

    Raises: CheckpointError when there is no text encoder, vectors are of another width, or a word is there already.
    """
    for embedding in (embedding for path in paths for embedding in read_embedding(path)):
        clip = checkpoint.parts.get("clip", {})
        if TABLE not in clip:
            raise CheckpointError(f"{checkpoint.path}: no text encoder in it, which {embedding.path} is a word for")
        table = clip[TABLE]
        if len(table.shape) != 2 or embedding.vectors.shape[1] != table.shape[1]:
            raise CheckpointError(
                f"{embedding.path}: its vectors have {embedding.vectors.shape[1]} numbers, this text encoder takes "
                f"{table.shape[-1]}: it is for another model"
            )
        if embedding.word in checkpoint.vocabulary.added:
            raise CheckpointError(f"{embedding.path}: the word {embedding.word!r} is there already: rename the file")
        rows = table.shape[0]
        ids = tuple(range(rows, rows + embedding.rows))
        logger.info("%s: say %r in a prompt (%d tokens)", embedding.path, embedding.word, embedding.rows)
        words = {**checkpoint.vocabulary.added, embedding.word: ids}
        told = {part: path for part, path in checkpoint.config_files.items() if part != "clip"}  # rows are more now
        checkpoint = replace(
            checkpoint,
            parts={**checkpoint.parts, "clip": {**clip, TABLE: _longer(table, embedding.vectors)}},
            vocabulary=replace(checkpoint.vocabulary, added=words),
            config_files=told,
        )
    return checkpoint


def _longer(table: LazyTensor, vectors: LazyTensor) -> LazyTensor:
    """The table with rows added, in its dtype."""

    def exact() -> Tensor:
        return torch.cat([table.values().float(), vectors.fetch(True).float()])

    return replace(
        table,
        shape=(table.shape[0] + vectors.shape[0], table.shape[1]),
        fetch=lambda copy: exact().to(table.dtype),
        mapped=False,
        exact=exact,
    )
