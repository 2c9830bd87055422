"""ISIC 2020 (SIIM-ISIC): melanoma or not, the diagnosis where it is told, and patients.

ISIC_2020_Training_GroundTruth[_v2].csv, or Kaggle's train.csv
    image_name, patient_id, [lesion_id,] sex, age_approx, anatom_site_..., diagnosis, benign_malignant, target
train/, jpeg/train/, ISIC_2020_Training_JPEG/train/   ISIC_0015719.jpg, or .dcm
"""

from collections.abc import Sequence
from pathlib import Path

from ldm.data import dermoscopy, places, tables
from ldm.data.dermoscopy import Choice, Labels
from ldm.data.labelled import LabelledImages

TRUTH = ("ISIC_2020_Training_GroundTruth*.csv", "train.csv")
DIAGNOSES = {
    "melanoma": "MEL",
    "nevus": "NV",
    "seborrheic keratosis": "BKL",  # as ISIC 2019 puts these three together
    "lichenoid keratosis": "BKL",
    "solar lentigo": "BKL",
}
FOLDERS = ("jpeg/train", "ISIC_2020_Training_JPEG/train", "ISIC_2020_Training_JPEG", "ISIC_2020_Training_Input")


def read(
    root: Path | str,
    *,
    csv: str = "",
    artifacts: Path | str | None = None,
    threshold: float = 0.9,
    diagnoses: Sequence[str] = dermoscopy.KEPT,
) -> LabelledImages:
    """As of `ldm.data.isic.read`, but groups are patients; most benign images have no diagnosis and are left out.

    Raises:  ValueError: where target and diagnosis contradict each other, too.
    """
    choice, root = Choice(artifacts, threshold, diagnoses), Path(root)
    path = places.table_in(root, (csv,) if csv else TRUTH)
    if path is None:
        raise ValueError(f"csv: no {csv or TRUTH[0]!r} in {root}")
    frame = tables.read(path, ("image_name", "patient_id", "diagnosis", "target"))
    target = tables.whole(path, frame, ("target",), "1 or 0", 0, 1)["target"]
    told = dermoscopy.named(frame["diagnosis"], DIAGNOSES)
    if (differs := (told["MEL"] != target).to_numpy()).any():
        row = int(differs.argmax())
        raise ValueError(
            f"{path}, line {tables.line(row)}: target is {int(target[row])} and diagnosis "
            f"{frame['diagnosis'].iloc[row]!r} ({differs.sum()} such rows)"
        )
    keyed = dermoscopy.keyed(path, frame.assign(image=frame["image_name"], group=frame["patient_id"]))
    labels = Labels(
        path=path,
        frame=keyed,
        diagnoses=told.set_index(keyed.index),
        group_kind="patient",
        folders=(*FOLDERS, "train", "ISIC_2020_Training_Dicom", ""),
    )
    return dermoscopy.assemble("isic2020", root, labels, choice, tuple(told))
