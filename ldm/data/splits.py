"""Train, validation and test: by patient or lesion, or as the paper split, which leaks; saved as csv and read back."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ldm.data import tables
from ldm.data.labelled import LabelledImages
from ldm.files import complete

PARTS = ("train", "validation", "test")
OFFICIAL = "split"  # column of a reader's frame, if its data set has one
HELD_OUT = 0.15  # the paper's share for test, and again of the rest for validation
PAPER_FRACTIONS = ((1 - HELD_OUT) ** 2, (1 - HELD_OUT) * HELD_OUT, HELD_OUT)
PAPER_SEED = 42


@dataclass(frozen=True, eq=False)
class Split:
    """Which rows of a `LabelledImages` are in which part: (n,) int64 each, ascending. A row may be in none."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]

    def parts(self) -> dict[str, NDArray[np.int64]]:
        """The three by name."""
        return {name: getattr(self, name) for name in PARTS}

    def save(self, path: Path | str, images: LabelledImages) -> None:
        """Write image, group, split: a line for every image that is in a part, in file order."""
        path = Path(path)
        part = np.full(len(images), "", dtype=object)
        for name, rows in self.parts().items():
            part[rows] = name
        table = pd.DataFrame({"image": images.keys, "group": images.groups, "split": part})[part != ""]
        with complete(path) as partial:
            table.to_csv(partial, index=False, lineterminator="\n")


def load(path: Path | str, images: LabelledImages) -> Split:
    """A saved split, for the same images read in whatever variant. Images that it does not name are in no part.

    Raises:  ValueError: when it names images that are not there, one twice, or an unknown part.
    """
    path = Path(path)
    table = tables.read(path, ("image", "split"))
    tables.unique(path, table["image"])
    for name in table["split"].unique():
        tables.one_of(f"{path}, split", str(name), PARTS)
    rows = pd.Index(images.keys).get_indexer(pd.Index(table["image"].astype(str)))
    if (missing := rows < 0).any():
        first = table["image"].iloc[int(np.argmax(missing))]
        raise ValueError(
            f"{path}: {missing.sum()} of its {len(table)} images are not among the {len(images)} of {images.root}, "
            f"the first is {first!r}; read the data set as it was read for the split"
        )
    return Split(*(np.sort(rows[(table["split"] == name).to_numpy()]) for name in PARTS))


def _checked(fractions: Sequence[float]) -> None:
    if len(fractions) != len(PARTS) or min(fractions) < 0 or fractions[0] == 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"fractions: got {tuple(fractions)}, expected three numbers >= 0, train > 0, that add up to 1")


def grouped(images: LabelledImages, seed: int = 42, fractions: Sequence[float] = PAPER_FRACTIONS) -> Split:
    """A split in which no patient or lesion is in two parts.

    In a random order of the groups, test takes groups until it has its share of the images, then validation; the rest
    is train. So both exceed their share by less than one group.

    Args:    fractions: of the images, for train, validation and test.
    Raises:  ValueError: for fractions that do not add up to 1, or when too few groups leave train or validation empty.
    """
    _checked(fractions)
    _, group, sizes = np.unique(images.groups, return_inverse=True, return_counts=True)
    order = np.random.RandomState(seed).permutation(len(sizes))  # its stream is promised never to change
    ends = np.concatenate([[0], np.cumsum(sizes[order])])  # of the images of the first 0, 1, 2 ... groups
    slack = 1e-6  # a share such as .15 * 120 is not exact
    in_test = int(np.searchsorted(ends, fractions[2] * len(images) - slack))
    in_both = (
        int(np.searchsorted(ends, ends[in_test] + fractions[1] * len(images) - slack)) if fractions[1] else in_test
    )
    if in_both >= len(sizes):
        raise ValueError(f"fractions: {len(sizes)} groups are too few for train, validation and test")
    part = np.zeros(len(sizes), dtype=np.int64)
    part[order[:in_both]], part[order[:in_test]] = 1, 2
    return Split(*(np.flatnonzero(part[group] == number) for number in range(len(PARTS))))


