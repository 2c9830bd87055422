"""The front door: recognise which data set a folder holds by its label files and their columns, and read it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ldm.data import chexpert, ham10000, isic, isic2018, isic2020, mimic, nih, padchest, table, tables, vindr
from ldm.data.labelled import LabelledImages
from ldm.data.reading import AS_STORED, Reading
from ldm.data.table import Columns

SKIN = ("artifacts", "threshold", "diagnoses")


@dataclass(frozen=True)
class DataSet:
    """How one data set is told from others, and what its reader may be told."""

    title: str
    files: tuple[str, ...]  # patterns of its label file
    columns: tuple[str, ...]  # which that file has; together no other set's has them
    read: Callable[..., LabelledImages]
    options: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()  # where else below the root the label file may lie


SETS = {
    "chexpert": DataSet(
        "CheXpert",
        ("train.csv", "valid.csv"),
        ("Path", "No Finding"),
        chexpert.read,
        ("csv", "frontal_only", "uncertain", "empty", "layout"),
        (*chexpert.PREFIXES, chexpert.FIRST_BATCH),
    ),
    "isic": DataSet("ISIC 2019", (isic.TRUTH,), ("image", *isic.DIAGNOSES), isic.read, SKIN),
    "isic2018": DataSet(
        "ISIC 2018", (isic2018.TRUTH,), ("image", *isic2018.DIAGNOSES), isic2018.read, ("csv", *SKIN), isic2018.FOLDERS
    ),
    "isic2020": DataSet(
        "ISIC 2020", isic2020.TRUTH, ("image_name", "patient_id", "target"), isic2020.read, ("csv", *SKIN)
    ),
    "ham10000": DataSet("HAM10000", ham10000.METADATA, ("lesion_id", "image_id", "dx"), ham10000.read, ("csv", *SKIN)),
    "mimic": DataSet(
        "MIMIC-CXR",
        mimic.LABELS,
        ("subject_id", "study_id", "Pleural Effusion"),
        mimic.read,
        ("csv", "frontal_only", "uncertain", "empty"),
        mimic.FOLDERS,
    ),
    "nih": DataSet("NIH ChestX-ray14", (nih.TABLE,), ("Image Index", "Finding Labels"), nih.read, ("csv",)),
    "padchest": DataSet(
        "PadChest",
        padchest.TABLE,
        ("ImageID", "PatientID", "Projection", "Labels"),
        padchest.read,
        ("csv", "frontal_only"),
    ),
    "vindr": DataSet(
        "VinDr-CXR",
        (*vindr.LABELS, vindr.BOXES),
        ("image_id", "rad_id"),
        vindr.read,
        ("csv",),
        ("annotations",),
    ),
}
EXPECTED = (
    f"expected CheXpert (train.csv, or CheXpert-v1.0-small/train.csv), ISIC 2019 ({isic.TRUTH}), "
    + ", ".join(known.title for name, known in SETS.items() if name not in ("chexpert", "isic"))
    + ", or a table of your own (--labels)"
)
CHEXPERT_PLUS = ("df_chexpert_plus*.csv", "chexbert_labels", "*_fixed.json")
TABLES = ("*.csv", "*.csv.gz", "*.tab", "*.tsv")
DESCRIBED = 3  # tables of a folder that is not understood
NAMED = 12  # columns of each


def read(
    root: Path | str,
    *,
    data_set: str | None = None,
    csv: str | None = None,
    attributes: Sequence[str] | None = None,
    uncertain: str | None = None,
    empty: str | None = None,
    frontal_only: bool | None = None,
    layout: str | None = None,
    artifacts: Path | str | None = None,
    threshold: float | None = None,
    diagnoses: Sequence[str] | None = None,
    labels: Path | str | None = None,
    columns: Columns | None = None,
    caption: str | None = None,
    reading: Reading = AS_STORED,
) -> LabelledImages:
    """Read the data set that a folder holds; what is None is as its reader has it.

    Args:    data_set: one of SETS, where a folder holds several.  csv: the label file's name.
             attributes: labels that `LabelledImages.labels` holds.
             uncertain, empty, frontal_only, layout: of chests, see `ldm.data.chexpert`.
             artifacts, threshold, diagnoses: of skin, see `ldm.data.isic`.
             labels, columns, caption: a table of one's own, see `ldm.data.table`.
             reading: how the image files become pixels.
    Raises:  ValueError: when it holds none, when what it holds cannot be read, or for an option that the set lacks.
    """
    root = Path(root)
    policies: dict[str, Any] = {"uncertain": uncertain, "empty": empty}
    of_sets: dict[str, Any] = {"csv": csv, "frontal_only": frontal_only, "layout": layout, **policies}
    of_sets |= {"artifacts": artifacts, "threshold": threshold, "diagnoses": diagnoses}
    given = {name: value for name, value in of_sets.items() if value is not None}
    if labels is not None:
        refuse_idle(given | ({"data_set": data_set} if data_set else {}), tuple(policies), "a table of your own")
        images = table.read(root, labels, columns or Columns(), caption=caption or table.CAPTION, **given)
    elif columns is not None or caption is not None:
        raise ValueError("columns: file, label and group columns and captions belong to --labels, which is missing")
    else:
        name, file = _recognised(root, csv, data_set)
        refuse_idle(given, SETS[name].options, SETS[name].title, root)
        images = SETS[name].read(root, **(given if file is None else given | {"csv": file}))
    return replace(images if attributes is None else images.with_attributes(attributes), reading=reading)


def refuse_idle(given: Mapping[str, Any], known: Sequence[str], title: str, root: Path | None = None) -> None:
    """ValueError for an option that would do nothing."""
    for name in given:
        if name == "artifacts" and name not in known:
            raise ValueError(f"artifacts: annotations are of ISIC 2019; {root or 'this'} holds {title}")
        if name not in known:
            raise ValueError(f"{name}: {title} has no such option; it has {', '.join(known)}")


def recognise(root: Path | str, csv: str | None = None) -> str:
    """The name of the data set, one of SETS. Raises ValueError, which says what is there and what was expected."""
    return _recognised(Path(root), csv, None)[0]


def _recognised(root: Path, csv: str | None, data_set: str | None) -> tuple[str, str | None]:
    """The data set, and the name of its label file where that is not the set's own."""
    if not root.is_dir():
        raise ValueError(f"root: {root} is {'a file' if root.exists() else 'not there'}; {EXPECTED}")
    if not (root / "train.csv").is_file() and any(list(root.glob(pattern)) for pattern in CHEXPERT_PLUS):
        raise ValueError(f"root: {root} holds CheXpert Plus, which is not read; {EXPECTED}")
    if data_set is not None:
        return tables.one_of("data_set", data_set, SETS), None
    sets = [name for name, known in SETS.items() if _holds(root, known, csv)]
    if len(sets) > 1:
        titles = " and ".join(SETS[name].title for name in sets)
        raise ValueError(f"root: {root} holds both {titles}; move one to a folder of its own, or name one (--set)")
    if sets:
        return sets[0], None
    for path in _tables(root):  # renamed
        header = tables.columns_of(path) or ()
        for name, known in SETS.items():
            if set(known.columns) <= set(header) and "csv" in known.options and known.title != "MIMIC-CXR":
                return name, path.name
    raise ValueError(f"root: {root} holds {_contents(root)}; {EXPECTED}")


