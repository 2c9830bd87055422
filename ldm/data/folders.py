"""The front door: recognise which data set a folder holds, and read it."""

from collections.abc import Sequence
from pathlib import Path

from ldm.data import chexpert, isic
from ldm.data.labelled import LabelledImages

EXPECTED = f"expected CheXpert (train.csv, or CheXpert-v1.0-small/train.csv) or ISIC 2019 ({isic.TRUTH})"
CHEXPERT_PLUS = ("df_chexpert_plus*.csv", "chexbert_labels", "*_fixed.json")


def read(
    root: Path | str,
    *,
    csv: str = "train.csv",
    frontal_only: bool = True,
    uncertain: str = "ones",
    empty: str = "zero",
    attributes: Sequence[str] = chexpert.DEFAULT_ATTRIBUTES,
    artifacts: Path | str | None = None,
    threshold: float = 0.9,
    layout: str = "auto",
) -> LabelledImages:
    """Read CheXpert or ISIC 2019, whichever the folder holds.

    Args:    csv, frontal_only, uncertain, empty, attributes, layout: of CheXpert.  artifacts, threshold: of ISIC 2019.
    Raises:  ValueError: when it holds neither, or what it holds cannot be read.
    """
    root = Path(root)
    if recognise(root, csv) == "isic":
        return isic.read(root, artifacts=artifacts, threshold=threshold)
    if artifacts is not None:
        raise ValueError(f"artifacts: annotations are of ISIC 2019; {root} holds CheXpert")
    return chexpert.read(
        root,
        csv=csv,
        frontal_only=frontal_only,
        uncertain=uncertain,
        empty=empty,
        attributes=attributes,
        layout=layout,
    )


def recognise(root: Path, csv: str = "train.csv") -> str:
    """ "chexpert" or "isic". Raises ValueError, which says what is there and what was expected."""
    if not root.is_dir():
        raise ValueError(f"root: {root} is {'a file' if root.exists() else 'not there'}; {EXPECTED}")
    folders = (root, *(root / name for name in (*chexpert.PREFIXES, chexpert.FIRST_BATCH)))
    radiographs = any((folder / name).is_file() for folder in folders for name in (csv, "train.csv", "valid.csv"))
    dermoscopies = (root / isic.TRUTH).is_file()
    if not (root / "train.csv").is_file() and any(list(root.glob(pattern)) for pattern in CHEXPERT_PLUS):
        raise ValueError(f"root: {root} holds CheXpert Plus, which is not read; {EXPECTED}")
    if radiographs and dermoscopies:
        raise ValueError(f"root: {root} holds both CheXpert and ISIC 2019; move one to a folder of its own")
    if radiographs or dermoscopies:
        return "chexpert" if radiographs else "isic"
    names = sorted(path.name for path in root.iterdir())
    held = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "nothing"
    raise ValueError(f"root: {root} holds {held}; {EXPECTED}")
