"""What every reader gives: the images of a data set with their labels, groups and captions."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ldm.data import captions


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """N images with K labels each; nothing is decoded yet, and the files need not exist.

    `frame` holds what the label files say, `observations` the same as numbers after the policies for uncertain and
    empty cells, and `labels` those of them that this project trains on, under its own names.
    """

    name: str  # "chexpert" | "isic"
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

    def captions(self, template: str = "paper") -> NDArray[np.object_]:
        """(N,) str: the caption of every image. Args: template: "paper" or "code"."""
        if self.name == "chexpert":
            return captions.chexpert_table(self.observations, template)
        return captions.isic_table(self.observations, template)

    def counts(self, rows: NDArray[np.integer] | None = None) -> dict[str, int]:
        """How many of the images, or of some rows, show each of `counted`."""
        present = self.observations[list(self.counted)].to_numpy() == 1
        totals = (present if rows is None else present[rows]).sum(axis=0)
        return dict(zip(self.counted, totals.tolist(), strict=True))
