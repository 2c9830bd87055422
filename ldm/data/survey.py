"""What the image files of a data set are: how many, how large, of which kinds, and which of them look odd."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldm.data.decode import decode
from ldm.data.images import Broken, examine_all, reason
from ldm.data.reading import AS_STORED, Reading

NAMED = 3  # files of each kind of oddity
FLAT = 2.0  # grey levels of standard deviation below which an image is one colour
TINT = 8  # of a grey image, the largest difference between channels
SIDE = 64  # of the thumbnail by which a negative is told


@dataclass(frozen=True)
class Facts:
    """One file that was decoded."""

    file: str
    bytes: int
    kind: str  # "JPEG L"
    size: tuple[int, int]  # width, height
    flat: bool
    negative: bool
    remarks: tuple[str, ...]
    digest: str  # of the pixels


def survey(
    files: Sequence[str] | NDArray[np.str_], workers: int = 1, reading: Reading = AS_STORED, chests: bool = True
) -> tuple[list[Facts], list[Broken]]:
    """Decode every file. Args: chests: whether they are radiographs of chests, which can look like negatives."""
    work = partial(_facts, reading=reading, chests=chests)
    facts = examine_all(work, [str(file) for file in files], workers)
    return [each for each in facts if isinstance(each, Facts)], [each for each in facts if isinstance(each, Broken)]


def _facts(file: str, reading: Reading, chests: bool) -> Facts | Broken:
    try:
        image, kind, remarks = decode(file, reading)
    except Exception as error:  # as in images.load_image
        return Broken(file, reason(error))
    pixels = np.asarray(image)
    return Facts(
        file=file,
        bytes=os.path.getsize(file),
        kind=kind,
        size=image.size,
        flat=float(pixels.std()) < FLAT,
        negative=chests and is_grey(image) and looks_negative(image),
        remarks=remarks,
        digest=hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest(),
    )


def is_grey(image: Image.Image) -> bool:
    """Whether the channels are alike, up to what JPEG does to them."""
    small = np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.int16)
    return bool(np.ptp(small, axis=-1).max() < TINT)


def looks_negative(image: Image.Image) -> bool:
    """Whether a frontal chest is darker than what lies around it: a guess.

    White bone: the mediastinum is brighter than the lungs beside it, the upper abdomen brighter than the corners above
    the shoulders. The sum of both differences is below 0 for 1 of 1,643 radiographs of two hospitals, a child's.
    """
    grey = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float64)

    def mean(top: float, bottom: float, left: float, right: float) -> float:
        return float(grey[int(SIDE * top) : int(SIDE * bottom), int(SIDE * left) : int(SIDE * right)].mean())

    lungs = (mean(0.25, 0.6, 0.2, 0.36) + mean(0.25, 0.6, 0.64, 0.8)) / 2
    corners = (mean(0, 0.12, 0, 0.12) + mean(0, 0.12, 0.88, 1)) / 2
    return (mean(0.3, 0.7, 0.42, 0.58) - lungs) + (mean(0.85, 1, 0.35, 0.65) - corners) < 0


def described(facts: Sequence[Facts], root: Path | str = ".") -> str:
    """A paragraph: files, sizes, kinds, and each oddity with how many show it and the first that do, below `root`."""
    if not facts:
        return "no image file was decoded"
    facts = [replace(each, file=each.file.removeprefix(f"{root}/")) for each in facts]
    sizes = Counter(each.size for each in facts)
    kinds = Counter(each.kind for each in facts)
    width, height = sizes.most_common(1)[0][0]
    areas = sorted(sizes, key=lambda size: size[0] * size[1])
    common = (
        f"{width} x {height}"
        if len(sizes) == 1
        else (
            f"{len(sizes):,} sizes from {areas[0][0]} x {areas[0][1]} to {areas[-1][0]} x {areas[-1][1]}, most often "
            f"{width} x {height} ({sizes[width, height]:,})"
        )
    )
    lines = [
        f"decoded {len(facts):,} files, {sum(each.bytes for each in facts) / 1e6:,.1f} MB: {common}; "
        + ", ".join(f"{kind} {count:,}" for kind, count in kinds.most_common()),
        _line("of one colour, or nearly", [each.file for each in facts if each.flat]),
        _line("the pixels of another file", _copies(facts)),
    ]
    remarks: dict[str, list[str]] = defaultdict(list)
    for each in facts:
        for remark in each.remarks:
            remarks[remark].append(each.file)
    lines += [_line(remark, files) for remark, files in remarks.items()]
    if negatives := [each.file for each in facts if each.negative]:
        lines.append(_line("perhaps negatives, with dark bones (--invert reads a folder of negatives)", negatives))
    return "\n".join(lines)


def _copies(facts: Sequence[Facts]) -> list[str]:
    """All but the first of each group of files with the same pixels."""
    seen: set[str] = set()
    copies = []
    for each in facts:
        if each.digest in seen:
            copies.append(each.file)
        seen.add(each.digest)
    return copies


def _line(what: str, files: Sequence[str]) -> str:
    named = f": {', '.join(files[:NAMED])}{' ...' if len(files) > NAMED else ''}" if files else ""
    return f"  {len(files):>9,}  {what}{named}"
