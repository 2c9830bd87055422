"""DICOM radiographs and photographs to 8 bits, by pydicom: `pip install -e ".[dicom]"`.

stored values -> modality transform -> values of interest (a table, or a window by its own function) -> 0..255 of that
range -> MONOCHROME1 inverted, so that bone is white. Padding is black. (DICOM PS3.3, C.11.1, C.11.2, C.7.6.3.)

Only the tags that this needs are read, so no patient's data comes into memory, an error or a file.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ldm.data.reading import PERCENTILES, Reading, used_bits

if TYPE_CHECKING:
    from pydicom.dataset import FileDataset

MAGIC = b"DICM"  # behind a preamble of 128 bytes
# fmt: off
TAGS = (
    "Modality", "PixelData", "FloatPixelData", "DoubleFloatPixelData", "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation",
    "PlanarConfiguration", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue",
    "PixelPaddingRangeLimit", "ModalityLUTSequence", "RescaleSlope", "RescaleIntercept", "VOILUTSequence",
    "WindowCenter", "WindowWidth", "VOILUTFunction", "RedPaletteColorLookupTableDescriptor",
    "GreenPaletteColorLookupTableDescriptor", "BluePaletteColorLookupTableDescriptor",
    "RedPaletteColorLookupTableData", "GreenPaletteColorLookupTableData", "BluePaletteColorLookupTableData",
)
# fmt: on


def is_dicom(path: Path | str) -> bool:
    """By the file's first bytes, for exports often have no extension, or by that. Raises OSError for no such file."""
    with open(path, "rb") as file:
        return file.read(132)[128:] == MAGIC or str(path).lower().endswith((".dcm", ".dicom"))


def pixels(path: Path | str, reading: Reading) -> tuple[NDArray[np.uint8], str, tuple[str, ...]]:
    """(H, W) grey or (H, W, 3), the kind of file, and remarks.

    Raises:  ValueError: without pydicom, for several frames, or for a compression that nothing installed decodes.
    """
    try:
        import pydicom
        from pydicom import pixels as processing
        from pydicom.errors import InvalidDicomError
    except ImportError:
        raise ValueError('a DICOM file, which needs pydicom: pip install -e ".[dicom]"') from None
    try:
        data = pydicom.dcmread(path, specific_tags=list(TAGS))
    except InvalidDicomError:
        raise ValueError("no DICOM file: the letters DICM do not follow its first 128 bytes") from None
    if "Rows" not in data or "PhotometricInterpretation" not in data:
        raise ValueError("a DICOM file without an image")
    if (frames := int(data.get("NumberOfFrames") or 1)) > 1:
        raise ValueError(f"{frames} frames in one DICOM file, expected one image")
    photometric = str(data.PhotometricInterpretation)
    kind = f"DICOM {data.get('Modality', '?')} {photometric}"
    try:
        values = processing.pixel_array(data)
    except (RuntimeError, NotImplementedError, AttributeError) as error:  # a missing plugin, an unknown syntax
        syntax = data.file_meta.TransferSyntaxUID.name
        raise ValueError(
            f"DICOM pixels, {syntax}, cannot be decoded ({type(error).__name__}); install pylibjpeg with its plugins"
        ) from None
    if photometric == "PALETTE COLOR":
        coloured = processing.apply_color_lut(values, data)
        return (coloured >> 8 if coloured.dtype == np.uint16 else coloured).astype(np.uint8), kind, ()
    if values.ndim == 3:
        return _eight_of_colour(values, int(data.BitsStored)), kind, ()
    unit, remarks = _of_interest(processing.apply_modality_lut(values, data).astype(np.float64), values, data, reading)
    grey = np.rint(np.clip(1 - unit if photometric == "MONOCHROME1" else unit, 0, 1) * 255).astype(np.uint8)
    grey[_padding(values, data)] = 0
    return grey, kind, remarks


