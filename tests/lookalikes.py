"""Small folders that look like CheXpert and ISIC 2019, made by the tests that read them."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from ldm.data.chexpert import OBSERVATIONS
from ldm.data.isic import DIAGNOSES, INFERRED, METADATA, TRUTH

CHEXPERT_COLUMNS = ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *OBSERVATIONS)
INFERRED_COLUMNS = (
    *("", "image", "dark_corner", "hair", "gel_border", "gel_bubble", "ruler", "ink", "patches", "vasc"),
    *("label", "label_string"),
)


def write_csv(
    path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]], eol: str = "\n", separator: str = ","
) -> Path:
    """Cells that a row leaves out are empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator=eol, delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)
    return path


def radiograph(path: str, **cells: object) -> dict[str, object]:
    """A row of train.csv; a label is given as pleural_effusion=1.0."""
    named = {name.lower().replace(" ", "_"): name for name in OBSERVATIONS}
    view = "Lateral" if path.endswith("lateral.jpg") else "Frontal"
    row = {
        "Path": path,
        "Sex": "Female",
        "Age": 61,
        "Frontal/Lateral": view,
        "AP/PA": "AP" if view == "Frontal" else "",
    }
    return row | {named.get(key, key): value for key, value in cells.items()}


def chexpert(
    folder: Path,
    rows: Iterable[Mapping[str, object]],
    name: str = "train.csv",
    columns: Sequence[str] = CHEXPERT_COLUMNS,
) -> Path:
    """A label file in the folder. Returns the folder."""
    write_csv(folder / name, columns, rows)
    return folder


def many_radiographs(patients: int, each: int = 3) -> list[dict[str, object]]:
    """Patients with some studies; effusion in every second, devices in every third image."""
    return [
        radiograph(
            f"CheXpert-v1.0-small/train/patient{patient:05d}/study{study}/view1_frontal.jpg",
            pleural_effusion=float((patient + study) % 2),
            support_devices=float((patient * each + study) % 3 == 0),
        )
        for patient in range(1, patients + 1)
        for study in range(1, each + 1)
    ]


def isic(
    folder: Path,
    diagnoses: Mapping[str, str],
    lesions: Mapping[str, str] | None = None,
    inferred: Mapping[str, Mapping[str, float]] | None = None,
    number: type = float,
    eol: str = "\n",
) -> Path:
    """An ISIC folder, which is returned.

    Args:    diagnoses, lesions: image -> "MEL", lesion id.  inferred: image -> artifact -> probability.
    """
    truth = [
        {"image": image} | {name: number(name == diagnosis) for name in DIAGNOSES}
        for image, diagnosis in diagnoses.items()
    ]
    write_csv(folder / TRUTH, ("image", *DIAGNOSES), truth, eol)
    if lesions is not None:
        rows = [{"image": image, "lesion_id": lesions.get(image, ""), "sex": "male"} for image in diagnoses]
        write_csv(folder / METADATA, ("image", "age_approx", "anatom_site_general", "lesion_id", "sex"), rows, eol)
    if inferred is not None:
        write_inferred(folder / INFERRED, inferred)
    return folder


def write_inferred(path: Path, inferred: Mapping[str, Mapping[str, float]]) -> Path:
    """The file of probabilities: an index without a name first, "malignant" in every row."""
    rows = [
        dict.fromkeys(INFERRED_COLUMNS, 0.01)
        | {"": i, "image": image, "label": 0, "label_string": "malignant"}
        | values
        for i, (image, values) in enumerate(inferred.items())
    ]
    return write_csv(path, INFERRED_COLUMNS, rows)


def read_rows(path: Path) -> list[dict[str, str]]:
    """All rows of a csv file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def picture(path: Path, size: tuple[int, int] = (20, 16), grey: int = 90) -> Path:
    """A grey JPEG. Args: size: width, height."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, grey).save(path)
    return path
