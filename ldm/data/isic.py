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
EXTENSION = r"\.(?:png|jpg|jpeg)$"


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
    frame, lesions_known = _with_lesions(frame, root / METADATA)
    annotations = Path(artifacts) if artifacts is not None else root / INFERRED
    if annotated := artifacts is not None or annotations.is_file():
        frame, observations = _with_artifacts(frame, observations, annotations, threshold)
    rows = (observations[kept] == 1).any(axis=1).to_numpy()
    if not rows.any():
        raise ValueError(f"{root / TRUTH}: no image with a diagnosis of {', '.join(kept)}")
    frame, observations = frame[rows], observations[rows]

    shown = ARTIFACTS if annotated else ()
    labels = observations[["MEL", *shown]].to_numpy(dtype=np.float32)
    keys = tables.strings(frame.index.to_series())
    in_paper = annotated & (observations[["MEL", "NV"]] == 1).any(axis=1).to_numpy() & ~np.isnan(labels).any(axis=1)
    return LabelledImages(
        name="isic",
        root=root,
        frame=frame.set_index(np.flatnonzero(rows)),
        files=_files(root, frame["image"]),
        attributes=("melanoma", *shown),
        labels=labels,
        groups=np.where(frame["lesion_id"].isna(), keys, tables.strings(tables.names(frame["lesion_id"]))),
        keys=keys,
        observations=observations.set_index(np.flatnonzero(rows)),
        counted=(*kept, *shown),
        in_paper=in_paper,
        group_kind="lesion" if lesions_known else "",
    )


def _keyed(path: Path, frame: pd.DataFrame) -> pd.DataFrame:
    """With the id as index by which all files agree: without extension and `_downsampled`."""
    names = tables.names(frame["image"])
    keys = names.str.replace(EXTENSION, "", regex=True).str.removesuffix("_downsampled")
    if (empty := (keys == "").to_numpy()).any():
        raise ValueError(f"{path}, line {tables.line(np.argmax(empty))}: no image is named")
    tables.unique(path, keys)
    return frame.set_index(keys.rename("key"))


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


def _with_artifacts(
    frame: pd.DataFrame, observations: pd.DataFrame, path: Path, threshold: float
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The probabilities joined to the frame, and what they say to the observations: NaN without annotation."""
    with path.open(encoding="utf-8", errors="replace") as file:
        header = file.readline()
    annotations = tables.read(path, ("image", *ARTIFACTS), ";" if header.count(";") > header.count(",") else ",")
    columns = [name for name in (*ARTIFACTS, *OTHER_ARTIFACTS) if name in annotations]
    numbers = tables.numbers(path, annotations, columns, "a probability from 0 to 1", 0, 1)
    probabilities = numbers.set_index(_keyed(path, annotations).index).reindex(frame.index)
    if probabilities.isna().all(axis=None):
        raise ValueError(f"artifacts: none of the {len(annotations):,} images of {path} is in the ground truth")
    present = (probabilities >= threshold).astype(np.float32).where(probabilities.notna())
    return frame.join(probabilities), observations.join(present)


def _files(root: Path, images: pd.Series) -> NDArray[np.str_]:
    """ISIC_2019_Training_Input/ID.jpg; some copies nest the folder in itself."""
    folders = (root / IMAGES / IMAGES, root / IMAGES)
    folder = next((folder for folder in folders if folder.is_dir()), root / IMAGES)
    return tables.strings(f"{folder}/" + images.str.replace(EXTENSION, "", regex=True) + ".jpg")