def _eight_of_colour(values: NDArray[np.integer], bits: int) -> NDArray[np.uint8]:
    return np.rint(values / (2**bits - 1) * 255).astype(np.uint8) if bits != 8 else values.astype(np.uint8)


def _of_interest(
    values: NDArray[np.float64], stored: NDArray[np.integer], data: "FileDataset", reading: Reading
) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """Values behind the modality transform -> 0..1 of the range of interest, and which it was if it was not given."""
    from pydicom import pixels as processing

    if reading.grey_range == "percentiles":
        low, high = np.percentile(values[~_padding(stored, data)], PERCENTILES)
        remark = "grey: the 0.5th to the 99.5th percentile of each image became 0 to 255"
        return (values - low) / max(high - low, 1e-12), (remark,)
    if reading.grey_range == "bits" and data.get("VOILUTSequence"):
        table = data.VOILUTSequence[0]
        looked_up = processing.apply_voi(np.rint(values).astype(np.int64), data)
        return looked_up / (2.0 ** _bits_of_table(table) - 1), ()
    if reading.grey_range == "bits" and data.get("WindowWidth") is not None and data.get("WindowCenter") is not None:
        centre, width = _first(data.WindowCenter), _first(data.WindowWidth)
        return windowed(values, centre, width, str(data.get("VOILUTFunction") or "LINEAR")), ()
    low, high = _range(data, stored, reading)
    return (values - low) / (high - low), (f"DICOM without a window in use: {low:g} to {high:g} became 0 to 255",)


def windowed(values: NDArray[np.float64], centre: float, width: float, function: str) -> NDArray[np.float64]:
    """A window's function, to 0..1 (PS3.3 C.11.2.1.2, C.11.2.1.3).

    LINEAR (x - (c - 1/2)) / (w - 1) + 1/2;  LINEAR_EXACT (x - c) / w + 1/2;  SIGMOID 1 / (1 + exp(-4 (x - c) / w)).

    Raises:  ValueError: for another function, or a width that it does not have.
    """
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise ValueError(f"VOI LUT function {function!r}, expected LINEAR, LINEAR_EXACT or SIGMOID")
    if not width >= 1 and not (function != "LINEAR" and width > 0):
        raise ValueError(f"a window of width {width:g}, expected at least 1")
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -700, 700)))
    if function == "LINEAR_EXACT":
        return np.clip((values - centre) / width + 0.5, 0, 1)
    if width == 1:
        return (values > centre - 0.5).astype(np.float64)
    return np.clip((values - (centre - 0.5)) / (width - 1) + 0.5, 0, 1)


def _range(data: "FileDataset", stored: NDArray[np.integer], reading: Reading) -> tuple[float, float]:
    """What the bits that are stored, or used, can hold, behind the modality transform."""
    if data.get("ModalityLUTSequence"):
        return 0.0, 2.0 ** _bits_of_table(data.ModalityLUTSequence[0]) - 1
    bits, low = int(data.BitsStored), 0.0
    if data.PixelRepresentation:
        low = -(2.0 ** (bits - 1))
    elif reading.grey_range == "bits":
        bits = min(bits, used_bits(int(stored[~_padding(stored, data)].max(initial=0))))
    slope, intercept = float(data.get("RescaleSlope", 1)), float(data.get("RescaleIntercept", 0))
    ends = (slope * low + intercept, slope * (low + 2.0**bits - 1) + intercept)
    return min(ends), max(ends)


def _padding(stored: NDArray[np.integer], data: "FileDataset") -> NDArray[np.bool_]:
    """(H, W) which pixels are no image."""
    one = data.get("PixelPaddingValue")
    if one is None:
        return np.zeros(stored.shape, dtype=bool)
    other = data.get("PixelPaddingRangeLimit", one)
    return (stored >= min(one, other)) & (stored <= max(one, other))


def _bits_of_table(table: Any) -> int:
    return int(table.LUTDescriptor[2])


def _first(value: Any) -> float:
    """The first of several windows."""
    return float(value[0] if isinstance(value, (list, tuple)) or hasattr(value, "append") else value)
