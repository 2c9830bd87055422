"""The options by which every command reads a folder of labelled images."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ldm.data import chexpert, folders, radiography
from ldm.data.labelled import LabelledImages
from ldm.data.table import CAPTION, Columns
from ldm_tools.pixels import add_pixels, pixels

FOLDER = "CheXpert, MIMIC-CXR, NIH ChestX-ray14, PadChest, VinDr-CXR, ISIC 2018-2020, HAM10000, or phantoms"


def add_reading(parser: argparse.ArgumentParser, attributes: str) -> None:
    """Describe the options to `parser`; what is not typed is None, and as the data set has it.

    Args:    attributes: what the command does with those that are named.
    """
    group = parser.add_argument_group("the labels")
    group.add_argument("--set", choices=folders.SETS, help="which data set, where a folder holds several")
    group.add_argument("--csv", help="the label file's name (default: the data set's own, such as train.csv)")
    group.add_argument("--attributes", nargs="+", metavar="NAME", help=f"{attributes}: a,b or a b")
    group.add_argument("--uncertain", choices=radiography.UNCERTAIN, help="what -1 means (default ones)")
    group.add_argument("--empty", choices=radiography.EMPTY, help="what an empty cell means (default zero)")
    group.add_argument("--all-views", action="store_true", help="of chests: lateral images too")
    group.add_argument("--layout", choices=chexpert.LAYOUTS, help="of CheXpert: how the images were unpacked")
    group.add_argument(
        "--artifacts",
        type=Path,
        metavar="FILE",
        help="of skin: annotations, inferred or by hand (default: the folder's)",
    )
    group.add_argument("--threshold", type=float, help="of skin: probability that is present (default 0.9)")
    group.add_argument(
        "--diagnoses",
        nargs="+",
        metavar="CODE",
        help="of skin: classes to keep, such as MEL,NV,BCC (default MEL,NV)",
    )
    own = parser.add_argument_group("a table of your own")
    own.add_argument("--labels", type=Path, metavar="TABLE.csv", help="any csv with a column of files")
    own.add_argument("--file-column", metavar="NAME", help="of the image files (default: the one that looks like it)")
    own.add_argument("--label-columns", nargs="+", metavar="NAME", help="default: all that hold 1, 0, yes, no alone")
    own.add_argument("--group-column", metavar="NAME", help="of patients (default: one that is called so)")
    own.add_argument(
        "--caption",
        help=f"{{labels}} are those present, [...] is left out if none is (default: {CAPTION!r})",
    )
    add_pixels(parser)


def listed(values: Sequence[str] | None) -> list[str] | None:
    """ "a,b" "c" -> a, b, c."""
    return None if values is None else [name.strip() for value in values for name in value.split(",") if name.strip()]


def read(folder: Path, args: argparse.Namespace) -> LabelledImages:
    """The images of a folder as the options say. Raises ValueError for options that do not fit it."""
    labels, group = listed(args.label_columns), args.group_column
    columns = Columns(args.file_column, labels, group) if args.file_column or labels or group else None
    return folders.read(
        folder,
        data_set=args.set,
        labels=args.labels,
        columns=columns,
        reading=pixels(args),
        csv=args.csv,
        attributes=listed(args.attributes),
        uncertain=args.uncertain,
        empty=args.empty,
        frontal_only=False if args.all_views else None,
        layout=args.layout,
        artifacts=args.artifacts,
        threshold=args.threshold,
        diagnoses=listed(args.diagnoses),
        caption=args.caption,
    )
