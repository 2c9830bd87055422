"""Which classifier judges which style, where the styles are anybody's own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm.names import nearest
from ldm.study import classifier as classifiers


@dataclass(frozen=True)
class Judge:
    """A classifier and the styles that it can judge. Without a file nothing is judged, and all else is measured."""

    file: Path | None
    styles: Mapping[str, str]  # style -> the classifier's name of the attribute
    lacking: str = ""  # what is not judged, and what to do about it


def choose(
    styles: Sequence[str],
    files: Sequence[Path],
    names: Mapping[str, str],
    *,
    given: bool = False,
    all_of_them: bool = False,
) -> Judge:
    """Of some classifiers the first that knows most of the styles.

    Args:    names: style -> attribute, where they differ.  given: one file, which the user has named.
             all_of_them: no style may go without.
    Raises:  ValueError: for a file that is no classifier, a style that is none, an attribute that no classifier has,
             or a given classifier that knows none of the styles.
    """
    for style in names:
        if style not in styles:
            raise ValueError(f"--map: no style {style!r}{nearest(style, styles)}; there are {', '.join(styles)}")
    wanted = {style: names.get(style, style) for style in styles}
    known = {file: classifiers.load(file).attributes for file in files}
    everything = list(dict.fromkeys(attribute for attributes in known.values() for attribute in attributes))
    for attribute in names.values():
        if attribute not in everything:
            hint = nearest(attribute, everything)
            raise ValueError(f"--map: no classifier has {attribute!r}{hint}; they have {', '.join(everything)}")
    best = max(files, key=lambda file: sum(attribute in known[file] for attribute in wanted.values()))
    judged = {style: attribute for style, attribute in wanted.items() if attribute in known[best]}
    if missing := [style for style in styles if style not in judged]:
        subject = "the classifier" if given else "a shipped classifier"
        hint = nearest(wanted[missing[0]], everything)
        problem = f"{subject} has no {missing[0]!r}{hint}; it has {', '.join(known[best] if given else everything)}"
        if all_of_them or (given and not judged):
            raise ValueError(
                f"attributes: {problem}; use another --classifier, name the styles as it does, or --map STYLE=ATTRIBUTE"
            )
        named = ", ".join(missing)
        return Judge(best if judged else None, judged, f"{named}: no CFRT, flip rate and probabilities, for {problem}")
    return Judge(best, judged)
