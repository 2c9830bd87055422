"""Figures of trajectories: pixel-exact grids with labels, and animations.

An image here is (H, W, 3) bytes; a row is a list of images of one size.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ldm.files import complete
from ldm.images import Pixels, save_image

__all__ = ["Pixels", "difference", "grid", "save_animation", "save_image", "trajectories"]

MARGIN, INK, PAPER = 6, (30, 30, 30), (255, 255, 255)


def difference(image: Pixels, neutral: Pixels, gain: float = 2.0) -> Pixels:
    """What changed against the neutral image: white where nothing did, red where brighter, blue where darker.

    gain: a change of 255 / gain grey levels or more is drawn in full colour.
    """
    change = gain * (image.astype(np.float32) - neutral.astype(np.float32)).mean(axis=2) / 255.0
    brighter, darker = np.clip(change, 0, 1), np.clip(-change, 0, 1)
    red, green, blue = 1 - darker, 1 - darker - brighter, 1 - brighter
    return np.rint(255.0 * np.stack([red, green, blue], axis=2)).astype(np.uint8)


def grid(
    rows: Sequence[Sequence[Pixels]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    title: str = "",
) -> Image.Image:
    """Rows of images under column labels, each row with its label on the left. Pixels are drawn as they are."""
    height, width = rows[0][0].shape[:2]
    size, title_size = max(11, height // 10), max(14, height // 7)
    font, title_font = ImageFont.load_default(size), ImageFont.load_default(title_size)
    label_width = max([int(font.getlength(label)) for label in row_labels] + [0]) + 2 * MARGIN
    head = int(title_size * 1.8) if title else 0
    top = head + (int(size * 1.8) if any(column_labels) else MARGIN)

    columns = max(len(row) for row in rows)
    canvas = Image.new(
        "RGB", (label_width + columns * (width + 2) + MARGIN, top + len(rows) * (height + 2) + MARGIN), PAPER
    )
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, MARGIN), title, INK, font=title_font)
    for i, label in enumerate(column_labels):
        draw.text((label_width + i * (width + 2) + width // 2, top - 4), label, INK, font=font, anchor="mb")
    for r, (row, label) in enumerate(zip(rows, row_labels, strict=True)):
        y = top + r * (height + 2)
        draw.text((label_width - MARGIN, y + height // 2), label, INK, font=font, anchor="rm")
        for c, image in enumerate(row):
            canvas.paste(Image.fromarray(image), (label_width + c * (width + 2), y))
    return canvas


def trajectories(
    rows: Sequence[tuple[str, Sequence[Pixels]]], column_labels: Sequence[str], title: str = ""
) -> Image.Image:
    """One row per trajectory, neutral image first, and under it what changed against that neutral image."""
    images, labels = [], []
    for label, row in rows:
        images += [list(row), [difference(image, row[0]) for image in row]]
        labels += [label, "change"]
    return grid(images, labels, column_labels, title)


def save_animation(path: Path, frames: Sequence[Image.Image], frame_ms: int = 60) -> None:
    """A GIF that runs to the end and back, for ever; all frames share one palette, so that nothing flickers.

    Each frame stays one, also where its neighbour is the same: Pillow would merge the two.
    """
    there_and_back = [*frames, *frames[-2:0:-1]]
    sample = Image.new("RGB", (frames[0].width, 3 * frames[0].height))
    for i, frame in enumerate((frames[0], frames[len(frames) // 2], frames[-1])):
        sample.paste(frame, (0, i * frame.height))
    palette = sample.quantize(255, method=Image.Quantize.MEDIANCUT)
    pictures = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in there_and_back]
    first, *rest = _told_apart(pictures)
    with complete(path) as partial:
        first.save(partial, format="GIF", save_all=True, append_images=rest, duration=frame_ms, loop=0, optimize=False)


def _told_apart(pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """Pictures of one palette, of which neighbours that look the same differ in the number of one pixel's colour.

    The palette's last entry, which no picture uses, becomes a twin of the colour in each picture's last pixel.
    """
    corner, twin = (pictures[0].width - 1, pictures[0].height - 1), 255
    told: list[Image.Image] = []
    for picture in pictures:
        colours = (picture.getpalette() or [])[: 3 * twin]
        colours += [0] * (3 * twin - len(colours))
        index = picture.getpixel(corner)
        assert isinstance(index, int)
        picture.putpalette([*colours, *colours[3 * index : 3 * index + 3]])
        if told and told[-1].tobytes() == picture.tobytes():
            picture.putpixel(corner, twin)
        told.append(picture)
    return told
