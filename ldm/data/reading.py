"""How an image file becomes 8-bit grey or colour: the choices that a file leaves open."""

from dataclasses import dataclass

RANGES = ("bits", "type", "percentiles")
PERCENTILES = (0.5, 99.5)
USUAL_BITS = (8, 10, 12, 14, 16)  # that detectors and cameras have


@dataclass(frozen=True)
class Reading:
    """The same for all images of a folder, and part of what a run remembers."""

    invert: bool = False  # negatives: black and white exchanged
    grey_range: str = "bits"  # of more than 8 bits: what becomes 0..255; one of RANGES
    background: int = 0  # grey under transparent pixels

    def __post_init__(self) -> None:
        """Raises ValueError for a range that is none, or a grey outside of 0..255."""
        if self.grey_range not in RANGES:
            raise ValueError(f"range: got {self.grey_range!r}, expected one of {', '.join(RANGES)}")
        if not 0 <= self.background <= 255:
            raise ValueError(f"background: got {self.background}, expected 0 (black) to 255 (white)")


AS_STORED = Reading()  # what is done where nobody chooses


def used_bits(highest: int) -> int:
    """The fewest of the usual bits that can hold a value, such as 12 for 3,000."""
    return next((bits for bits in USUAL_BITS if highest < 2**bits), 32)
