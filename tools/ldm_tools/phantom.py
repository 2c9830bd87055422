"""`ldm phantom`: draw a phantom data set, in the file formats of CheXpert or of ISIC 2019.

ldm phantom --domain chest --n 4000 --out data/chest
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.phantom import ATTRIBUTES, EXTRAS, folders, render
from ldm.phantom.items import Order

SHEET_ROWS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command to `parser`."""
    parser.description = (
        "Draw chest radiographs or dermoscopies whose true counterfactuals are known, with labels, masks and the "
        "parameters of every image. Also writes contact_sheet.png: one seed a row, first without attributes, then "
        "with each alone, then with all."
    )
    parser.add_argument("--domain", required=True, choices=sorted(ATTRIBUTES), help="chest: CheXpert, skin: ISIC 2019")
    parser.add_argument("--n", type=int, default=64, help="number of images (default %(default)s)")
    parser.add_argument("--size", type=int, default=128, help="side of the images in pixels (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first anatomy (default %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist or be empty")
    parser.add_argument(
        "--confounded", action="store_true", help="let one pair of attributes go together: ruler with ink, as in ISIC"
    )
    parser.add_argument(
        "--counterfactuals", action="store_true", help="also write each image with every attribute toggled (PNG)"
    )
    parser.add_argument(
        "--free",
        action="store_true",
        help="place attributes at random instead of as a function of the visible anatomy (then the counterfactual is "
        "not unique)",
    )
    parser.add_argument(
        "--extra",
        action="append",
        default=[],
        choices=sorted({name for names in EXTRAS.values() for name in names}),
        help="also draw an attribute that the shipped model has never seen; may be repeated",
    )
    parser.add_argument("--sheet", action="store_true", help="write the contact sheet only, no data set")
    parser.add_argument("--workers", type=int, default=1, help="processes; does not change the result (default 1)")


def run(args: argparse.Namespace) -> None:
    """Write the data set and its contact sheet."""
    sheet = contact_sheet(args.domain, args.seed, min(args.n, SHEET_ROWS), args.size, not args.free, args.extra)
    if args.sheet:
        if args.out.exists() and not args.out.is_dir():
            raise ValueError(f"out: {args.out} is a file, expected a folder")
        args.out.mkdir(parents=True, exist_ok=True)
    else:
        order = Order(
            n=args.n,
            seed0=args.seed,
            size=args.size,
            confounded=args.confounded,
            counterfactuals=args.counterfactuals,
            tied=not args.free,
            extras=args.extra,
        )
        folders.write(args.domain, args.out, order, args.workers)
    sheet.save(args.out / "contact_sheet.png")


def contact_sheet(
    domain: str, seed: int, rows: int, size: int, tied: bool = True, extras: Sequence[str] = ()
) -> Image.Image:
    """Seeds down; across: no attribute, each alone, all."""
    if rows < 1:
        raise ValueError(f"n: got {rows}, expected >= 1")
    names = (*ATTRIBUTES[domain], *extras)
    states = [{}, *({name: True} for name in names), dict.fromkeys(names, True)]
    lines = [[render(domain, seed + row, state, size, tied).to_uint8() for state in states] for row in range(rows)]
    return Image.fromarray(np.concatenate([np.concatenate(line, axis=1) for line in lines]))
