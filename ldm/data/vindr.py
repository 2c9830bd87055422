"""VinDr-CXR (Nguyen et al. 2022): three radiologists an image in training, their consensus in the test set.

annotations/image_labels_train.csv, _test.csv   image_id, [rad_id,] one column a label: 1 or 0; also beside the images
train.csv                                       Kaggle's: image_id, class_name, class_id, rad_id, x_min, ...: boxes
train/, test/                                   IMAGE_ID.dicom, .dcm, .png

Patients are not told.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from ldm.data import places, radiography, tables
from ldm.data.labelled import LabelledImages

LABELS = ("image_labels_train.csv", "image_labels_test.csv")
BOXES = "train.csv"
NOTHING = "No finding"


def read(root: Path | str, *, csv: str = "") -> LabelledImages:
    """Read the labels; a label counts as present where more than half of the image's radiologists gave it.

    Args:    csv: image_labels_test.csv, or another table of one of the two forms (default: training labels).
    Returns: one row an image, in the order in which they come first; every image is a group of its own.
    Raises:  ValueError: for a file that is no such table.
    """
    root = Path(root)
    path = places.table_in(root, (csv,) if csv else (*LABELS, BOXES), ("annotations",))
    if path is None:
        raise ValueError(f"csv: no {csv or LABELS[0]!r} in {root}")
    frame = tables.read(path, ("image_id",))
    votes = _of_boxes(frame) if "class_name" in frame else _of_labels(path, frame)
    shares = votes.groupby(level=0, sort=False).mean()
    observations = (shares > 0.5).astype(np.float32).reset_index(drop=True)
    keys = tables.strings(shares.index.to_series())
    raters = len(votes) / len(shares)
    words = {name: name.title() if name[1:].islower() else name for name in observations if name != NOTHING}
    return radiography.assemble(
        name="vindr",
        root=root,
        frame=pd.DataFrame({"image_id": keys}),
        files=places.in_folders(root, ("train", "test", "images", ""), keys, ".dicom"),
        observations=observations,
        patients=None,
        keys=keys,
        words=words,
        columns=radiography.attributes_of({**words, NOTHING: NOTHING} if NOTHING in observations else words),
        notes=[f"a label is present where more than half of {raters:.1f} radiologists an image gave it"]
        if raters > 1
        else (),
    )


def _of_labels(path: Path, frame: pd.DataFrame) -> pd.DataFrame:
    """A row an image and radiologist, the image as index: 1 or 0."""
    names = [name for name in frame if name not in ("image_id", "rad_id", "Unnamed: 0")]
    return tables.whole(path, frame, names, "1 or 0", 0, 1).set_index(frame["image_id"].astype(str))


def _of_boxes(frame: pd.DataFrame) -> pd.DataFrame:
    """The same of a list of boxes: what a radiologist drew a box around is present."""
    pairs = frame.assign(image_id=frame["image_id"].astype(str), rad_id=frame.get("rad_id", "all"))
    votes = pd.crosstab([pairs["image_id"], pairs["rad_id"]], pairs["class_name"]).clip(upper=1)
    order = pairs["image_id"].drop_duplicates()
    return votes.reset_index("rad_id", drop=True).loc[order].astype(np.float64)