def stratified(images: LabelledImages, seed: int = 42, fractions: Sequence[float] = PAPER_FRACTIONS) -> Split:
    """`grouped`, and each part has about its share of every label too, as far as whole groups allow.

    Groups with most of a rare label go first, ties in random order; each goes where most is still wanted of what it
    has. (After iterative stratification, Sechidis et al. 2011.)

    Args:    fractions: as of `grouped`.  Raises: as of `grouped`.
    """
    _checked(fractions)
    _, group = np.unique(images.groups, return_inverse=True)
    counts = _per_group(group, images.labels)  # (G, K + 1): positives of each label, images
    totals = np.maximum(counts.sum(axis=0), 1)
    share = np.array(fractions)[:, None]
    wanted = np.repeat(share, counts.shape[1], axis=1)  # of each label's total, by each part
    weights = counts / totals
    part = np.zeros(len(counts), dtype=np.int64)
    random = np.random.RandomState(seed).permutation(len(counts))
    for g in random[np.argsort(-weights[random, :-1].max(axis=1, initial=0), kind="stable")]:
        need = np.where(share[:, 0] > 0, (wanted / np.maximum(share, 1e-9) * weights[g]).sum(axis=1), -np.inf)
        part[g] = np.argmax(need)
        wanted[part[g]] -= weights[g]
    empty = [name for name, number in zip(PARTS, np.bincount(part, minlength=3), strict=True) if not number]
    if any(fractions[PARTS.index(name)] for name in empty):
        raise ValueError(f"fractions: {len(counts)} groups are too few for train, validation and test")
    return Split(*(np.flatnonzero(part[group] == number) for number in range(len(PARTS))))


def _per_group(group: NDArray[np.int64], labels: NDArray[np.float32]) -> NDArray[np.float64]:
    """(G, K + 1): how many images of each group show each label, and how many it has."""
    columns = [*(labels == 1).T.astype(np.float64), np.ones(len(group))]
    return np.stack([np.bincount(group, weights=column) for column in columns], axis=1)


def uneven(images: LabelledImages, split: Split) -> list[str]:
    """A sentence for each label of which a part has less than half of its share, five images or more being due."""
    sentences = []
    sizes = {name: len(rows) for name, rows in split.parts().items()}
    for name, column in zip(images.attributes, images.labels.T, strict=True):
        here = {part: int((column[rows] == 1).sum()) for part, rows in split.parts().items()}
        total = sum(here.values())
        due = {part: total * size / max(sum(sizes.values()), 1) for part, size in sizes.items()}
        if any(due[part] >= 5 and here[part] < due[part] / 2 for part in PARTS):
            shown = ", ".join(f"{here[part]:,} in {part} ({due[part]:.0f} would be its share)" for part in PARTS)
            sentences.append(f"{name} is uneven: of {total:,} images that show it {shown}; try --split stratified")
    return sentences


def official(images: LabelledImages) -> Split:
    """The one that the data set's own files give, such as MIMIC-CXR's.

    Raises:  ValueError: when they give none.
    """
    if OFFICIAL not in images.frame:
        raise ValueError(f"split: {images.root} holds no official split of {images.name}; expected grouped, or a file")
    given = images.frame[OFFICIAL].to_numpy(dtype=object)
    return Split(*(np.flatnonzero(given == name) for name in PARTS))


def paper(images: LabelledImages) -> Split:
    """The paper's split of the images that it used, which reproduces the counts of its Table 3. It leaks.

    Of a permutation of n rows by RandomState(42) the first ceil(0.15 n) are test; of the rest, in permuted order, the
    same again are validation.

    Raises:  ValueError: when no image is one that the paper used, or the label files are not those that it used.
    """
    used = np.flatnonzero(images.in_paper)
    if len(used) < len(PARTS):
        wanted = "MEL and NV images with artifact annotations" if images.name == "isic" else "frontal images"
        raise ValueError(f"split: the paper's is of {wanted}, of which {images.root} gave {len(used)}")
    rest, test = _held_out(used)
    train, validation = _held_out(rest)
    return Split(np.sort(train), np.sort(validation), np.sort(test))


def _held_out(rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """What is kept, and what is held out."""
    order = np.random.RandomState(PAPER_SEED).permutation(len(rows))
    count = int(np.ceil(HELD_OUT * len(rows)))
    return rows[order[count:]], rows[order[:count]]


def leakage(images: LabelledImages, split: Split) -> float:
    """The share of test images whose patient or lesion is in train too; NaN where the label files do not tell."""
    if not images.group_kind or not len(split.test):
        return float("nan")
    return float(np.isin(images.groups[split.test], images.groups[split.train]).mean())
