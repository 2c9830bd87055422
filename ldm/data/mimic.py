"""MIMIC-CXR-JPG 2.0 and 2.1 (Johnson et al. 2019): CheXpert's 14 labels of each study, views and split of each image.

mimic-cxr-2.0.0-chexpert.csv[.gz]    subject_id, study_id, Atelectasis, ...: 1, 0, -1, or empty; or -negbio
mimic-cxr-2.0.0-metadata.csv[.gz]    dicom_id, subject_id, study_id, ViewPosition, ...
mimic-cxr-2.0.0-split.csv[.gz]       dicom_id, study_id, subject_id, split
files/p10/p10000032/s50414267/       DICOM_ID.jpg; of MIMIC-CXR itself: DICOM_ID.dcm
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ldm.data import captions, chexpert, places, radiography, tables
from ldm.data.labelled import LabelledImages

LABELS = ("mimic-cxr-*-chexpert.csv", "mimic-cxr-*-chexpert.csv.gz", "mimic-cxr-*-negbio.csv*")
METADATA = ("mimic-cxr-*-metadata.csv", "mimic-cxr-*-metadata.csv.gz")
SPLIT = ("mimic-cxr-*-split.csv", "mimic-cxr-*-split.csv.gz")
FOLDERS = ("mimic-cxr-jpg", "MIMIC-CXR-JPG")
PARTS = {"train": "train", "validate": "validation", "test": "test"}  # its words -> ours


def read(
    root: Path | str,
    *,
    csv: str = "",
    frontal_only: bool = True,
    uncertain: str = "ones",
    empty: str = "zero",
    attributes: Sequence[str] = chexpert.DEFAULT_ATTRIBUTES,
) -> LabelledImages:
    """Read the three tables, joined by image; policies as of `ldm.data.chexpert.read`.

    Args:    frontal_only: only views AP and PA.
    Returns: rows in the order of the metadata; groups are patients; the column `split` of the frame is the official
             one, where its file is there.
    Raises:  ValueError: for a file that is no such table or is missing, an unknown option, or no row left.
    """
    tables.one_of("uncertain", uncertain, radiography.UNCERTAIN)
    tables.one_of("empty", empty, radiography.EMPTY)
    root = Path(root)
    label_file, metadata_file = (_required(root, patterns) for patterns in ((csv,) if csv else LABELS, METADATA))
    names = sorted(chexpert.OBSERVATIONS)
    studies = tables.read(label_file, ("subject_id", "study_id", *names))
    values = tables.whole(label_file, studies, names, "1, 0, -1 or empty", -1, 1)
    tables.unique(label_file, studies["study_id"])
    images = tables.read(metadata_file, ("dicom_id", "subject_id", "study_id", "ViewPosition"))
    tables.unique(metadata_file, images["dicom_id"])
    frame = images.join(values.set_index(studies["study_id"]), on="study_id")
    labelled = images["study_id"].isin(studies["study_id"]).to_numpy()
    frontal = images["ViewPosition"].isin(radiography.FRONTAL).to_numpy()
    rows = labelled & (frontal | (not frontal_only))
    if not rows.any():
        raise ValueError(f"{metadata_file}: {len(images):,} images, {labelled.sum():,} of them labelled, none frontal")
    notes = [f"{(~rows).sum():,} of {len(rows):,} images have no labels or no frontal view, and are left out"]
    frame = _with_split(frame, root)[rows]
    patients, study = frame["subject_id"].astype(str), frame["study_id"].astype(str)
    keys = "p" + patients.str[:2] + "/p" + patients + "/s" + study + "/" + frame["dicom_id"].astype(str)
    home = next((folder for folder in (root, label_file.parent) if (folder / "files").is_dir()), label_file.parent)
    return radiography.assemble(
        name="mimic",
        root=root,
        frame=frame,
        files=places.there(tables.strings(f"{home}/files/" + keys + ".jpg")),
        observations=radiography.decided(frame[list(chexpert.OBSERVATIONS)], uncertain, empty),
        patients=np.char.add("p", tables.strings(patients)),
        keys=tables.strings(keys),
        words={name: name for name in captions.CHEXPERT_CAPTION_LABELS},
        columns=chexpert.ATTRIBUTES,
        attributes=attributes,
        notes=notes if not rows.all() else (),
    )


def _required(root: Path, patterns: Sequence[str]) -> Path:
    path = places.table_in(root, patterns, FOLDERS)
    if path is None:
        raise ValueError(f"root: {root} has no {patterns[0]}, which MIMIC-CXR's labels need beside them")
    return path


def _with_split(frame: pd.DataFrame, root: Path) -> pd.DataFrame:
    """With the official split as a column, in this project's words."""
    path = places.table_in(root, SPLIT, FOLDERS)
    if path is None:
        return frame
    table = tables.read(path, ("dicom_id", "split"))
    tables.unique(path, table["dicom_id"])
    for name in table["split"].astype(str).unique():
        tables.one_of(f"{path}, split", name, PARTS)
    return frame.join(table.set_index("dicom_id")["split"].map(PARTS), on="dicom_id")
