"""The safetensors container: a length, a JSON header, raw tensors.

    [n: 8 bytes, little endian] [header: n bytes] [tensors, back to back, little endian]
    header = {"__metadata__": {text: text}, name: {"dtype": "F16", "shape": [..], "data_offsets": [from, to]}, ..}

Written out here rather than left to the safetensors library for three things: a broken file is named in one line, a
conversion holds one tensor at a time, and a file can be written back byte for byte.
Source: https://github.com/huggingface/safetensors#format
"""

import hashlib
import json
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.files import complete

# In the order in which the library lays tensors out: by this list, then by name.
DTYPES = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}
DTYPE_RANKS = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}
MAX_HEADER_BYTES = 100_000_000  # the library's own limit
ALIGNMENT = 8  # headers are padded with spaces so that the data begins at a multiple of this
CHUNK_BYTES = 1 << 24


class CheckpointError(ValueError):
    """A file or folder cannot serve as a model: the message says what it is and what to do."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts the path in front of an error that does not know it."""
    try:
        yield
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is described but not yet read.

    key: its name where it is stored.
    fetch(copy): the tensor on the CPU. From a file: copy=True reads it, copy=False may give a view of the mapped file.
    mapped: whether fetch(False) gives such a view.
    exact: of a tensor that is computed, its values before they were rounded to `dtype`.
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    fetch: Callable[[bool], Tensor]
    mapped: bool = False
    exact: Callable[[], Tensor] | None = None

    @classmethod
    def of(cls, key: str, tensor: Tensor) -> "LazyTensor":
        """A tensor that is in memory already, on any device."""
        return cls(key, tuple(tensor.shape), tensor.dtype, lambda copy: tensor.detach().cpu().contiguous())

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def reshaped(self, shape: tuple[int, ...]) -> "LazyTensor":
        exact = self.exact and (lambda: self.values().reshape(shape))
        return replace(self, shape=shape, fetch=lambda copy: self.fetch(copy).reshape(shape), exact=exact)

    def values(self) -> Tensor:
        """The tensor, read or computed, as exact as it is known."""
        return self.exact() if self.exact else self.fetch(True)

    def cast(self, dtype: torch.dtype | None) -> "LazyTensor":
        """In another floating-point dtype; None and tensors of integers change nothing.

        The source is read, not mapped: pages of a mapped file would count as memory beside the result.
        """
        if dtype is None or dtype == self.dtype or not self.dtype.is_floating_point:
            return self
        return replace(self, dtype=dtype, fetch=lambda copy: self.values().to(dtype), mapped=False)


