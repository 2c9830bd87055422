"""What all sets of the ISIC archive share: ids that each file writes its own way, one diagnosis an image, artifacts.

isic_inferred_wocarcinoma.csv         probabilities of hair, ruler, ... from a classifier (Bissoto et al. 2022); or
isic_bias.csv                         the same labelled by hand, separated by semicolons

An image without annotations is not an image without artifacts: its labels are NaN.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from ldm.data import captions, places, tables
from ldm.data.labelled import LabelledImages, attribute_name
from ldm.data.wording import Dermoscopies

INFERRED = "isic_inferred_wocarcinoma.csv"
BY_HAND = "isic_bias.csv"
ARTIFACTS = ("hair", "gel_bubble", "ruler", "ink")  # those that the experiment changes
OTHER_ARTIFACTS = ("dark_corner", "gel_border", "patches")
EXTENSION = r"\.(?:png|jpg|jpeg)$"
KEPT = ("MEL", "NV")  # the experiment's


@dataclass(frozen=True)
class Choice:
    """What is read of such a set. Raises ValueError for a threshold that is none."""

    artifacts: Path | str | None = None  # an annotation file; None: the folder's own, if it has one
    threshold: float = 0.9  # a probability from here on, inclusive, is present
    diagnoses: Sequence[str] = KEPT  # the classes to keep; others are left out, and counted

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold: got {self.threshold}, expected 0 < threshold <= 1")


@dataclass(frozen=True, eq=False)
class Labels:
    """A set's own files, read: a row an image, the key by which all files agree as index."""

    path: Path  # the label file
    frame: pd.DataFrame  # its columns, with `image` and `group` (NaN where it is not known)
    diagnoses: pd.DataFrame  # 1, 0, NaN under the names of `captions.DIAGNOSES`
    group_kind: str  # what `group` is: "lesion" | "patient" | ""
    folders: Sequence[str]  # where the images may lie
    notes: tuple[str, ...] = field(default=())


def keyed(path: Path, frame: pd.DataFrame) -> pd.DataFrame:
    """With the id as index by which all files agree: without extension and `_downsampled`."""
    names = tables.names(frame["image"])
    keys = names.str.replace(EXTENSION, "", regex=True).str.removesuffix("_downsampled")
    if (empty := (keys == "").to_numpy()).any():
        raise ValueError(f"{path}, line {tables.line(np.argmax(empty))}: no image is named")
    tables.unique(path, keys)
    return frame.set_index(keys.rename("key"))


def one_hot(path: Path, frame: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Diagnoses as numbers, one of which is 1 in each row. Raises ValueError, with the line, for any other row."""
    numbers = tables.whole(path, frame, columns, "1 or 0", 0, 1)
    if (wrong := (numbers.sum(axis=1) != 1).to_numpy()).any():
        row, count = int(np.argmax(wrong)), int(numbers.sum(axis=1)[wrong].iloc[0])
        name = frame["image"].iloc[row]
        raise ValueError(
            f"{path}, line {tables.line(row)}: {name} has {count} diagnoses, expected one ({wrong.sum()} such rows)"
        )
    return numbers


def named(codes: pd.Series, meanings: dict[str, str]) -> pd.DataFrame:
    """A column of words -> one column for each diagnosis: 1 where a word means it, else 0."""
    told = tables.names(codes).str.strip().str.lower().map(meanings)
    known = [name for name in captions.DIAGNOSES if name in set(meanings.values())]
    return pd.DataFrame({name: (told == name).astype(np.float64) for name in known}, index=codes.index)


def assemble(name: str, root: Path, labels: Labels, choice: Choice, known: Sequence[str]) -> LabelledImages:
    """The images of the chosen diagnoses, with artifacts where they are annotated.

    Args:    known: the diagnoses that the set tells apart.
    Raises:  ValueError: for an unknown diagnosis, or no row left.
    """
    kept = [tables.one_of("diagnoses", code, known) for code in choice.diagnoses]
    frame, observations, notes = labels.frame, labels.diagnoses, list(labels.notes)
    file = _annotations(root, choice)
    if file is not None:
        frame, observations = _with_artifacts(frame, observations, file, choice.threshold)
        if choice.artifacts is None and file.name != INFERRED:
            notes.append(f"artifacts are those of {file}, which lies there (--artifacts names another file)")
    rows = (observations[kept] == 1).any(axis=1).to_numpy()
    if not rows.any():
        raise ValueError(f"{labels.path}: no image with a diagnosis of {', '.join(kept)}")
    if others := int((~rows).sum()):
        left_out = f"{others:,} of {len(rows):,} images are {_none_of(kept)}, and are left out (--diagnoses keeps more)"
        notes.insert(0, left_out)
    frame, observations = frame[rows], observations[rows].astype(np.float32)

    shown = ARTIFACTS if file is not None else ()
    keys = tables.strings(frame.index.to_series())
    experiment = [code for code in KEPT if code in observations]
    values = observations[["MEL", *shown]].to_numpy()
    unknown = np.isnan(values).any(axis=1)
    places_in_file = np.flatnonzero(rows)
    return LabelledImages(
        name=name,
        kind="skin",
        root=root,
        frame=frame.set_index(places_in_file),
        files=places.in_folders(root, labels.folders, tables.names(frame["image"]), ".jpg"),
        attributes=("melanoma", *shown),
        labels=values,
        groups=np.where(frame["group"].isna(), keys, tables.strings(tables.names(frame["group"]))),
        keys=keys,
        observations=observations.set_index(places_in_file),
        counted=(*kept, *shown),
        in_paper=(file is not None) & (observations[experiment] == 1).any(axis=1).to_numpy() & ~unknown,
        group_kind=labels.group_kind,
        wording=Dermoscopies(),
        columns={
            **{attribute_name(words): code for code, words in captions.DIAGNOSES.items() if code in observations},
            **{artifact: artifact for artifact in (*ARTIFACTS, *OTHER_ARTIFACTS) if artifact in observations},
        },
        notes=tuple(notes),
    )


def _none_of(kept: Sequence[str]) -> str:
    return f"neither {' nor '.join(kept)}" if len(kept) > 1 else f"not {kept[0]}"


def _annotations(root: Path, choice: Choice) -> Path | None:
    """The file that was named, or one that lies in the folder: the inferred one before the one by hand."""
    if choice.artifacts is not None:
        return Path(choice.artifacts)
    return next((root / name for name in (INFERRED, BY_HAND) if (root / name).is_file()), None)


def _with_artifacts(
    frame: pd.DataFrame, observations: pd.DataFrame, path: Path, threshold: float
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The probabilities joined to the frame, and what they say to the observations: NaN without annotation."""
    annotations = tables.read(path, ("image", *ARTIFACTS), tables.separator_of(path))
    columns = [name for name in (*ARTIFACTS, *OTHER_ARTIFACTS) if name in annotations]
    numbers = tables.numbers(path, annotations, columns, "a probability from 0 to 1", 0, 1)
    probabilities = numbers.set_index(keyed(path, annotations).index).reindex(frame.index)
    if probabilities.isna().all(axis=None):
        raise ValueError(f"artifacts: none of the {len(annotations):,} images of {path} is in the ground truth")
    present = (probabilities >= threshold).astype(np.float32).where(probabilities.notna())
    return frame.join(probabilities), observations.join(present)
