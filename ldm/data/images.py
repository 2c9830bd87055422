"""Image files to pixels of one size: decoded in worker processes, in order, and looked through before."""

import hashlib
import json
import logging
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ldm.data.decode import decode
from ldm.data.dicom import is_dicom
from ldm.data.reading import AS_STORED, Reading
from ldm.files import write_json

logger = logging.getLogger(__name__)
T = TypeVar("T")

FITS = ("squash", "crop", "pad")
CHUNK = 16  # images that go to a worker at once
JPEG_END = b"\xff\xd9"
NAMED = 5  # broken files that an error names


class Broken(NamedTuple):
    """A file that cannot be decoded."""

    file: str
    reason: str


def load_image(
    path: Path | str, size: int | tuple[int, int], fit: str = "squash", reading: Reading = AS_STORED
) -> NDArray[np.uint8]:
    """Decode an image and bring it to one size, with LANCZOS.

    Args:    size: height and width in pixels, or the side of a square.
             fit: "squash" ignores the aspect ratio, as the paper does; "crop" takes the centre; "pad" keeps all and
             adds black.  reading: what the file leaves open.
    Returns: (height, width, 3); grey images have three equal channels.
    Raises:  ValueError: when the file cannot be decoded, or for an unknown fit.
    """
    return load_with_remarks(path, size, fit, reading)[0]


def load_with_remarks(
    path: Path | str, size: int | tuple[int, int], fit: str, reading: Reading
) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """`load_image`, and what had to be decided in decoding."""
    if fit not in FITS:
        raise ValueError(f"fit: got {fit!r}, expected one of {FITS}")
    try:
        image, _, remarks = decode(path, reading)
    except Exception as error:  # on damaged bytes Pillow's decoders raise almost anything
        raise ValueError(f"{path}: {reason(error)}") from None
    return np.array(_fitted(image, size, fit).convert("RGB")), remarks