@dataclass(frozen=True)
class Header:
    """A parsed header. entries: name -> (dtype, shape, first byte, end byte), in the order of the data."""

    text: bytes
    metadata: dict[str, str]
    entries: dict[str, tuple[torch.dtype, tuple[int, ...], int, int]]

    @property
    def data_bytes(self) -> int:
        return max((end for _, _, _, end in self.entries.values()), default=0)

    @property
    def file_bytes(self) -> int:
        return 8 + len(self.text) + self.data_bytes

    @classmethod
    def parse(cls, text: bytes) -> "Header":
        """Raises CheckpointError when the text is no header, or its tensors overlap or leave gaps."""
        try:
            fields: dict[str, Any] = json.loads(text)
            metadata = {str(key): str(text) for key, text in (fields.pop("__metadata__", None) or {}).items()}
            entries = {name: _parse_entry(name, entry) for name, entry in fields.items()}
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"its header is not one of safetensors ({error})") from error
        entries = dict(sorted(entries.items(), key=lambda item: item[1][2:]))
        position = 0
        for name, (_, _, start, end) in entries.items():
            if start != position:
                raise CheckpointError(f"its header is corrupt: {name} begins at byte {start}, expected {position}")
            position = end
        return cls(text, metadata, entries)

    @classmethod
    def build(cls, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> "Header":
        """The header that the safetensors library would write for these tensors."""
        fields: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
        entries, position = {}, 0
        for name in sorted(tensors, key=lambda name: (DTYPE_RANKS[tensors[name].dtype], name)):
            tensor = tensors[name]
            start, position = position, position + tensor.nbytes
            entries[name] = (tensor.dtype, tensor.shape, start, position)
            fields[name] = {
                "dtype": DTYPE_CODES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [start, position],
            }
        text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
        return cls(text + b" " * (-len(text) % ALIGNMENT), dict(metadata), entries)

    def describes(self, tensors: Mapping[str, LazyTensor]) -> bool:
        """Whether these tensors, by names, dtypes and shapes, are exactly the ones that the header lists."""
        return {name: entry[:2] for name, entry in self.entries.items()} == {
            name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()
        }


def _parse_entry(name: str, entry: Mapping[str, Any]) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    if entry["dtype"] not in DTYPES:
        raise CheckpointError(
            f"stores {name} as {entry['dtype']}, which is not read here (known: {', '.join(DTYPES)}): "
            "convert it to F16 first"
        )
    dtype, shape = DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
    start, end = entry["data_offsets"]
    if min(shape, default=0) < 0 or end - start != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(f"its header is corrupt: {name} {shape} of {dtype} cannot fill {end - start} bytes")
    return dtype, shape, start, end


class TensorFile:
    """One safetensors file: its header is read and checked at once, its tensors on demand.

    Raises: CheckpointError when the file is cut short or corrupt; OSError when it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with naming(path):
            self.header = self._read_header()
        self._data_start = 8 + len(self.header.text)

    def _read_header(self) -> Header:
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= MAX_HEADER_BYTES:
                raise CheckpointError("not a safetensors file, or corrupt from its first bytes on")
            text = file.read(length)
        if len(text) < length:
            raise CheckpointError(f"cut short within its header ({size} bytes): fetch it again")
        header = Header.parse(text)
        if size < header.file_bytes:
            raise CheckpointError(f"cut short, {size} of {header.file_bytes} bytes: fetch it again")
        if size > header.file_bytes:
            raise CheckpointError(
                f"corrupt, {size - header.file_bytes} bytes more than its header tells: fetch it again"
            )
        return header

    def tensors(self) -> dict[str, LazyTensor]:
        """Every tensor, unread, in the order of the data."""
        return {
            name: LazyTensor(name, shape, dtype, partial(self._fetch, name), mapped=True)
            for name, (dtype, shape, _, _) in self.header.entries.items()
        }

    @cached_property
    def _mapping(self) -> mmap.mmap:
        # Private and copy on write: writing into such a tensor copies the page touched and never reaches the file.
        with self.path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def _fetch(self, name: str, copy: bool) -> Tensor:
        dtype, shape, start, end = self.header.entries[name]
        start, end = self._data_start + start, self._data_start + end
        if copy or start == end or start % dtype.itemsize:  # older writers did not align their data
            raw = torch.empty(end - start, dtype=torch.uint8)
            with self.path.open("rb") as file:
                file.seek(start)
                if file.readinto(raw.numpy().data) != end - start:
                    raise CheckpointError(f"{self.path}: changed while it was read")
            return raw.view(dtype).reshape(shape)
        count = (end - start) // dtype.itemsize
        return torch.frombuffer(self._mapping, dtype=dtype, count=count, offset=start).reshape(shape)


def write_tensors(
    path: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str], header: Header | None = None
) -> None:
    """Write one safetensors file.

    The memory taken is that of the largest tensor. `header` is used as it is when it describes these tensors, order,
    metadata and padding included; otherwise the library's order and `metadata` are.
    """
    if header is None or not header.describes(tensors):
        header = Header.build(tensors, metadata)
    with complete(path) as unfinished, unfinished.open("wb") as file:
        file.write(len(header.text).to_bytes(8, "little"))
        file.write(header.text)
        for name in header.entries:
            raw = tensors[name].fetch(True).contiguous().reshape(-1).view(torch.uint8)
            file.write(raw.numpy().data)


def sha256(path: str | os.PathLike[str], progress: Callable[[int], object] | None = None) -> str:
    """The file's SHA-256 in hexadecimal, read in chunks. progress: called with the number of bytes of each chunk."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            if progress is not None:
                progress(len(chunk))
    return digest.hexdigest()
