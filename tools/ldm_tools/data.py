"""`ldm data`: describe a folder of labelled images from its label files; the images may be absent.

ldm data data/chest --show 5
ldm data ISIC_2019 --artifacts isic_inferred_wocarcinoma.csv --split paper --json
ldm data films --labels table.csv --file-column image --caption "a chest film[ with {labels}]" --scan
"""

import argparse
import json
import logging
from pathlib import Path

import numpy as np
import pandas as pd

from ldm.data import images, splits, survey, traps
from ldm.data.captions import TEMPLATES
from ldm.data.labelled import LabelledImages
from ldm_tools.reading import FOLDER, add_reading, read

CAPTIONS = 8  # the most frequent ones that are listed
LOOKED_FOR = 100  # image files
GROUPS = {"skin": "lesion", "chest": "patient"}

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command to `parser`."""
    parser.description = "Say what a data set holds: labels, captions, a split, and what is wrong with them."
    parser.add_argument("folder", type=Path, help=f"{FOLDER}: the folder of the label files, or around it")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="the first N images with their captions")
    parser.add_argument("--row", type=int, metavar="N", help="the image in row N of the label file, counted from 1")
    parser.add_argument("--template", default="paper", choices=TEMPLATES, help="wording of captions (default paper)")
    parser.add_argument(
        "--split", metavar="grouped|stratified|official|paper|FILE",
        help="grouped: by patient or lesion (default); stratified: and each part with its share of every label; "
        "official: the data set's own; paper: the paper's, which leaks; or one that was saved",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=42, help="of the grouped split (default 42)")
    parser.add_argument("--save-split", type=Path, metavar="FILE", help="write the split as csv")
    parser.add_argument("--json", action="store_true", help="only the counts of the split, as JSON")
    parser.add_argument(
        "--scan", action="store_true", help="decode every image file, and say what they are and which are odd or broken"
    )
    parser.add_argument("--quick", action="store_true", help="with --scan: look at JPEGs' headers and ends only")
    parser.add_argument("--max-bad", type=int, default=0, help="with --scan: broken files to accept (default 0)")
    parser.add_argument("--workers", type=int, default=1, help="with --scan: processes (default 1)")
    add_reading(parser, "labels to count")


def run(args: argparse.Namespace) -> None:
    """Print the description. Raises ValueError when the folder cannot be read."""
    data = read(args.folder, args)
    places = chosen_rows(data, args.show, args.row)
    looked_at = scanned(data, args) if args.scan else ""
    split, warnings = split_and_warnings(data, args)
    warnings = [*traps.found(data, args.template), *warnings]
    if split is not None and args.save_split:
        split.save(args.save_split, data)
    if split is not None and args.json:
        print(json.dumps(counts(data, split), indent=2))
        for line in said(data, warnings):
            logger.warning("%s", line)
        return
    paragraphs = [*description(data, args.template), looked_at, shown(data, args.template, places)]
    if split is not None:
        paragraphs.append(_table(pd.DataFrame(counts(data, split)).T))
    paragraphs.append("\n".join(said(data, warnings)))
    print("\n\n".join(paragraph for paragraph in paragraphs if paragraph))


def said(data: LabelledImages, warnings: list[str]) -> list[str]:
    """What the reader took for granted or left out, and what is wrong."""
    return [f"note: {note}" for note in data.notes] + [f"warning: {warning}" for warning in warnings]


def scanned(data: LabelledImages, args: argparse.Namespace) -> str:
    """What the image files are. Raises ValueError when more are broken than may be."""
    if args.quick:
        broken = images.scan(data.files, args.workers, reading=data.reading)
        images.refuse(broken, args.max_bad, len(data))
        return f"looked at {len(data):,} files: {len(broken):,} broken; their pixels were not decoded"
    facts, broken = survey.survey(data.files, args.workers, data.reading, chests=data.kind != "skin")
    images.refuse(broken, args.max_bad, len(data))
    return survey.described(facts, data.root)


def split_and_warnings(data: LabelledImages, args: argparse.Namespace) -> tuple[splits.Split | None, list[str]]:
    """The split; None where there are too few groups for the default one, and nobody asked for any."""
    try:
        split = chosen_split(data, args.split or "grouped", args.seed)
    except ValueError as error:
        if args.split or args.save_split or args.json:
            raise
        return None, [f"no split: {error}"]
    return split, leak(data, split) + splits.uneven(data, split)


def chosen_rows(data: LabelledImages, show: int, row: int | None) -> list[int]:
    """Places of the images to show."""
    if show < 0:
        raise ValueError(f"show: got {show}, expected >= 0")
    places = list(range(min(show, len(data))))
    if row is not None:
        place = int(data.frame.index.get_indexer([row - 1])[0])
        if place < 0:
            last = int(data.frame.index[-1]) + 1
            raise ValueError(f"row: {row} is not among the {len(data)} images that were read (the last is row {last})")
        places.append(place)
    return places


def shown(data: LabelledImages, template: str, places: list[int]) -> str:
    """Images with their labels and captions."""
    some = data.select(places)
    blocks = []
    for i, caption in enumerate(some.captions(template)):
        labels = some.observations[list(some.counted)].iloc[i]
        values = ", ".join(f"{name} {'?' if np.isnan(value) else int(value)}" for name, value in labels.items())
        head = (
            f"row {some.frame.index[i] + 1}  {some.keys[i]}  ({some.group_kind or 'not known: group'} {some.groups[i]})"
        )
        blocks.append(f"{head}\n  {values}\n  {caption}")
    return "\n".join(blocks)


def chosen_split(data: LabelledImages, name: str, seed: int) -> splits.Split:
    """By its name, or from the file that --save-split wrote."""
    if name == "grouped":
        return splits.grouped(data, seed)
    if name == "stratified":
        return splits.stratified(data, seed)
    if name == "official":
        return splits.official(data)
    if name == "paper":
        return splits.paper(data)
    if not Path(name).is_file():
        raise ValueError(
            f"split: got {name!r}, expected grouped, stratified, official, paper, or a csv file that --save-split wrote"
        )
    return splits.load(name, data)


def counts(data: LabelledImages, split: splits.Split) -> dict[str, dict[str, int]]:
    """Images and positives of each part."""
    return {name: {"images": len(rows), **data.counts(rows)} for name, rows in split.parts().items()}


def leak(data: LabelledImages, split: splits.Split) -> list[str]:
    """The warning of a split whose test set is not new to the model."""
    share = splits.leakage(data, split)
    if np.isnan(share):
        kind = GROUPS.get(data.kind, "patient")
        return [f"{kind}s are not known, so nobody knows how many test images have theirs in train"]
    if share == 0:
        return []
    return [f"the split leaks: {share:.1%} of the test images have their {data.group_kind} in train"]


def description(data: LabelledImages, template: str) -> list[str]:
    """The paragraphs."""
    values = data.observations[list(data.counted)]
    states = {"present": values == 1, "absent": values == 0, "unknown": values.isna()}
    labels = pd.DataFrame({name: table.sum() for name, table in states.items()})
    captions = pd.Series(data.captions(template)).value_counts()
    lines = [f"  {count:>9,}  {count / len(data):6.1%}  {caption}" for caption, count in captions[:CAPTIONS].items()]
    if len(captions) > CAPTIONS:
        lines.append(f"  {captions[CAPTIONS:].sum():>9,}  {captions[CAPTIONS:].sum() / len(data):6.1%}  others")
    return [
        head(data),
        _table(labels),
        f"{len(captions):,} distinct captions, template {template}:\n" + "\n".join(lines),
        "of the images with the row's attribute, the share with the column's:\n"
        + traps.cooccurrence(data).to_string(float_format="{:.2f}".format, na_rep="-"),
    ]


def head(data: LabelledImages) -> str:
    """What it is, and whether the images are there."""
    files = data.files[np.unique(np.linspace(0, len(data) - 1, LOOKED_FOR).astype(int))]
    there = sum(Path(file).is_file() for file in files)
    where = "" if there else f", such as {files[0]}"
    return (
        f"{titled(data)} in {data.root}: {len(data):,} images of {groups(data)}\n"
        f"image files: {there} of {len(files)} looked for are there{where}"
    )


def titled(data: LabelledImages) -> str:
    """The data set's name, as commands and files have it."""
    return data.name if data.name != "table" else "a table"


def groups(data: LabelledImages) -> str:
    """How many patients or lesions there are, as far as that is known."""
    if not data.group_kind:
        return f"unknown {GROUPS.get(data.kind, 'patient')}s"
    known = data.groups != data.keys  # an image whose lesion is not given is a group of its own
    count = f"{len(np.unique(data.groups[known])):,} {data.group_kind}s"
    if known.all():
        return count
    return f"{count}, known for {known.sum():,} images; the others count as one each"


def _table(numbers: pd.DataFrame) -> str:
    return numbers.to_string(formatters=dict.fromkeys(numbers, "{:,}".format))
