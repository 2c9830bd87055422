"""Where the images of a table lie: whatever the extension, in whichever of a download's folders."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ldm.data.decode import EXTENSIONS

PROBED = 50  # files of a tree that are looked for before all are


def table_in(root: Path, patterns: Sequence[str], folders: Sequence[str] = ()) -> Path | None:
    """The first file that fits one of the patterns, in `root` or else in a folder of it."""
    for folder in (root, *(root / name for name in folders)):
        for pattern in patterns:
            if files := sorted(path for path in folder.glob(pattern) if path.is_file()):
                return files[0]
    return None


def in_folders(root: Path, folders: Sequence[str], names: Iterable[str], extension: str) -> NDArray[np.str_]:
    """Where each image lies, by its name with or without an extension.

    Args:    folders: patterns below `root`, such as "images_0*/images"; the first folder that has a file is taken.
             extension: of a file that is nowhere; it is said to lie in the first folder there is, or else in the last.
    Returns: (N,) paths.
    """
    there: dict[str, str] = {}
    for path in _files_of(root, folders):
        there.setdefault(stem(path.name), str(path))
    home = next(_folders(root, folders), root / folders[-1])
    return np.array(
        [there.get(stem(Path(name).name)) or str(home / f"{stem(name)}{extension}") for name in names], dtype=str
    )


def stem(name: str) -> str:
    """Without an extension that is one of an image: a name such as 1.2.840.10008 keeps its dots."""
    base, dot, extension = name.rpartition(".")
    return base if dot and f".{extension}".lower() in EXTENSIONS else name


def there(files: NDArray[np.str_]) -> NDArray[np.str_]:
    """The same files under the extension that they have on this disk, where another than that of the table.

    Few are looked for first: where those are as the table has them, or nowhere at all, so are the others.
    """
    few = files[np.unique(np.linspace(0, len(files) - 1, PROBED).astype(int))] if len(files) else files
    if all(variant == file for variant, file in zip(map(_variant, few), few, strict=True)):
        return files
    return np.array([_variant(file) for file in files], dtype=str)


def _variant(file: str) -> str:
    if os.path.exists(file):
        return str(file)
    base = stem(file)
    others = (base + other for extension in EXTENSIONS for other in (extension, extension.upper()))
    return next((other for other in others if os.path.exists(other)), str(file))


def _folders(root: Path, patterns: Sequence[str]) -> Iterator[Path]:
    for pattern in patterns:
        yield from sorted(path for path in (root.glob(pattern) if pattern else [root]) if path.is_dir())


def _files_of(root: Path, patterns: Sequence[str]) -> Iterator[Path]:
    """The image files of some folders, in each those of a more usual extension first."""
    for folder in _folders(root, patterns):
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries)
        ranks = [(EXTENSIONS.index(end), name) for name in names if (end := Path(name).suffix.lower()) in EXTENSIONS]
        yield from (folder / name for _, name in sorted(ranks))
