"""HAM10000 (Tschandl et al. 2018), as the Dataverse and Kaggle hand it out.

HAM10000_metadata[.csv | .tab]            lesion_id, image_id, dx, dx_type, age, sex, localization[, dataset]
HAM10000_images_part_1/, _part_2/         ISIC_0027419.jpg
"""

from collections.abc import Sequence
from pathlib import Path

from ldm.data import dermoscopy, places, tables
from ldm.data.dermoscopy import Choice, Labels
from ldm.data.labelled import LabelledImages

METADATA = ("HAM10000_metadata.csv", "HAM10000_metadata.tab", "HAM10000_metadata")
DIAGNOSES = {name.lower(): name for name in ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")}


def read(
    root: Path | str,
    *,
    csv: str = "",
    artifacts: Path | str | None = None,
    threshold: float = 0.9,
    diagnoses: Sequence[str] = dermoscopy.KEPT,
) -> LabelledImages:
    """As of `ldm.data.isic.read`. Args: csv: the table's name, if another than those above."""
    choice, root = Choice(artifacts, threshold, diagnoses), Path(root)
    path = places.table_in(root, (csv,) if csv else METADATA)
    if path is None:
        raise ValueError(f"csv: no {csv or METADATA[0]!r} in {root}")
    frame = tables.read(path, ("lesion_id", "image_id", "dx"), tables.separator_of(path))
    for code in tables.names(frame["dx"]).str.lower().unique():
        tables.one_of(f"{path}, dx", code, DIAGNOSES)
    frame = dermoscopy.keyed(path, frame.assign(image=frame["image_id"], group=frame["lesion_id"]))
    labels = Labels(
        path=path,
        frame=frame,
        diagnoses=dermoscopy.named(frame["dx"], DIAGNOSES),
        group_kind="lesion",
        folders=("HAM10000_images_part_*", "HAM10000_images*", "ISIC2018_Task3_*_Input", "images", ""),
    )
    return dermoscopy.assemble("ham10000", root, labels, choice, tuple(DIAGNOSES.values()))
