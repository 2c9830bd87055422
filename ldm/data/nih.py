"""NIH ChestX-ray14 (Wang et al. 2017): every label that the reports hold, in one cell, separated by pipes.

Data_Entry_2017[_v2020].csv          Image Index, Finding Labels, Follow-up #, Patient ID, ..., View Position, ...
images/, images_001/images/ ...      00000001_000.png
train_val_list.txt, test_list.txt    the official split, which has no validation part; patients are kept together
"""

from pathlib import Path

import numpy as np
import pandas as pd

from ldm.data import places, radiography, tables
from ldm.data.labelled import LabelledImages

TABLE = "Data_Entry_2017*.csv"
LISTS = {"train": "train_val_list.txt", "test": "test_list.txt"}
NOTHING = "No Finding"
# The words of CheXpert where it has the label, so that prompts and classifiers fit both.
WORDS = {
    "Cardiomegaly": "Cardiomegaly",
    "Edema": "Edema",
    "Consolidation": "Consolidation",
    "Pneumonia": "Pneumonia",
    "Atelectasis": "Atelectasis",
    "Pneumothorax": "Pneumothorax",
    "Effusion": "Pleural Effusion",
    "Pleural_Thickening": "Pleural Thickening",
    "Infiltration": "Infiltration",
    "Mass": "Mass",
    "Nodule": "Nodule",
    "Emphysema": "Emphysema",
    "Fibrosis": "Fibrosis",
    "Hernia": "Hernia",
}


def read(root: Path | str, *, csv: str = TABLE) -> LabelledImages:
    """Read the label file; the images may be absent.

    Returns: rows in file order; groups are patients; 1 or 0: what the report does not say counts as absent.
    Raises:  ValueError: for a file that is no such table, or an unknown label.
    """
    root = Path(root)
    path = places.table_in(root, (csv,))
    if path is None:
        raise ValueError(f"csv: no {csv!r} in {root}")
    frame = tables.read(path, ("Image Index", "Finding Labels", "Patient ID"))
    names = tables.names(frame["Image Index"])
    tables.unique(path, names)
    known = [*WORDS, NOTHING]
    cells = tables.names(frame["Finding Labels"])
    lists = [[label.strip() for label in cell.split("|")] for cell in cells]
    for row, labels in enumerate(lists):
        for label in labels:
            tables.one_of(f"{path}, line {tables.line(row)}: Finding Labels", label, known)
    patients = frame["Patient ID"].astype(str).str.zfill(8)
    return radiography.assemble(
        name="nih",
        root=root,
        frame=_with_split(frame, names, root),
        files=places.in_folders(root, ("images_*/images", "images_*", "", "images"), names, ".png"),
        observations=radiography.one_hot_of_lists(lists, known),
        patients=np.char.add("patient", tables.strings(patients)),
        keys=tables.strings(names),
        words=WORDS,
        columns=radiography.attributes_of({**WORDS, NOTHING: NOTHING}),
    )


def _with_split(frame: pd.DataFrame, names: pd.Series, root: Path) -> pd.DataFrame:
    """With the official split as a column, where its two lists are there."""
    parts = {part: root / name for part, name in LISTS.items()}
    if not all(path.is_file() for path in parts.values()):
        return frame
    named = {image: part for part, path in parts.items() for image in path.read_text().split()}
    return frame.assign(split=names.map(named))
