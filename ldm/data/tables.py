"""Label files: csv tables read by column name and checked, so that a wrong file ends in one line that says where."""

import csv
import gzip
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ldm.names import nearest


def read(path: Path, columns: Sequence[str], separator: str = ",", encoding: str = "utf-8") -> pd.DataFrame:
    """Read a csv file whatever its line ends, the order of its columns, and the columns it has besides.

    Args:    columns: those that must be there.
    Raises:  ValueError: for a file without rows, without one of the columns, or that is no such table.
    """
    try:
        frame = pd.read_csv(path, sep=separator, index_col=False, low_memory=False, encoding=encoding)
    except ValueError as error:  # pandas' parser errors and wrong encodings are ValueErrors without the file's name
        raise ValueError(f"{path}: cannot be read as a csv table: {error}") from None
    if missing := [name for name in columns if name not in frame.columns]:
        raise ValueError(f"{path}: no column {missing[0]!r}{expected(missing[0], frame.columns)}")
    if frame.empty:
        raise ValueError(f"{path}: a header and no rows")
    return frame


def one_of(argument: str, name: str, known: Iterable[str]) -> str:
    """`name` itself, if it is known. Raises ValueError, which offers the nearest that is."""
    known = list(known)
    if name not in known:
        raise ValueError(f"{argument}: got {name!r}{expected(name, known)}")
    return name


def expected(name: str, known: Iterable[str]) -> str:
    """ "; did you mean ...?", or without a near name all that are known."""
    known = [str(other) for other in known]
    return nearest(name, known) or f"; expected one of {', '.join(known)}"


def numbers(
    path: Path, frame: pd.DataFrame, columns: Sequence[str], values: str, low: float, high: float
) -> pd.DataFrame:
    """The columns as float64, NaN where empty.

    Args:    values: what is allowed, in words, for the error.  low, high: the range.
    Raises:  ValueError: for the first cell that is no number or out of the range, with its line in the file.
    """
    table = frame[list(columns)].apply(pd.to_numeric, errors="coerce").astype(np.float64)
    wrong = (table.isna() & frame[list(columns)].notna()) | (table < low) | (table > high)
    _refuse(path, frame, wrong, values)
    return table


def whole(
    path: Path, frame: pd.DataFrame, columns: Sequence[str], values: str, low: float, high: float
) -> pd.DataFrame:
    """`numbers` that must also be whole."""
    table = numbers(path, frame, columns, values, low, high)
    _refuse(path, frame, table.notna() & (table != table.round()), values)
    return table


def _refuse(path: Path, frame: pd.DataFrame, wrong: pd.DataFrame, values: str) -> None:
    rows, places = np.nonzero(wrong.to_numpy())
    if len(rows):
        column = wrong.columns[places[0]]
        got = frame[column].iloc[rows[0]]
        raise ValueError(
            f"{path}, line {line(rows[0])}: {column} is {str(got)!r}, expected {values} ({len(rows)} such cells)"
        )


def unique(path: Path, names: pd.Series) -> None:
    """Raises ValueError when a name comes twice."""
    if (twice := names.duplicated().to_numpy()).any():
        first = int(np.argmax(twice))
        raise ValueError(f"{path}, line {line(first)}: {names.iloc[first]!r} for the second time")


def line(row: int | np.integer) -> int:
    """The line in the file of a row counted from 0: the header is line 1."""
    return int(row) + 2


def names(values: pd.Series) -> pd.Series:
    """The cells as text, "" where empty."""
    return values.astype(object).fillna("").astype(str)


def strings(values: pd.Series) -> NDArray[np.str_]:
    """(N,) as a plain numpy array."""
    return values.to_numpy(dtype=str)


def separator_of(path: Path) -> str:
    """Comma, semicolon or tab, whichever the header has most of."""
    header = first_line(path)
    return max((",", ";", "\t"), key=header.count)


def first_line(path: Path) -> str:
    """The header as it stands there; of a compressed file, too."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig", errors="replace") as file:
        return str(file.readline()).rstrip("\r\n")


def columns_of(path: Path) -> tuple[str, ...] | None:
    """The names in the header; None for a file that has none, or cannot be opened."""
    try:
        header = first_line(path)
        cells = next(csv.reader([header], delimiter=separator_of(path)), [])
    except (OSError, EOFError, UnicodeError, csv.Error):
        return None
    return tuple(cell.strip() for cell in cells) or None
