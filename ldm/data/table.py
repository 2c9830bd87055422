"""Any table of one's own: a column of files, columns of labels, perhaps one of patients.

A label column holds 1/0, true/false, yes/no, present/absent, or -1 for uncertain; or words, each of which becomes a
label of its own, several in a cell separated by "|" or ";".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ldm.data import places, radiography, tables
from ldm.data.decode import EXTENSIONS
from ldm.data.labelled import LabelledImages, attribute_name
from ldm.data.wording import Sentence

NUMBERS = {
    **dict.fromkeys(("1", "1.0", "true", "yes", "y", "present", "positive", "ja"), 1.0),
    **dict.fromkeys(("0", "0.0", "false", "no", "n", "absent", "negative", "nein"), 0.0),
    **dict.fromkeys(("-1", "-1.0", "uncertain"), -1.0),
}
GROUPS = ("patient_id", "patient", "patientid", "subject_id", "subject", "lesion_id")
MOST_WORDS = 30  # that a column of words may tell apart
CAPTION = "a medical image[ showing {labels}]"


@dataclass(frozen=True)
class Columns:
    """Which column says what; None: found by its name or its cells, and said."""

    file: str | None = None
    labels: Sequence[str] | None = None
    group: str | None = None


def read(
    root: Path | str,
    labels: Path | str,
    columns: Columns = Columns(),
    *,
    caption: str = CAPTION,
    uncertain: str = "ones",
    empty: str = "zero",
) -> LabelledImages:
    """Read a table of one's own.

    Args:    root: the folder below which the files lie; they may also be named from the table's own folder, or in
             full.  labels: the table, as it is or in `root`.  caption: see `ldm.data.wording.Sentence`.
             uncertain, empty: as of `ldm.data.chexpert.read`.
    Returns: rows in file order; every label is an attribute.
    Raises:  ValueError: for a column that is not there, cannot be told, or has cells that are no labels.
    """
    tables.one_of("uncertain", uncertain, radiography.UNCERTAIN)
    tables.one_of("empty", empty, radiography.EMPTY)
    root, path = Path(root), Path(labels)
    path = path if path.is_file() else root / path
    frame, notes = _read(path)
    file = columns.file or _file_column(root, path, frame)
    group = columns.group or _group_column(frame)
    for argument, name in (("file_column", file), ("group_column", group)):
        if name is not None:
            tables.one_of(argument, name, frame.columns)
    files = tables.names(frame[file])
    _complete(path, files, file)
    raw = _labels(path, frame, columns.labels, {file, group})
    notes += [f"{file!r} is taken for the column of files"] if columns.file is None else []
    notes += [] if columns.group else [_group_note(group)]
    notes += [f"labels are {', '.join(raw)}"] if columns.labels is None else []
    observations = radiography.decided(raw, uncertain, empty)
    known = {attribute_name(name): name for name in raw}
    keys = tables.strings(files)
    groups = keys if group is None else np.where(frame[group].isna(), keys, tables.strings(tables.names(frame[group])))
    images = LabelledImages(
        name="table",
        kind="",
        root=root,
        frame=frame,
        files=_placed(root, path, files),
        attributes=(),
        labels=np.empty((len(frame), 0), dtype=np.float32),
        groups=groups,
        keys=keys,
        observations=observations,
        counted=(),
        in_paper=np.zeros(len(frame), dtype=bool),
        group_kind="" if group is None else ("lesion" if "lesion" in group.lower() else "patient"),
        wording=Sentence(caption, {name: name.replace("_", " ") for name in raw}),
        columns=known,
        notes=tuple(notes),
    )
    return images.with_attributes(list(known))


def _read(path: Path) -> tuple[pd.DataFrame, list[str]]:
    """The table, in UTF-8 or as Excel writes it in the west, and what was noticed."""
    if path.suffix.lower() in (".xlsx", ".xls", ".ods"):
        raise ValueError(f"labels: {path} is a spreadsheet, expected a csv table; save it as one")
    if not path.is_file():
        raise ValueError(f"labels: {path} is not there")
    separator = tables.separator_of(path)
    try:
        return tables.read(path, (), separator), []
    except ValueError as error:
        if "utf-8" not in str(error):
            raise
    return tables.read(path, (), separator, "cp1252"), [f"{path.name} is not in UTF-8, it was read as Windows-1252"]


def _file_column(root: Path, path: Path, frame: pd.DataFrame) -> str:
    """The one column whose cells look like image files, or are some. Raises ValueError where none or several do."""
    texts = [name for name in frame if frame[name].dtype == object or pd.api.types.is_string_dtype(frame[name])]
    columns = [name for name in texts if tables.names(frame[name]).str.lower().str.endswith(EXTENSIONS).mean() > 0.5]
    if not columns:
        columns = [name for name in texts if (root / tables.names(frame[name]).iloc[0]).is_file()]
    if len(columns) != 1:
        among = f"{', '.join(columns)} look like it" if columns else f"it has {', '.join(map(str, frame))}"
        raise ValueError(f"file_column: which column of {path} names the files? {among}")
    return str(columns[0])


def _group_column(frame: pd.DataFrame) -> str | None:
    folded = {attribute_name(str(name)): str(name) for name in frame}
    return next((folded[name] for name in GROUPS if name in folded), None)


def _group_note(group: str | None) -> str:
    if group is None:
        return "no column of patients: images of one patient may come into several parts (--group-column names one)"
    return f"{group!r} is taken for the column of patients or lesions"


def _complete(path: Path, files: pd.Series, column: str) -> None:
    if (missing := (files == "").to_numpy()).any():
        raise ValueError(f"{path}, line {tables.line(np.argmax(missing))}: {column} is empty, expected a file")
    tables.unique(path, files)


def _labels(path: Path, frame: pd.DataFrame, wanted: Sequence[str] | None, others: set[str | None]) -> pd.DataFrame:
    """(N, K) 1, 0, -1, NaN. By default all columns that hold nothing else."""
    if wanted is not None:
        for name in wanted:
            tables.one_of("label_columns", name, frame.columns)
        parts = [_label(path, frame, name) for name in wanted]
    else:
        parts = [_numbers(frame[name]) for name in frame if name not in others and _is_label(frame[name])]
    if not parts:
        raise ValueError(
            f"label_columns: no column of {path} holds 1 and 0, or yes and no, alone; name some of its "
            f"columns {', '.join(map(str, frame))}"
        )
    return pd.concat(parts, axis=1)


def _is_label(cells: pd.Series) -> bool:
    told = _folded(cells)
    return bool(len(told)) and bool(told.isin(NUMBERS).all())


def _folded(cells: pd.Series) -> pd.Series:
    return cells.dropna().astype(str).str.strip().str.lower()


def _numbers(cells: pd.Series) -> pd.DataFrame:
    return _folded(cells).map(NUMBERS).reindex(cells.index).astype(np.float64).to_frame()


def _label(path: Path, frame: pd.DataFrame, name: str) -> pd.DataFrame:
    """A column of numbers as it is; one of words as a label for each word."""
    cells = frame[name]
    if _is_label(cells):
        return _numbers(cells)
    lists = [
        [word.strip() for word in cell.replace(";", "|").split("|") if word.strip()] for cell in tables.names(cells)
    ]
    words = sorted({word for cell in lists for word in cell})
    if len(words) > MOST_WORDS or any(_is_number(word) for word in words):
        shown = ", ".join(words[:3])
        raise ValueError(
            f"label_columns: {name} of {path} holds {len(words)} values, such as {shown}; expected 1, 0, -1, yes, no, "
            f"or at most {MOST_WORDS} words"
        )
    table = radiography.one_hot_of_lists(lists, words).set_index(frame.index).astype(np.float64)
    table[np.array([not cell for cell in lists])] = np.nan
    return table


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _placed(root: Path, path: Path, files: pd.Series) -> NDArray[np.str_]:
    """Below the root or the table's folder, whichever has the first file; or by its name alone, where folders moved."""
    for home in (root, path.parent):
        named = places.there(tables.strings(f"{home}/" + files))
        if any(Path(file).is_file() for file in named[:20]):
            return named
    if files.map(lambda name: Path(name).is_absolute()).all():
        return places.there(tables.strings(files))
    return places.in_folders(root, ("images", "*", ""), files, "")
