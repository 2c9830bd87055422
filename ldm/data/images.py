"""Image files to pixels: every kind of file that data sets hold, decoded in worker processes, in order."""

import hashlib
import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ldm.files import write_json

logger = logging.getLogger(__name__)

FITS = ("squash", "crop", "pad")
CHUNK = 16  # images that go to a worker at once
JPEG_END = b"\xff\xd9"
NAMED = 5  # broken files that an error names


class Broken(NamedTuple):
    """A file that cannot be decoded."""

    file: str
    reason: str


def load_image(path: Path | str, size: int, fit: str = "squash") -> NDArray[np.uint8]:
    """Decode an image and bring it to a square, with LANCZOS.

    Args:    size: the side in pixels.  fit: "squash" ignores the aspect ratio, as the paper does; "crop" takes the
             centre; "pad" keeps all and adds black.
    Returns: (size, size, 3); grey images have three equal channels.
    Raises:  ValueError: when the file cannot be decoded, or for an unknown fit.
    """
    if fit not in FITS:
        raise ValueError(f"fit: got {fit!r}, expected one of {FITS}")
    try:
        image = _decoded(path)
    except Exception as error:  # on damaged bytes Pillow's decoders raise almost anything
        raise ValueError(f"{path}: {_reason(error)}") from None
    square = _fitted(image, size, fit)
    return np.array(square.convert("RGB"))


