"""What every reader gives: the images of a data set with their labels, groups and captions."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ldm.data import tables
from ldm.data.reading import AS_STORED, Reading
from ldm.data.wording import Wording


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """N images with K labels each; nothing is decoded yet, and the files need not exist.

    `frame` holds what the label files say, `observations` the same as numbers after the policies for uncertain and
    empty cells, and `labels` those of them that this project trains on, under its own names.
    """

    name: str  # of the data set: one of `folders.SETS`, or "table"
    kind: str  # "chest" | "skin", or "" where nobody said: it decides the authors' recipe, and the traps to look for
    root: Path
    frame: pd.DataFrame  # one row an image, in file order; its index is the row in the label file, from 0
    files: NDArray[np.str_]  # (N,) paths
    attributes: tuple[str, ...]  # K names: "pleural_effusion"
    labels: NDArray[np.float32]  # (N, K): 1 present, 0 absent, NaN unknown, to be masked
    groups: NDArray[np.str_]  # (N,) patient or lesion; an image whose lesion is not given is a group of its own
    keys: NDArray[np.str_]  # (N,) names of the images that are the same in every variant of the download
    observations: pd.DataFrame  # (N, all) float32 under the label files' own names: 1, 0, NaN
    counted: tuple[str, ...]  # columns of `observations` that a table of the data set counts
    in_paper: NDArray[np.bool_]  # (N,) the rows that the paper's experiment used
    group_kind: str  # "patient" | "lesion", or "" where the label files do not tell
    wording: Wording  # how labels become captions
    columns: Mapping[str, str]  # every attribute that may be asked for -> its column of `observations`
    notes: tuple[str, ...] = ()  # what was left out, and what was taken because nothing else was said
    reading: Reading = AS_STORED  # how the files become pixels

    def __len__(self) -> int:
        return len(self.frame)

    def select(self, rows: NDArray[np.bool_] | NDArray[np.integer] | Sequence[int]) -> "LabelledImages":
        """Some of the images. Args: rows: (N,) mask, or indices, in the order wanted."""
        chosen = np.asarray(rows)
        if chosen.dtype == bool and len(chosen) != len(self):
            raise ValueError(f"rows: a mask of {len(chosen)} for {len(self)} images")
        index = np.flatnonzero(chosen) if chosen.dtype == bool else chosen.astype(np.int64)
        return replace(
            self,
            frame=self.frame.iloc[index],
            files=self.files[index],
            labels=self.labels[index],
            groups=self.groups[index],
            keys=self.keys[index],
            observations=self.observations.iloc[index],
            in_paper=self.in_paper[index],
        )

    def with_attributes(self, names: Sequence[str]) -> "LabelledImages":
        """Other labels of the same images. Raises ValueError for one that the data set does not have."""
        chosen = [tables.one_of("attributes", attribute_name(name), self.columns) for name in names]
        counted = tuple(self.columns[name] for name in chosen)
        labels = self.observations[list(counted)].to_numpy(dtype=np.float32)
        return replace(self, attributes=tuple(chosen), labels=np.ascontiguousarray(labels), counted=counted)

    def saying(self, names: Sequence[str]) -> "LabelledImages":
        """The same with captions that name these attributes alone. Raises as of `with_attributes`."""
        columns = [self.columns[tables.one_of("attributes", attribute_name(name), self.columns)] for name in names]
        return replace(self, wording=self.wording.only(columns))

    def captions(self, template: str = "paper") -> NDArray[np.object_]:
        """(N,) str: the caption of every image. Args: template: "paper" or "code"."""
        return self.wording.captions(self.observations, template)

    def prompts(self, template: str = "paper") -> list[str]:
        """The neutral prompt, and one for each label that the images show."""
        return self.wording.prompts(self.observations, template)

    def counts(self, rows: NDArray[np.integer] | None = None) -> dict[str, int]:
        """How many of the images, or of some rows, show each of `counted`."""
        present = self.observations[list(self.counted)].to_numpy() == 1
        totals = (present if rows is None else present[rows]).sum(axis=0)
        return dict(zip(self.counted, totals.tolist(), strict=True))


def attribute_name(column: str) -> str:
    """ "Pleural Effusion" -> "pleural_effusion"."""
    return re.sub(r"[^0-9a-z]+", "_", column.lower()).strip("_")