def _holds(root: Path, known: DataSet, csv: str | None) -> bool:
    """By the name of a label file and the columns that it must have; an empty file counts by its name."""
    wanted = (csv, *known.files) if csv and "csv" in known.options else known.files
    for folder in (root, *(root / name for name in known.folders)):
        for path in (path for pattern in wanted for path in folder.glob(pattern) if path.is_file()):
            header = tables.columns_of(path)
            if header is None:
                if path.name != "train.csv" or known.title == "CheXpert":
                    return True
            elif set(known.columns) <= set(header):
                return True
    return False


def _tables(root: Path) -> list[Path]:
    return sorted(path for pattern in TABLES for path in root.glob(pattern) if path.is_file())


def _contents(root: Path) -> str:
    """What a folder that is not understood has: its tables' columns and the set that they resemble, or its names."""
    described = [_description(path) for path in _tables(root)[:DESCRIBED] if tables.columns_of(path)]
    if described:
        return "; ".join(described)
    names = sorted(path.name for path in root.iterdir())
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "nothing"


def _description(path: Path) -> str:
    header = tables.columns_of(path) or ()
    shown = ", ".join(header[:NAMED]) + (f" and {len(header) - NAMED} more" if len(header) > NAMED else "")
    shares = {name: len(set(known.columns) & set(header)) / len(known.columns) for name, known in SETS.items()}
    nearest = max(shares, key=lambda name: shares[name])
    if shares[nearest] < 0.5:
        return f"{path.name} (columns {shown})"
    missing = [name for name in SETS[nearest].columns if name not in header]
    return f"{path.name} (columns {shown}; most like {SETS[nearest].title}, which also has {', '.join(missing)})"
