"""ISIC 2019: ground truth, metadata, and the artifact annotations of Bissoto et al. (2022).

ISIC_2019_Training_GroundTruth.csv    image, MEL, NV, ...: one diagnosis each
ISIC_2019_Training_Metadata.csv       image, lesion_id, ...: which images show the same lesion
ISIC_2019_Training_Input/             ISIC_0000000.jpg, ISIC_0000001_downsampled.jpg
isic_inferred_wocarcinoma.csv         probabilities of hair, ruler, ... from a classifier; or
isic_bias.csv                         the same labelled by hand, separated by semicolons

An image without annotations is not an image without artifacts: its labels are NaN.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ldm.data import tables
from ldm.data.labelled import LabelledImages

logger = logging.getLogger(__name__)

TRUTH = "ISIC_2019_Training_GroundTruth.csv"
METADATA = "ISIC_2019_Training_Metadata.csv"
IMAGES = "ISIC_2019_Training_Input"
INFERRED = "isic_inferred_wocarcinoma.csv"

DIAGNOSES = ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK")
ARTIFACTS = ("hair", "gel_bubble", "ruler", "ink")  # those that the experiment changes
OTHER_ARTIFACTS = ("dark_corner", "gel_border", "patches")


def read(
    root: Path | str,
    *,
    artifacts: Path | str | None = None,
    threshold: float = 0.9,
    diagnoses: Sequence[str] = ("MEL", "NV"),
) -> LabelledImages:
    """Read the label files; the images may be absent.

    Args:    root: the folder of the ground truth.  artifacts: an annotation file; by default the inferred one of the
             folder, if it is there; without any, "melanoma" is the only attribute.
             threshold: a probability from here on, inclusive, is present.  diagnoses: the classes to keep.
    Returns: rows in the order of the ground truth; groups are lesions.
    Raises:  ValueError: for a file that is no such table, an unknown diagnosis, or no row left.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold: got {threshold}, expected 0 < threshold <= 1")
    kept = [tables.one_of("diagnoses", name, DIAGNOSES) for name in diagnoses]
    root = Path(root)
    frame, observations = _truth(root / TRUTH)
    frame, known = _with_lesions(frame, root / METADATA)
    annotations = Path(artifacts) if artifacts is not None else root / INFERRED
    if annotated := artifacts is not None or annotations.is_file():
        probabilities = _annotations(annotations, frame.index)
        frame = frame.join(probabilities)
        observations = observations.join((probabilities >= threshold).astype(np.float32).where(probabilities.notna()))
    rows = (observations[kept] == 1).any(axis=1).to_numpy()
    if not rows.any():
        raise ValueError(f"{root / TRUTH}: no image with a diagnosis of {kept}")
    frame, observations = frame[rows], observations[rows]
    columns = ("MEL", *ARTIFACTS) if annotated else ("MEL",)
    labels = observations[list(columns)].to_numpy(dtype=np.float32)
    in_paper = annotated & (observations[["MEL", "NV"]] == 1).any(axis=1).to_numpy() & ~np.isnan(labels).any(axis=1)
    keys = tables.strings(frame.index.to_series())
    return LabelledImages(
        name="isic",
        root=root,
        frame=frame.set_index(np.flatnonzero(rows)),
        files=_files(root, frame["image"]),
        attributes=("melanoma", *columns[1:]),
        labels=labels,
        groups=np.where(frame["lesion_id"].isna(), keys, tables.strings(frame["lesion_id"].astype(str))),
        keys=keys,
        observations=observations.set_index(np.flatnonzero(rows)),
        counted=(*kept, *columns[1:]),
        in_paper=in_paper,
        group_kind="lesion" if known else "",
    )


def _key(ids: pd.Series) -> pd.Series:
    """The id by which all files agree: without extension and `_downsampled`."""
    return ids.astype(str).str.replace(r"(?:_downsampled)?(?:\.(?:png|jpg|jpeg))?$", "", regex=True)


def _keyed(path: Path, frame: pd.DataFrame) -> pd.DataFrame:
    keyed = frame.set_index(_key(frame["image"]).rename("key"))
    tables.unique(path, keyed.index.to_series())
    return keyed


def _truth(path: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The file's columns, and the diagnoses as numbers, both with the key as index."""
    frame = tables.read(path, ("image", *DIAGNOSES))
    numbers = tables.whole(path, frame, DIAGNOSES, "1 or 0", 0, 1)
    if (wrong := (numbers.sum(axis=1) != 1).to_numpy()).any():
        row, count = int(np.argmax(wrong)), int(numbers.sum(axis=1)[wrong].iloc[0])
        name = frame["image"].iloc[row]
        raise ValueError(
            f"{path}, line {tables.line(row)}: {name} has {count} diagnoses, expected one ({wrong.sum()} such rows)"
        )
    keyed = _keyed(path, frame)
    return keyed, numbers.set_index(keyed.index)


def _with_lesions(frame: pd.DataFrame, path: Path) -> tuple[pd.DataFrame, bool]:
    """The columns of the metadata joined, and whether there are any."""
    if not path.is_file():
        logger.warning(
            "%s is not there: lesions are unknown, so a grouped split cannot keep their images together", path
        )
        return frame.assign(lesion_id=None), False
    metadata = _keyed(path, tables.read(path, ("image", "lesion_id")))
    return frame.join(metadata.drop(columns=[name for name in metadata if name in frame])), True


def _annotations(path: Path, keys: pd.Index) -> pd.DataFrame:
    """Probabilities of the artifacts for each key, NaN for those without annotations."""
    with path.open(encoding="utf-8", errors="replace") as file:
        header = file.readline()
    separator = ";" if header.count(";") > header.count(",") else ","
    frame = tables.read(path, ("image", *ARTIFACTS), separator)
    columns = [name for name in frame if name in (*ARTIFACTS, *OTHER_ARTIFACTS)]
    numbers = tables.numbers(path, frame, columns, "a probability in 0..1", 0, 1)
    table = numbers.set_index(_keyed(path, frame).index).reindex(keys)
    if table.isna().all(axis=None):
        raise ValueError(f"artifacts: none of the {len(frame)} images of {path} is in the ground truth")
    return table


def _files(root: Path, images: pd.Series) -> NDArray[np.str_]:
    """ISIC_2019_Training_Input/ID.jpg; some copies nest the folder in itself."""
    folders = (root / IMAGES / IMAGES, root / IMAGES)
    folder = next((folder for folder in folders if folder.is_dir()), root / IMAGES)
    return tables.strings(f"{folder}/" + images.astype(str) + ".jpg")
