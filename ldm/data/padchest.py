"""PadChest (Bustos et al. 2020): a list of labels in one cell, written as Python writes lists.

PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv[.gz]
    ImageID, ImageDir, StudyID, PatientID, Projection, Labels, MethodLabel, ...
0/ ... 54/                                               ImageID, 16-bit PNG
"""

import re
from collections import Counter
from pathlib import Path

import numpy as np

from ldm.data import places, radiography, tables
from ldm.data.labelled import LabelledImages

TABLE = ("PADCHEST_*.csv", "PADCHEST_*.csv.gz")
PROJECTIONS = ("PA", "AP", "AP_horizontal")  # the frontal ones
UNSAID = ("normal", "unchanged", "exclude", "suboptimal study", "")  # labels that name no finding
LABEL = re.compile(r"'([^']*)'|\"([^\"]*)\"")


def read(
    root: Path | str,
    *,
    csv: str = "",
    frontal_only: bool = True,
) -> LabelledImages:
    """Read the label file; the images may be absent.

    Returns: rows in file order; groups are patients; 1 or 0: what the report does not say counts as absent. Images
             labelled "exclude" are left out.
    Raises:  ValueError: for a file that is no such table, or no row left.
    """
    root = Path(root)
    path = places.table_in(root, (csv,) if csv else TABLE)
    if path is None:
        raise ValueError(f"csv: no {csv or TABLE[0]!r} in {root}")
    frame = tables.read(path, ("ImageID", "PatientID", "Projection", "Labels"))
    tables.unique(path, frame["ImageID"])
    lists = [sorted({one or other for one, other in LABEL.findall(cell)}) for cell in tables.names(frame["Labels"])]
    lists = [[label.strip().lower() for label in labels] for labels in lists]
    excluded = np.array(["exclude" in labels or not labels for labels in lists])
    frontal = frame["Projection"].isin(PROJECTIONS).to_numpy()
    rows = ~excluded & (frontal | (not frontal_only))
    if not rows.any():
        raise ValueError(f"{path}: {len(frame):,} rows and no frontal view with labels among them")
    kept = [labels for labels, keep in zip(lists, rows, strict=True) if keep]
    counts = Counter(label for labels in kept for label in labels)
    known = [label for label, _ in counts.most_common()]
    words = {label: label for label in known if label not in UNSAID}
    frame = frame[rows]
    names = tables.names(frame["ImageDir"]) + "/" + frame["ImageID"] if "ImageDir" in frame else frame["ImageID"]
    return radiography.assemble(
        name="padchest",
        root=root,
        frame=frame,
        files=places.in_folders(root, ("[0-9]*", "images", "images-*", ""), names, ".png"),
        observations=radiography.one_hot_of_lists(kept, known).set_index(frame.index),
        patients=np.char.add("patient", tables.strings(frame["PatientID"].astype(str))),
        keys=tables.strings(frame["ImageID"]),
        words=words,
        columns=radiography.attributes_of({label: label for label in known}),
        notes=[f"{(~rows).sum():,} of {len(rows):,} images are excluded, unlabelled or not frontal, and left out"]
        if not rows.all()
        else (),
    )
