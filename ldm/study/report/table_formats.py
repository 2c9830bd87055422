"""One table as Markdown, CSV and LaTeX.

Markdown and LaTeX round to three decimals; CSV keeps every digit, with the ends of an interval in columns of their own.
What was not measured is "-", and in CSV an empty cell.
"""

import csv as csv_files
import io
import re
from dataclasses import dataclass

from ldm.study.report.results import Estimate

Cell = str | int | float | Estimate | None

MISSING = "-"
PRINTED_NUMBER = re.compile(r"\d+(\.\d+)?")
MAX_ROWS_OF_A_FLOAT = 45  # what a page holds; a longer table breaks across pages
MAX_COLUMNS_OF_FOOTNOTE_SIZE = 8  # what 6.875 in hold; a wider table is set a size smaller
# With more columns, or more of intervals, an interval stands under its value.
MAX_COLUMNS_ABREAST = 12
MAX_INTERVALS_ABREAST = 3

LATEX_ESCAPES = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}


@dataclass(frozen=True)
class Table:
    """What a table says, in no format yet.

    columns: their heads; a line break in one is kept where the format can.  rows: one cell a column, None where
    nothing was measured.  note: what a reader must know, in sentences, `code` between backticks; may be empty.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


def markdown(table: Table) -> str:
    """A pipe table under its title, intervals in brackets."""
    text = _text_columns(table)
    lines = [
        _pipes([head.replace("\n", " ") for head in table.columns]),
        _pipes(["---" if is_text else "---:" for is_text in text]),
        *(_pipes([_plain(cell) for cell in row]) for row in table.rows),
    ]
    note = [table.note.replace("<", "&lt;"), ""] if table.note else []
    return "\n".join([f"**{table.title}**", "", *lines, "", *note])


def csv(table: Table) -> str:
    """Heads and rows with full precision; a column with intervals is followed by its low and high ends."""
    with_interval = _interval_columns(table)
    heads: list[str] = []
    for head, wide in zip(table.columns, with_interval, strict=True):
        name = head.replace("\n", " ")
        heads += [name, f"{name}: low", f"{name}: high"] if wide else [name]
    text = io.StringIO()
    writer = csv_files.writer(text, lineterminator="\n")
    writer.writerow(heads)
    for row in table.rows:
        writer.writerow([part for cell, wide in zip(row, with_interval, strict=True) for part in _exact(cell, wide)])
    return text.getvalue()


def latex(table: Table) -> str:
    """A booktabs table; a long one is a longtable, which breaks across pages and wants a page of one column."""
    long = len(table.rows) > MAX_ROWS_OF_A_FLOAT
    sides = ["l" if is_text else "r" for is_text in _text_columns(table)]
    heads = " & ".join(_latex_head(head, side) for head, side in zip(table.columns, sides, strict=True))
    body = [r"\toprule", heads + r" \\", r"\midrule", *([r"\endhead"] if long else []), *_latex_rows(table)]
    columns = f"@{{}}{''.join(sides)}@{{}}"
    caption, note = rf"\caption{{{escape(table.title)}}}", _latex_note(table.note)
    if long:
        inside = [rf"\begin{{longtable}}{{{columns}}}", caption + r" \\", *body, r"\bottomrule", r"\end{longtable}"]
        lines = ["{" + _latex_size(r"\scriptsize"), *inside, *([r"\noindent " + note] if note else []), "}"]
    else:
        inside = [rf"\begin{{tabular}}{{{columns}}}", *body, r"\bottomrule", r"\end{tabular}"]
        below = [r"\par\smallskip", rf"\parbox{{0.97\textwidth}}{{\scriptsize {note}}}"] if note else []
        size = r"\scriptsize" if len(table.columns) > MAX_COLUMNS_OF_FOOTNOTE_SIZE else r"\footnotesize"
        head = [r"\begin{table*}[t]", r"\centering", _latex_size(size), caption, r"\smallskip"]
        lines = [*head, *inside, *below, r"\end{table*}"]
    return "\n".join([r"% \usepackage{booktabs,longtable}", *lines, ""])


def escape(text: str) -> str:
    """Text as LaTeX shows it: no sign of it is taken for a command."""
    return "".join(LATEX_ESCAPES.get(sign, sign) for sign in text)


# ---- cells and columns -----------------------------------------------------------------------------


def _rounded(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:z.3f}"


def _plain(cell: Cell) -> str:
    if cell is None or cell == "":
        return MISSING
    if isinstance(cell, str):
        return cell.replace("|", r"\|")
    if not isinstance(cell, Estimate):
        return _rounded(cell)
    if cell.low is None or cell.high is None:
        return _rounded(cell.value)
    return f"{_rounded(cell.value)} [{_rounded(cell.low)}, {_rounded(cell.high)}]"


def _exact(cell: Cell, with_interval: bool) -> list[str]:
    parts = [cell.value, cell.low, cell.high] if isinstance(cell, Estimate) else [cell, None, None]
    shown = ["" if part is None else part if isinstance(part, str) else repr(part) for part in parts]
    return shown if with_interval else shown[:1]


def _pipes(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _text_columns(table: Table) -> list[bool]:
    """Which columns hold words: they stand to the left, numbers to the right, also those quoted as printed."""
    columns = zip(*table.rows, strict=True) if table.rows else [()] * len(table.columns)
    return [any(isinstance(cell, str) and not PRINTED_NUMBER.fullmatch(cell) for cell in column) for column in columns]


def _interval_columns(table: Table) -> list[bool]:
    columns = zip(*table.rows, strict=True) if table.rows else [()] * len(table.columns)
    return [any(isinstance(cell, Estimate) and cell.low is not None for cell in column) for column in columns]


# ---- LaTeX -----------------------------------------------------------------------------------------


def _latex_size(size: str) -> str:
    return size + r"\setlength{\tabcolsep}{2.5pt}"


def _latex_note(note: str) -> str:
    """What stands between backticks is code, in which two hyphens stay two."""
    return re.sub(r"`([^`]*)`", r"\\texttt{\1}", escape(note))


def _latex_head(head: str, side: str) -> str:
    lines = [escape(line) for line in head.split("\n")]
    return lines[0] if len(lines) == 1 else rf"\shortstack[{side}]{{" + r"\\".join(lines) + "}"


def _latex_rows(table: Table) -> list[str]:
    """The rows; leading words that repeat the row above are left out, and a new first word gets some space above."""
    words = _text_columns(table)
    leading = words.index(False) if False in words else len(words)
    stacked = len(table.columns) > MAX_COLUMNS_ABREAST or sum(_interval_columns(table)) > MAX_INTERVALS_ABREAST
    end = r" \\[2pt]" if stacked else r" \\"
    lines: list[str] = []
    above: tuple[Cell, ...] = ()
    for row in table.rows:
        same = 0
        while same < min(leading, len(above)) and row[same] == above[same]:
            same += 1
        if above and same == 0:
            lines.append(r"\addlinespace")
        lines.append(" & ".join([""] * same + [_latex_cell(cell, stacked) for cell in row[same:]]) + end)
        above = row
    return lines


def _latex_cell(cell: Cell, stacked: bool) -> str:
    if isinstance(cell, str):
        return escape(cell or MISSING)
    if not isinstance(cell, Estimate) or cell.low is None or cell.high is None:
        return _latex_number(_plain(cell))
    value, interval = _latex_number(_rounded(cell.value)), f"[{_rounded(cell.low)}, {_rounded(cell.high)}]"
    if stacked:
        return rf"\begin{{tabular}}[t]{{@{{}}r@{{}}}}{value}\\[-2pt]{{\tiny {_latex_number(interval)}}}\end{{tabular}}"
    return rf"{value} {{\tiny {_latex_number(interval)}}}"


def _latex_number(text: str) -> str:
    """A minus, not a hyphen, before a digit."""
    return "".join(f"${sign}$" if sign == "-" and text != MISSING else sign for sign in text)