def _decoded(path: Path | str) -> Image.Image:
    """Upright, 8 bits, mode L or RGB."""
    with Image.open(path) as opened:
        image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I"):  # 16-bit grey: "I;16", in older Pillows "I"
        values = np.asarray(image, dtype=np.int64)
        if values.min() < 0 or values.max() > 65_535:
            raise ValueError(f"grey values {values.min()} to {values.max()}, expected 0 to 65535")
        return Image.fromarray(np.rint(values / 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is not known")
    return image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")


def _fitted(image: Image.Image, size: int, fit: str) -> Image.Image:
    if fit == "pad":
        return ImageOps.pad(image, (size, size), Image.Resampling.LANCZOS, color=0)
    if fit == "crop":
        return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    return image.resize((size, size), Image.Resampling.LANCZOS)


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return " ".join(str(error).split()) or type(error).__name__


# ---------------------------------------------------------------- a scan before the first epoch


def usable(
    files: Sequence[str] | NDArray[np.str_], max_bad: int = 0, workers: int = 1, cache: Path | None = None
) -> NDArray[np.bool_]:
    """(N,) which files can be decoded. Logs the others; raises ValueError when they are more than `max_bad`."""
    broken = scan(files, workers, cache)
    refuse(broken, max_bad, len(files))
    return ~np.isin(np.asarray(files, dtype=str), [file for file, _ in broken])


def refuse(broken: Sequence[Broken], max_bad: int, total: int) -> None:
    """Log each broken file; raise ValueError, which names the first, when they are more than `max_bad`."""
    if len(broken) > max_bad:
        named = "; ".join(f"{file}: {reason}" for file, reason in broken[:NAMED])
        more = f"; and {len(broken) - NAMED:,} more" if len(broken) > NAMED else ""
        raise ValueError(f"{len(broken):,} of {total:,} images cannot be read (max_bad is {max_bad}): {named}{more}")
    for file, reason in broken:
        logger.warning("left out: %s: %s", file, reason)


def scan(files: Sequence[str] | NDArray[np.str_], workers: int = 1, cache: Path | None = None) -> list[Broken]:
    """Find the files that cannot be decoded, in seconds: a JPEG is decoded only if its header or its end is amiss.

    Args:    cache: a json file; taken as the result if paths, sizes and times of all files are as they were.
    Returns: the broken files in the order of `files`.
    """
    names = [str(file) for file in files]
    state = _state(names) if cache is not None else ""
    if cache is not None and (kept := _cached(cache, state)) is not None:
        return kept
    with _pool(workers) as pool:
        chunks = _chunks(names, 256)
        faults = pool.map(_faults, chunks) if pool else map(_faults, chunks)
        broken = [fault for chunk in faults for fault in chunk]
    if cache is not None:
        write_json(cache, {"state": state, "broken": broken})
    return broken


def _state(names: Sequence[str]) -> str:
    """Changes when a file is added, removed or written."""
    digest = hashlib.sha256()
    for name in names:
        try:
            found = os.stat(name)
            digest.update(f"{name}\0{found.st_size}\0{found.st_mtime_ns}\n".encode())
        except OSError:
            digest.update(f"{name}\0missing\n".encode())
    return digest.hexdigest()


def _cached(cache: Path, state: str) -> list[Broken] | None:
    try:
        kept = json.loads(cache.read_text())
        return [Broken(*fault) for fault in kept["broken"]] if kept["state"] == state else None
    except (OSError, ValueError, KeyError, TypeError):  # absent or damaged: scan anew
        return None


def _faults(names: Sequence[str]) -> list[Broken]:
    return [Broken(name, reason) for name in names if (reason := _fault(name))]


def _fault(name: str) -> str | None:
    """Why a file cannot be decoded."""
    try:
        with Image.open(name) as image:
            whole = image.format == "JPEG" and _ends_as_jpeg(name)  # decoders read on over damage in between
        if not whole:
            _decoded(name)
    except Exception as error:  # as in load_image
        return _reason(error)
    return None


def _ends_as_jpeg(name: str) -> bool:
    with open(name, "rb") as file:
        file.seek(-len(JPEG_END), os.SEEK_END)
        return file.read() == JPEG_END


# ---------------------------------------------------------------- decoding in order


def iterate(
    files: Sequence[str] | NDArray[np.str_], size: int, fit: str = "squash", workers: int = 1, max_bad: int = 0
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Decode many images, a few ahead of the one asked for.

    Args:    size, fit: as of `load_image`.  workers: processes; does not change the result.
             max_bad: how many broken files may be left out.
    Yields:  (index in files, (size, size, 3)), in order.
    Raises:  ValueError: at the broken file after `max_bad` others.
    """
    broken: list[Broken] = []
    work = partial(_load_all, size=size, fit=fit)
    index = 0
    with _pool(workers) as pool:
        for chunk in _ahead(pool, work, _chunks([str(file) for file in files], CHUNK), 2 * workers):
            for result in chunk:
                if isinstance(result, Broken):
                    broken.append(result)
                    if len(broken) > max_bad:
                        refuse(broken, max_bad, len(files))
                    logger.warning("left out: %s: %s", result.file, result.reason)
                else:
                    yield index, result
                index += 1


def _load_all(names: Sequence[str], size: int, fit: str) -> list[NDArray[np.uint8] | Broken]:
    return [_load_or_fault(name, size, fit) for name in names]


def _load_or_fault(name: str, size: int, fit: str) -> NDArray[np.uint8] | Broken:
    try:
        return load_image(name, size, fit)
    except ValueError as error:
        return Broken(name, str(error).removeprefix(f"{name}: "))


def _chunks(names: Sequence[str], size: int) -> list[Sequence[str]]:
    return [names[start : start + size] for start in range(0, len(names), size)]


def _ahead(
    pool: Executor | None,
    work: Callable[[Sequence[str]], list[NDArray[np.uint8] | Broken]],
    chunks: Sequence[Sequence[str]],
    ahead: int,
) -> Iterator[list[NDArray[np.uint8] | Broken]]:
    """The results in order, at most `ahead` of them waiting, so that memory does not grow with the data set."""
    if pool is None:
        yield from map(work, chunks)
        return
    waiting: deque[Future[list[NDArray[np.uint8] | Broken]]] = deque()
    for chunk in chunks:
        waiting.append(pool.submit(work, chunk))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


@contextmanager
def _pool(workers: int) -> Iterator[Executor | None]:
    """Worker processes; None for one, which is this process."""
    if workers < 1:
        raise ValueError(f"workers: got {workers}, expected >= 1")
    if workers == 1:
        yield None
        return
    pool = ProcessPoolExecutor(workers)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
