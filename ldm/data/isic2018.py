"""ISIC 2018, task 3: the images of HAM10000, and AKIEC where ISIC 2019 has AK and SCC.

ISIC2018_Task3_Training_GroundTruth.csv      image, MEL, NV, BCC, AKIEC, BKL, DF, VASC; also in a folder of that name
ISIC2018_Task3_Training_LesionGroupings.csv  image, lesion_id, diagnosis_confirm_type
ISIC2018_Task3_Training_Input/               ISIC_0024306.jpg
"""

from collections.abc import Sequence
from pathlib import Path

from ldm.data import dermoscopy, places, tables
from ldm.data.dermoscopy import Choice, Labels
from ldm.data.labelled import LabelledImages

TRUTH = "ISIC2018_Task3_*_GroundTruth.csv"
LESIONS = "ISIC2018_Task3_*_LesionGroupings.csv"
FOLDERS = ("ISIC2018_Task3_Training_GroundTruth", "ISIC2018_Task3_Test_GroundTruth")
DIAGNOSES = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")


def read(
    root: Path | str,
    *,
    csv: str = TRUTH,
    artifacts: Path | str | None = None,
    threshold: float = 0.9,
    diagnoses: Sequence[str] = dermoscopy.KEPT,
) -> LabelledImages:
    """As of `ldm.data.isic.read`. Args: csv: the ground truth's name, where another part than training is wanted."""
    choice, root = Choice(artifacts, threshold, diagnoses), Path(root)
    path = places.table_in(root, (csv,), FOLDERS)
    if path is None:
        raise ValueError(f"csv: no {csv!r} in {root}")
    frame = tables.read(path, ("image", *DIAGNOSES))
    numbers = dermoscopy.one_hot(path, frame, DIAGNOSES)
    frame = dermoscopy.keyed(path, frame)
    lesions = places.table_in(root, (LESIONS,), FOLDERS)
    notes: tuple[str, ...] = ()
    if lesions is None:
        frame = frame.assign(group=None)
        notes = (f"no {LESIONS}: lesions are unknown, so a grouped split cannot keep their images together",)
    else:
        groups = dermoscopy.keyed(lesions, tables.read(lesions, ("image", "lesion_id")))["lesion_id"]
        frame = frame.assign(group=groups.reindex(frame.index))
    labels = Labels(
        path=path,
        frame=frame,
        diagnoses=numbers.set_index(frame.index),
        group_kind="lesion" if lesions is not None else "",
        folders=("HAM10000_images*", f"{path.stem.removesuffix('_GroundTruth')}_Input"),
        notes=notes,
    )
    return dermoscopy.assemble("isic2018", root, labels, choice, DIAGNOSES)
