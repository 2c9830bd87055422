"""ISIC 2019: ground truth, metadata, and the artifact annotations of Bissoto et al. (2022).

ISIC_2019_Training_GroundTruth.csv    image, MEL, NV, ...: one diagnosis each
ISIC_2019_Training_Metadata.csv       image, lesion_id, ...: which images show the same lesion
ISIC_2019_Training_Input/             ISIC_0000000.jpg, ISIC_0000001_downsampled.jpg
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from ldm.data import dermoscopy, tables
from ldm.data.dermoscopy import ARTIFACTS, INFERRED, OTHER_ARTIFACTS, Choice, Labels
from ldm.data.labelled import LabelledImages

__all__ = ["ARTIFACTS", "DIAGNOSES", "IMAGES", "INFERRED", "METADATA", "OTHER_ARTIFACTS", "TRUTH", "read"]
logger = logging.getLogger(__name__)

TRUTH = "ISIC_2019_Training_GroundTruth.csv"
METADATA = "ISIC_2019_Training_Metadata.csv"
IMAGES = "ISIC_2019_Training_Input"
DIAGNOSES = ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK")


def read(
    root: Path | str,
    *,
    artifacts: Path | str | None = None,
    threshold: float = 0.9,
    diagnoses: Sequence[str] = dermoscopy.KEPT,
) -> LabelledImages:
    """Read the label files; the images may be absent.

    Args:    root: the folder of the ground truth.  artifacts: an annotation file; by default the folder's own, if it
             has one; without any, "melanoma" is the only attribute.
             threshold: a probability from here on, inclusive, is present.  diagnoses: the classes to keep.
    Returns: rows in the order of the ground truth; groups are lesions.
    Raises:  ValueError: for a file that is no such table, an unknown diagnosis, or no row left.
    """
    choice = Choice(artifacts, threshold, diagnoses)
    root = Path(root)
    path = root / TRUTH
    frame = tables.read(path, ("image", *DIAGNOSES))
    numbers = dermoscopy.one_hot(path, frame, DIAGNOSES)
    frame = dermoscopy.keyed(path, frame)
    joined, known = _with_lesions(frame, root / METADATA)
    labels = Labels(
        path=path,
        frame=joined.assign(group=joined["lesion_id"]),
        diagnoses=numbers.set_index(frame.index),
        group_kind="lesion" if known else "",
        folders=(f"{IMAGES}/{IMAGES}", IMAGES),  # some copies nest the folder in itself
    )
    return dermoscopy.assemble("isic", root, labels, choice, DIAGNOSES)


def _with_lesions(frame: pd.DataFrame, path: Path) -> tuple[pd.DataFrame, bool]:
    """The columns of the metadata joined, and whether there are any."""
    if not path.is_file():
        logger.warning(
            "%s is not there: lesions are unknown, so a grouped split cannot keep their images together", path
        )
        return frame.assign(lesion_id=None), False
    metadata = dermoscopy.keyed(path, tables.read(path, ("image", "lesion_id")))
    return frame.join(metadata.drop(columns=[name for name in metadata if name in frame])), True
