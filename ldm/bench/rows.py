"""Rows that are on disk as soon as they are known: one JSON object a line, and a run that was killed goes on.

The first line holds the settings. A line that a kill has cut short is dropped, and its row measured again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.files import write_text


class RowFile:
    """The rows of one comparison, by what names them."""

    def __init__(self, path: Path, settings: Mapping[str, Any], names: Sequence[str]) -> None:
        """Opens a file, making it where there is none.

        Args:    settings: all that rows depend on, as JSON values.  names: the fields that tell rows apart.
        Raises:  ValueError: the file holds rows of other settings, or something else; it is left as it is.
        """
        self.path, self.names = path, tuple(names)
        self.rows: dict[tuple[Any, ...], dict[str, Any]] = {}
        stored: dict[str, Any] = json.loads(json.dumps(settings))
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = _whole_lines(path)
        if lines:
            _check(path, lines[0], stored)
        self.rows = {self._key(row): row for row in lines[1:]}
        kept = lines or [stored]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))

    def __contains__(self, name: Mapping[str, Any]) -> bool:
        return self._key(name) in self.rows

    def __getitem__(self, name: Mapping[str, Any]) -> dict[str, Any]:
        return self.rows[self._key(name)]

    def add(self, row: Mapping[str, Any]) -> None:
        """Write a row, its name included."""
        stored = json.loads(json.dumps(row))
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(stored) + "\n")
        self.rows[self._key(row)] = stored

    def get(self, name: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The row of this name, measured and written where it is not there."""
        if name not in self:
            self.add({**name, **measure()})
        return self[name]

    def _key(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(field) for field in self.names)


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """Raises ValueError for a file that this has not begun."""
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
        except ValueError:
            if lines and number == len(texts):
                break  # cut short: measured again
            line = None
        if not isinstance(line, dict):
            raise ValueError(
                f"{path}: line {number} is no JSON object, so not all of it is rows of this comparison; give another "
                "--out, or move it away"
            )
        lines.append(line)
    return lines


def _check(path: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    if differing := _differing(stored, wanted):
        raise ValueError(
            f"{path}: holds rows of other settings ({differing[0]}); give the same options, or another --out"
        )


def _differing(stored: Mapping[str, Any], wanted: Mapping[str, Any], within: str = "") -> list[str]:
    """The innermost settings that differ, such as "cells.chest.fast.guidance was 1.0, is 3.0"; None is as if absent."""
    found = []
    for name in sorted({*stored, *wanted}):
        was, now = stored.get(name), wanted.get(name)
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            found += _differing(was, now, f"{within}{name}.")
        elif was != now:
            found.append(f"{within}{name} was {_said(was)}, is {_said(now)}")
    return found


def _said(value: object) -> str:
    return f"{{{', '.join(value)}}}" if isinstance(value, Mapping) else str(value)