def _fitted(image: Image.Image, size: int | tuple[int, int], fit: str) -> Image.Image:
    height, width = size if isinstance(size, tuple) else (size, size)
    if fit == "pad":
        return ImageOps.pad(image, (width, height), Image.Resampling.LANCZOS, color=0)
    if fit == "crop":
        return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def reason(error: Exception) -> str:
    """Why a file cannot be decoded, in a line."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, Image.DecompressionBombError) and (count := re.search(r"(\d+) pixels", str(error))):
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # Pillow refuses from twice that on
        return f"{int(count[1]) / 1e6:.1f} megapixels, at most {limit / 1e6:.1f} are read; make it smaller"
    return " ".join(str(error).split()) or type(error).__name__


# ---------------------------------------------------------------- a scan before the first epoch


def usable(
    files: Sequence[str] | NDArray[np.str_],
    max_bad: int = 0,
    workers: int = 1,
    cache: Path | None = None,
    reading: Reading = AS_STORED,
    said: bool = True,
) -> NDArray[np.bool_]:
    """(N,) which files can be decoded; each is, whole, before the first epoch meets it.

    Logs the others, and how many images were read in a way worth knowing, such as 12 of 16 bits.

    Args:    cache, reading: as of `scan`.  said: False: log nothing, where it was said before.
    Raises:  ValueError: when more than `max_bad` cannot be decoded.
    """
    names = [str(file) for file in files]
    broken, remarks = _scanned(names, workers, cache, True, reading)
    if said or len(broken) > max_bad:
        refuse(broken, max_bad, len(names))
    for remark, count in remarks.items() if said else ():
        logger.warning("%d of %d images: %s", count, len(names), remark)
    return ~np.isin(np.asarray(names, dtype=str), [file for file, _ in broken])


def refuse(broken: Sequence[Broken], max_bad: int, total: int) -> None:
    """Log each broken file; raise ValueError, which names the first, when they are more than `max_bad`."""
    if len(broken) > max_bad:
        named = "; ".join(f"{file}: {reason}" for file, reason in broken[:NAMED])
        more = f"; and {len(broken) - NAMED:,} more" if len(broken) > NAMED else ""
        raise ValueError(f"{len(broken):,} of {total:,} images cannot be read (max_bad is {max_bad}): {named}{more}")
    for file, reason in broken:
        logger.warning("left out: %s: %s", file, reason)


def scan(
    files: Sequence[str] | NDArray[np.str_],
    workers: int = 1,
    cache: Path | None = None,
    whole: bool = False,
    reading: Reading = AS_STORED,
) -> list[Broken]:
    """Find the files that cannot be decoded.

    Args:    cache: a json file; taken as the result if paths, sizes and times of all files are as they were.
             whole: decode every file, which finds most damage; otherwise, in seconds, a JPEG only if its header or
             its end is amiss. Either way what a decoder reads over, such as zeros in a JPEG, stays unseen.
    Returns: the broken files in the order of `files`.
    """
    return _scanned([str(file) for file in files], workers, cache, whole, reading)[0]


def _scanned(
    names: Sequence[str], workers: int, cache: Path | None, whole: bool, reading: Reading
) -> tuple[list[Broken], dict[str, int]]:
    """The broken files, and how many of the others each remark is true of: none unless decoded whole."""
    state = _state(names, whole, reading) if cache is not None else ""
    if cache is not None and (kept := _cached(cache, state)) is not None:
        return kept
    faults = examine_all(partial(_fault, whole=whole, reading=reading), names, workers)
    broken = [fault for fault in faults if isinstance(fault, Broken)]
    remarks = dict(Counter(remark for fault in faults if not isinstance(fault, Broken) for remark in fault))
    if cache is not None:
        write_json(cache, {"state": state, "broken": broken, "remarks": remarks})
    return broken, remarks


def _state(names: Sequence[str], whole: bool, reading: Reading) -> str:
    """Changes when a file is added, removed or written, or when it would be looked at in another way."""
    digest = hashlib.sha256(f"{whole} {reading}\n".encode())
    for name in names:
        try:
            stat = os.stat(name)
            digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        except OSError:
            digest.update(f"{name}\0missing\n".encode())
    return digest.hexdigest()


def _cached(cache: Path, state: str) -> tuple[list[Broken], dict[str, int]] | None:
    try:
        kept = json.loads(cache.read_text())
        same = kept["state"] == state
        return ([Broken(*fault) for fault in kept["broken"]], dict(kept["remarks"])) if same else None
    except (OSError, ValueError, KeyError, TypeError):  # absent or damaged: scan anew
        return None


def examine_all(examine: Callable[[str], T], names: Sequence[str], workers: int) -> list[T]:
    """What a function says of each file, in order; the work is shared among processes."""
    each = partial(_examined, examine)
    with pool_of(workers) as pool:
        chunks = _chunks(names, 64)
        return [one for chunk in (pool.map(each, chunks) if pool else map(each, chunks)) for one in chunk]


def _examined(examine: Callable[[str], T], names: Sequence[str]) -> list[T]:
    return [examine(name) for name in names]


def _fault(name: str, whole: bool, reading: Reading) -> Broken | tuple[str, ...]:
    """Why a file cannot be decoded; of one that can, the remarks."""
    try:
        if not whole and _looks_whole(name):
            return ()
        return decode(name, reading).remarks
    except Exception as error:  # as in load_image
        return Broken(name, reason(error))


def _looks_whole(name: str) -> bool:
    """A JPEG with an end; decoders read on over damage in between."""
    if is_dicom(name):
        return False
    with Image.open(name) as image:
        return image.format == "JPEG" and _ends_as_jpeg(name)


def _ends_as_jpeg(name: str) -> bool:
    with open(name, "rb") as file:
        file.seek(-len(JPEG_END), os.SEEK_END)
        return file.read() == JPEG_END


# ---------------------------------------------------------------- decoding in order


def iterate(
    files: Sequence[str] | NDArray[np.str_],
    size: int,
    fit: str = "squash",
    workers: int = 1,
    max_bad: int = 0,
    reading: Reading = AS_STORED,
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Decode many images, a few ahead of the one asked for.

    Args:    size, fit, reading: as of `load_image`.  workers: processes; does not change the result.
             max_bad: how many broken files may be left out.
    Yields:  (index in files, (size, size, 3)), in order.
    Raises:  ValueError: at the broken file after `max_bad` others.
    """
    broken: list[Broken] = []
    work = partial(_load_all, size=size, fit=fit, reading=reading)
    index = 0
    with pool_of(workers) as pool:
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


def _load_all(names: Sequence[str], size: int, fit: str, reading: Reading) -> list[NDArray[np.uint8] | Broken]:
    return [_load_or_fault(name, size, fit, reading) for name in names]


def _load_or_fault(name: str, size: int, fit: str, reading: Reading) -> NDArray[np.uint8] | Broken:
    try:
        return load_image(name, size, fit, reading)
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
def pool_of(workers: int) -> Iterator[Executor | None]:
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
