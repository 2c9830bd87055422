"""The options by which every command reads image files."""

import argparse

from ldm.data.reading import AS_STORED, RANGES, Reading


def add_pixels(parser: argparse.ArgumentParser) -> None:
    """Those about image files alone."""
    pixels = parser.add_argument_group("the pixels")
    pixels.add_argument("--invert", action="store_true", help="the images are negatives: exchange black and white")
    pixels.add_argument(
        "--range", choices=RANGES, default=AS_STORED.grey_range,
        help="what of more than 8 bits becomes 0..255: the bits that are used, the whole type, or the 0.5th to the "
        "99.5th percentile of each image; of DICOM, bits: the file's own window (default %(default)s)",
    )  # fmt: skip
    pixels.add_argument(
        "--background", type=int, default=AS_STORED.background, help="grey under transparent pixels (default 0, black)"
    )


def pixels(args: argparse.Namespace) -> Reading:
    """What `add_pixels` asked for. Raises ValueError for a background that is no grey."""
    return Reading(args.invert, args.range, args.background)
