"""What goes wrong in training on these captions, looked for in the data at hand and said in sentences."""

from itertools import combinations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ldm.data import captions
from ldm.data.labelled import LabelledImages

# Two attributes are called confounded from this correlation on (phi; .22 for ink and ruler in ISIC 2019, of which 74 %
# and 14 % go together) if chance is no explanation of it (chi-squared with one degree of freedom, p < .001).
CONFOUNDED_PHI = 0.2
CONFOUNDED_CHI2 = 10.83
NO_FINDINGS = ("No Finding", "Support Devices")  # a device is none either
UNSAID_ARTIFACTS = ("dark_corner", "gel_border", "patches")


def found(images: LabelledImages, template: str = "paper") -> list[str]:
    """One sentence for each trap that the images hold."""
    own: list[str] = []
    if images.name in ("chexpert", "mimic"):
        own = _chexpert(images, template)
    elif images.kind == "skin":
        own = _isic(images)
    return own + _confounded(images)


def cooccurrence(images: LabelledImages) -> pd.DataFrame:
    """(K, K): of the images with the row's attribute, the share with the column's; NaN where there are none."""
    present, known = images.labels == 1, ~np.isnan(images.labels)
    both = present.astype(np.float64).T @ present
    with np.errstate(invalid="ignore"):
        shares = both / (present.astype(np.float64).T @ known)
    return pd.DataFrame(shares, index=images.attributes, columns=images.attributes)


def _chexpert(images: LabelledImages, template: str) -> list[str]:
    present = images.observations == 1
    findings = [name for name in present if name not in NO_FINDINGS]
    unsaid = [name for name in present if name not in captions.CHEXPERT_CAPTION_LABELS]
    contradictory = present["No Finding"] & present[findings].any(axis=1)
    normal = ~present[list(captions.CHEXPERT_CAPTION_LABELS)].any(axis=1)
    sentences = _oddities(images.frame)
    if count := int(contradictory.sum()):
        sentences.append(f"{count:,} captions contradict themselves or the labels: No Finding beside a finding")
    if count := int(present["No Finding"].sum()):
        stem = captions.CHEXPERT_STEMS[template]
        sentences.append(f"{count:,} images without a finding are captioned {stem + ' No Finding'!r}, not as normal")
    if count := int((normal & present[unsaid].any(axis=1)).sum()):
        sentences.append(
            f"{count:,} of the {int(normal.sum()):,} captions {captions.CHEXPERT_NEUTRAL!r} are of images with a "
            f"label that no caption names ({', '.join(unsaid)})"
        )
    return sentences


def _oddities(frame: pd.DataFrame) -> list[str]:
    """Ages and sexes that are none; the rows are kept."""
    newborn = int((frame["Age"] == 0).sum()) if "Age" in frame else 0
    unknown = int((~frame["Sex"].isin(["Male", "Female"])).sum()) if "Sex" in frame else 0
    sentences = [f"Age is 0 in {newborn:,} rows, which means unknown"] if newborn else []
    return sentences + ([f"Sex is neither Male nor Female in {unknown:,} rows"] if unknown else [])


def _isic(images: LabelledImages) -> list[str]:
    if "hair" not in images.observations:
        return ["no artifact annotations: captions name the diagnosis only (--artifacts names a file of them)"]
    present = images.observations == 1
    clean = (images.observations[list(captions.ISIC_CAPTION_ARTIFACTS)] == 0).all(axis=1)
    unsaid = [name for name in UNSAID_ARTIFACTS if name in present]
    sentences = []
    if count := int(np.isnan(images.labels).any(axis=1).sum()):
        sentences.append(
            f"{count:,} images have no artifact annotation: that is unknown, not absent, and their caption denies none"
        )
    if count := int((clean & present[unsaid].any(axis=1)).sum()):
        sentences.append(
            f"{count:,} of the {int(clean.sum()):,} captions 'with no visible artifacts' are of images with one that "
            f"no caption names ({', '.join(unsaid)})"
        )
    return sentences


def _confounded(images: LabelledImages) -> list[str]:
    sentences = []
    for one, other in combinations(range(len(images.attributes)), 2):
        pair = images.labels[:, [one, other]]
        pair = pair[~np.isnan(pair).any(axis=1)]
        phi = _phi(pair)
        if abs(phi) >= CONFOUNDED_PHI and len(pair) * phi**2 >= CONFOUNDED_CHI2:
            rare, common = sorted((0, 1), key=lambda place: pair[:, place].sum())
            names = [images.attributes[(one, other)[place]] for place in (rare, common)]
            with_rare, without = pair[pair[:, rare] == 1, common], pair[pair[:, rare] == 0, common]
            sentences.append(
                f"{names[0]} and {names[1]} are confounded: {names[1]} is in {with_rare.mean():.0%} of the images with "
                f"{names[0]} ({int(with_rare.sum()):,} of {len(with_rare):,}) and in {without.mean():.0%} of the others"
            )
    return sentences


def _phi(pair: NDArray[np.float32]) -> float:
    """The correlation of the two columns of a 0/1 table; 0 where one of them never changes."""
    if not len(pair) or (pair == pair[0]).all(axis=0).any():
        return 0.0
    centred = pair.astype(np.float64) - pair.mean(axis=0, dtype=np.float64)
    return float((centred[:, 0] * centred[:, 1]).mean() / (centred[:, 0].std() * centred[:, 1].std()))
