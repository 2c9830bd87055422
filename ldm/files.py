"""Files that bear their name only once they are complete, and JSON."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def complete(path: Path, *, on_disk: bool = False) -> Iterator[Path]:
    """Where to write what is to become `path`: NAME.partial beside it, which gets the name when the block is done.

    Where the block fails, what it wrote is deleted, and a file that bore the name before is as it was.

    Args:    on_disk: force file and name onto the disk, so that not even a power cut leaves half of it.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        if on_disk:
            _sync(partial)
        partial.replace(path)
        if on_disk:
            _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)  # renaming one name of a file to another of its names does nothing


def _sync(path: Path) -> None:
    """Until this returns, a file or a folder's list of files may exist in memory only."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """A text file, in UTF-8."""
    with complete(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_bytes(path: Path, content: bytes) -> None:
    """A file of these bytes."""
    with complete(path) as partial:
        partial.write_bytes(content)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Indented JSON."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file. Raises ValueError, naming the file, for anything else."""
    try:
        content = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, found something else ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content
