"""The label files of phantoms, as CheXpert and ISIC 2019 have theirs, with the gaps that real ones have."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from ldm.data import chexpert, isic
from ldm.phantom.draw import stream
from ldm.phantom.items import Item, Order, draw, groups
from ldm.phantom.prompts import CHEST_LABELS

# fmt: off
CHEXPERT_COLUMNS = ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *chexpert.OBSERVATIONS)
# How often a report that does not affirm the label denies it, counted on the real train.csv: 0.0 / (0.0 + empty)
CHEXPERT_DENIED = {
    "Pleural Effusion": 35_396 / (35_396 + 90_203), "Support Devices": 6_137 / (6_137 + 100_197),
    "Cardiomegaly": 11_116 / (11_116 + 177_211),
}
CHEXPERT_FIRST_VALID_PATIENT = 64_541

ISIC_TRUTH_COLUMNS = ("image", *isic.DIAGNOSES)
ISIC_METADATA_COLUMNS = ("image", "age_approx", "anatom_site_general", "lesion_id", "sex")
ISIC_ARTIFACT_COLUMNS = (
    "", "image", "dark_corner", "hair", "gel_border", "gel_bubble", "ruler", "ink", "patches", "vasc", "label",
    "label_string",
)
ISIC_PROBABILITIES = ISIC_ARTIFACT_COLUMNS[2:10]
ISIC_SITES = ("anterior torso", "head/neck", "lower extremity", "palms/soles", "posterior torso", "upper extremity")
# Shares of the 25,331 real rows
ISIC_MISSING = {"age_approx": 437 / 25_331, "anatom_site_general": 2_631 / 25_331, "lesion_id": 2_084 / 25_331,
                "sex": 384 / 25_331}
ISIC_DOWNSAMPLED = 2_074 / 25_331
# fmt: on


def chexpert_items(order: Order) -> list[Item]:
    """The images of a CheXpert-v1.0-small folder, the last tenth of which are its validation set.

    Patient p has the anatomy of seed0 + p. A quarter of the patients have a second or third study, which shows the
    same anatomy in another state.
    """
    if order.n >= CHEXPERT_FIRST_VALID_PATIENT:
        raise ValueError(
            f"n: got {order.n}, expected < {CHEXPERT_FIRST_VALID_PATIENT} (the validation patients start there)"
        )
    train = _chexpert_train(order.n)
    items: list[Item] = []
    for item in groups("chest", order, starts=(0, train)):
        part = "train" if len(items) < train else "valid"
        first = 1 if part == "train" else CHEXPERT_FIRST_VALID_PATIENT
        key = f"patient{first + item.group:05d}_study{item.index + 1}"
        path = f"CheXpert-v1.0-small/{part}/{key.replace('_', '/')}/view1_frontal.jpg"
        items.append(replace(item, path=path, key=key))
    return items


def write_chexpert_labels(folder: Path, items: Sequence[Item]) -> None:
    """train.csv and valid.csv.

    Reports are drawn too: No Finding for half of the images without a finding, absent attributes left empty as often
    as in the real files, other findings never mentioned; valid.csv is fully 0 / 1.
    """
    root, train = folder / "CheXpert-v1.0-small", _chexpert_train(len(items))
    write_csv(root / "train.csv", CHEXPERT_COLUMNS, (_chexpert_row(item, False) for item in items[:train]))
    write_csv(root / "valid.csv", CHEXPERT_COLUMNS, (_chexpert_row(item, True) for item in items[train:]))


def isic_items(order: Order) -> list[Item]:
    """The images of an ISIC 2019 folder.

    Lesion l has the anatomy of seed0 + l. A quarter of the lesions have a second or third image: the same lesion and
    diagnosis under other artifacts.
    """
    items: list[Item] = []
    for i, item in enumerate(groups("skin", order, starts=(0,), fixed=("melanoma",))):
        key = f"ISIC_{i + 1:07d}"
        name = key + ("_downsampled" if draw(item, "downsampled") < ISIC_DOWNSAMPLED else "")
        items.append(replace(item, path=f"{isic.IMAGES}/{name}.jpg", key=key))
    return items


def write_isic_labels(folder: Path, items: Sequence[Item]) -> None:
    """Ground truth, metadata, and artifacts as probabilities: >= 0.9 where one is present, < 0.5 where not."""
    several = {item.group for item in items if item.index > 0}
    write_csv(folder / isic.TRUTH, ISIC_TRUTH_COLUMNS, map(_isic_truth_row, items))
    rows = (_isic_metadata_row(item, item.group in several) for item in items)
    write_csv(folder / isic.METADATA, ISIC_METADATA_COLUMNS, rows)
    annotations = (_isic_artifact_row(i, item) for i, item in enumerate(items))
    write_csv(folder / isic.INFERRED, ISIC_ARTIFACT_COLUMNS, annotations)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table as the real files are: commas, and lines that end in a newline alone."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def _chexpert_train(n: int) -> int:
    return n - n // 10


def _chexpert_row(item: Item, definite: bool) -> list[object]:
    """One row of train.csv, or with `definite` of valid.csv, where no label is left empty."""
    person = stream(item.seed, "person")
    row: dict[str, object] = dict.fromkeys(CHEXPERT_COLUMNS, "0.0" if definite else "")
    row["Path"], row["Frontal/Lateral"] = item.path, "Frontal"
    row["Sex"], row["Age"] = "Male" if person.random() < 0.55 else "Female", int(person.integers(18, 91))
    row["AP/PA"] = "AP" if draw(item, "AP/PA") < 0.85 else "PA"
    for name, column in CHEST_LABELS.items():
        if name not in item.attributes:
            continue
        if item.attributes[name]:
            row[column] = "1.0"
        elif draw(item, column) < CHEXPERT_DENIED[column]:
            row[column] = "0.0"
    # A device is no finding in the sense of this column
    findings = item.attributes["pleural_effusion"] or item.attributes.get("cardiomegaly", False)
    if not findings and (definite or draw(item, "No Finding") < 0.5):
        row["No Finding"] = "1.0"
    return list(row.values())


def _isic_truth_row(item: Item) -> list[object]:
    diagnosis = "MEL" if item.attributes["melanoma"] else "NV"
    return [Path(item.path).stem, *("1.0" if column == diagnosis else "0.0" for column in ISIC_TRUTH_COLUMNS[1:])]


def _isic_metadata_row(item: Item, several: bool) -> list[object]:
    """`several`: other images show this lesion too, so that its id must not be missing."""
    person = stream(item.seed, "person")
    row: dict[str, object] = {
        "age_approx": f"{5.0 * person.integers(3, 18)}",
        "anatom_site_general": ISIC_SITES[person.integers(len(ISIC_SITES))],
        "lesion_id": f"PHA_{item.group + 1:07d}",
        "sex": "male" if person.random() < 0.53 else "female",
    }
    for column, share in ISIC_MISSING.items():
        if draw(item, column) < share and not (several and column == "lesion_id"):
            row[column] = ""
    return [Path(item.path).stem, *row.values()]


def _isic_artifact_row(i: int, item: Item) -> list[object]:
    row: list[object] = [i, item.key]
    for column in ISIC_PROBABILITIES:
        chance = draw(item, column)
        probability = 0.9 + 0.0999 * chance if item.attributes.get(column, False) else 0.49 * chance**3
        row.append(f"{probability:.6f}")
    return [*row, int(item.attributes["melanoma"]), "malignant"]  # the real file says "malignant" in every row
