"""Names that nobody knows, and the nearest that somebody does."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean 'mid_block'?", or "" where no known name is alike, capitals aside."""
    folded = {_folded(other): other for other in map(str, known)}
    near = difflib.get_close_matches(_folded(name), folded, n=1)
    return f"; did you mean {folded[near[0]]!r}?" if near else ""


def _folded(name: str) -> str:
    return name.lower().replace(" ", "_")
