"""What all sets of radiographs share: labels that may be uncertain or not mentioned, patients, findings in captions."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ldm.data.labelled import LabelledImages, attribute_name
from ldm.data.wording import Radiographs

UNCERTAIN = {"ones": 1.0, "zeros": 0.0, "ignore": np.nan}
EMPTY = {"zero": 0.0, "mask": np.nan}
FRONTAL = ("AP", "PA")
DEFAULT_ATTRIBUTES = ("pleural_effusion", "cardiomegaly")  # of sets that the paper did not use


def decided(values: pd.DataFrame, uncertain: str, empty: str) -> pd.DataFrame:
    """1, 0, -1, NaN -> 1, 0 or NaN: what -1 means and what an empty cell means, applied."""
    raw = values.to_numpy(dtype=np.float32)
    table = np.where(raw == -1, np.float32(UNCERTAIN[uncertain]), raw)
    table[np.isnan(raw)] = EMPTY[empty]
    return pd.DataFrame(table, index=values.index, columns=values.columns)


def assemble(
    *,
    name: str,
    root: Path,
    frame: pd.DataFrame,
    files: NDArray[np.str_],
    observations: pd.DataFrame,
    patients: NDArray[np.str_] | None,
    keys: NDArray[np.str_],
    words: Mapping[str, str],
    columns: Mapping[str, str],
    attributes: Sequence[str] | None = None,
    notes: Sequence[str] = (),
) -> LabelledImages:
    """The images of one set, none of which the paper used.

    Args:    patients: None where the set does not tell.  words: column -> words in captions.
             columns: attribute -> column.  attributes: None: of the default ones those that the set has, or its first.
    Raises:  ValueError: for an attribute that the set does not have.
    """
    images = LabelledImages(
        name=name,
        kind="chest",
        root=root,
        frame=frame,
        files=files,
        attributes=(),
        labels=np.empty((len(frame), 0), dtype=np.float32),
        groups=keys if patients is None else patients,
        keys=keys,
        observations=observations.astype(np.float32),
        counted=(),
        in_paper=np.zeros(len(frame), dtype=bool),
        group_kind="" if patients is None else "patient",
        wording=Radiographs(words),
        columns=columns,
        notes=tuple(notes),
    )
    if attributes is None:
        attributes = [name for name in DEFAULT_ATTRIBUTES if name in columns] or list(columns)[:1]
    return images.with_attributes(attributes)


def attributes_of(words: Mapping[str, str]) -> dict[str, str]:
    """Attribute -> column, named by the words of the captions, so that sets agree on "pleural_effusion"."""
    return {attribute_name(word): column for column, word in words.items()}


def one_hot_of_lists(lists: Sequence[Sequence[str]], known: Sequence[str]) -> pd.DataFrame:
    """(N,) lists of labels -> one column for each that is known: 1 or 0."""
    place = {name: i for i, name in enumerate(known)}
    table = np.zeros((len(lists), len(known)), dtype=np.float32)
    rows = np.repeat(np.arange(len(lists)), [len(labels) for labels in lists])
    table[rows, [place[label] for labels in lists for label in labels]] = 1
    return pd.DataFrame(table, columns=list(known))
