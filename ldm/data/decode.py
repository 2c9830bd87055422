"""One image file -> upright 8-bit grey or RGB, and what had to be decided on the way, in sentences.

More than 8 bits of grey become 8 by one of three ranges, which the option --range names:

    bits         0 .. 2^b - 1, b the fewest of 8, 10, 12, 14, 16 bits that hold the image's highest value
    type         0 .. 65535, whatever is used of it
    percentiles  the 0.5th to the 99.5th percentile of the image itself
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ldm.data import dicom
from ldm.data.reading import AS_STORED, PERCENTILES, Reading, used_bits

EXTENSIONS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp", ".dcm", ".dicom")  # in any case
TIFF_PHOTOMETRIC = 262  # 0: the least value is white
NARROW = 0.25  # an image that uses less of its range is worth a remark


class Decoded(NamedTuple):
    """An image, and what is worth knowing of how it came about."""

    image: Image.Image  # mode L or RGB, upright
    kind: str  # of file and pixels: "JPEG L", "PNG I;16", "DICOM CR MONOCHROME1"
    remarks: tuple[str, ...]


def decode(path: Path | str, reading: Reading = AS_STORED) -> Decoded:
    """Raises ValueError for pixels whose range is not known; on damaged bytes whatever the decoder raises."""
    if dicom.is_dicom(path):
        pixels, kind, remarks = dicom.pixels(path, reading)
        image = Image.fromarray(pixels)
    else:
        image, kind, remarks = _by_pillow(path, reading)
    low, high = (int(value) for value in _extrema(image))
    if high - low < NARROW * 255:
        remarks = (*remarks, "less than a quarter of the range is used: nearly one grey")
    return Decoded(ImageOps.invert(image) if reading.invert else image, kind, remarks)


def _by_pillow(path: Path | str, reading: Reading) -> tuple[Image.Image, str, tuple[str, ...]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large files are no attack; the limit stays
        with Image.open(path) as opened:
            kind = f"{opened.format} {opened.mode}"
            remarks = _of_several(opened)
            least_is_white = opened.format == "TIFF" and opened.getexif().get(TIFF_PHOTOMETRIC) == 0
            image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I"):  # 16-bit grey: "I;16", in older Pillows "I"
        pixels, taken = eight_bits(np.asarray(image, dtype=np.int64), reading)
        # Of 8 bits Pillow inverts such files itself.
        return Image.fromarray(255 - pixels if least_is_white else pixels), kind, (*remarks, *taken)
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is not known")
    if image.has_transparency_data:
        image, laid = _laid_on(image, reading.background)
        return image, kind, (*remarks, *laid)
    return image.convert("L" if image.mode in ("1", "L") else "RGB"), kind, remarks


def _of_several(opened: Image.Image) -> tuple[str, ...]:
    """That a file holds more than the image that is read of it."""
    return ("only the first of several pages or frames is read",) if getattr(opened, "n_frames", 1) > 1 else ()


def eight_bits(values: NDArray[np.int64], reading: Reading) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """Grey of up to 16 bits -> 0..255, and the range taken where it is not all of them."""
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 65_535:
        raise ValueError(f"grey values {int(low)} to {int(high)}, expected 0 to 65535")
    if reading.grey_range == "percentiles":
        low, high = np.percentile(values, PERCENTILES)
        remark = "grey: the 0.5th to the 99.5th percentile of each image became 0 to 255"
        return scaled(values, low, high), (remark,)
    bits = 16 if reading.grey_range == "type" else used_bits(int(high))
    remarks = () if bits == 16 else (f"grey: {bits} of 16 bits are used, 0 to {2**bits - 1} became 0 to 255",)
    return scaled(values, 0, 2**bits - 1), remarks


def scaled(values: NDArray[np.number], low: float, high: float) -> NDArray[np.uint8]:
    """low..high -> 0..255, clipped and rounded; all black where low = high."""
    return np.rint(np.clip((values - low) / max(high - low, 1e-12), 0, 1) * 255).astype(np.uint8)


def _laid_on(image: Image.Image, background: int) -> tuple[Image.Image, tuple[str, ...]]:
    """Transparent pixels composited on a grey."""
    grey = image.mode in ("L", "LA", "La")
    layers = image.convert("RGBA")
    if layers.getchannel("A").getextrema()[0] == 255:
        remarks: tuple[str, ...] = ()
    else:
        remarks = (f"transparent pixels were laid on grey {background}",)
    under = Image.new("RGBA", image.size, (background, background, background, 255))
    return Image.alpha_composite(under, layers).convert("L" if grey else "RGB"), remarks


def _extrema(image: Image.Image) -> Sequence[float]:
    extrema = image.getextrema()
    if image.mode == "L":
        return extrema  # type: ignore[return-value]
    return min(low for low, _ in extrema), max(high for _, high in extrema)  # type: ignore[misc,union-attr]
