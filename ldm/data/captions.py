"""Captions from labels, and the prompts of the traversals: neutral ones and one style per attribute.

The wording is that of "Language-Guided Trajectory Traversal in Disentangled Stable Diffusion Latent Space for
Factorized Medical Image Generation" (TehraniNasab, Kumar, Arbel, 2025) and of its published code.
"""

from collections.abc import Callable, Collection, Mapping

import numpy as np
import pandas as pd
from numpy.typing import NDArray

CHEXPERT_CAPTION_LABELS = (
    "No Finding",
    "Cardiomegaly",
    "Lung Opacity",
    "Edema",
    "Pneumonia",
    "Pneumothorax",
    "Pleural Effusion",
    "Support Devices",
)
CHEXPERT_NEUTRAL = "Normal chest X-ray with no significant findings"
CHEXPERT_STEMS = {"paper": "Chest X-ray of a subject with", "code": "Chest X-ray showing"}

TEMPLATES = tuple(CHEXPERT_STEMS)  # of dermoscopies the two have the same wording

ISIC_CAPTION_ARTIFACTS = ("hair", "gel_bubble", "ruler", "ink")  # in the order of the annotation file's columns
ISIC_NEUTRAL = {
    "MEL": "a dermoscopic image with melanoma (MEL)",
    "NV": "a dermoscopic image with melanocytic nevus (NV)",
}
# The prompts that a traversal swaps in, after the bare stem. The captions of training say "showing hair, ruler".
ISIC_STYLES = {
    "hair": "with hairs visible on skin",
    "gel_bubble": "showing gel bubbles",
    "ruler": "with a ruler visible",
    "ink": "showing ink",
}


def chexpert(labels: Mapping[str, float | None], template: str = "paper") -> str:
    """The caption of one radiograph.

    An image without a positive label of the list reads "Normal ..." even if a label outside the list is positive, and
    one labelled "No Finding" reads "... with No Finding": both as in the experiment.

    Args:    labels: column -> value; positive is 1.0, all else (0.0, -1.0, nan, None, left out) is not.
             template: "paper" or "code".
    Raises:  ValueError: for an unknown template.
    """
    if template not in CHEXPERT_STEMS:
        raise ValueError(f"template: got {template!r}, expected one of {sorted(CHEXPERT_STEMS)}")
    positive = [name for name in CHEXPERT_CAPTION_LABELS if labels.get(name) == 1.0]
    return f"{CHEXPERT_STEMS[template]} {', '.join(positive)}" if positive else CHEXPERT_NEUTRAL


def isic(diagnosis: str, artifacts: Collection[str]) -> str:
    """The caption of one dermoscopy.

    Args:    diagnosis: "MEL" or "NV".  artifacts: those present, in any order.
    Raises:  ValueError: for an unknown diagnosis or artifact.
    """
    stem = _isic_stem(diagnosis)
    if isinstance(artifacts, str) or (unknown := sorted(set(artifacts) - set(ISIC_CAPTION_ARTIFACTS))):
        got = artifacts if isinstance(artifacts, str) else unknown
        raise ValueError(f"artifacts: got {got!r}, expected a collection of {list(ISIC_CAPTION_ARTIFACTS)}")
    shown = [name.replace("_", " ") for name in ISIC_CAPTION_ARTIFACTS if name in artifacts]
    return f"{stem} showing {', '.join(shown)}" if shown else f"{stem} with no visible artifacts"


def isic_style(diagnosis: str, artifact: str) -> str:
    """The prompt of a traversal towards one artifact. Raises ValueError for an unknown diagnosis or artifact."""
    stem = _isic_stem(diagnosis)
    if artifact not in ISIC_STYLES:
        raise ValueError(f"artifact: got {artifact!r}, expected one of {sorted(ISIC_STYLES)}")
    return f"{stem} {ISIC_STYLES[artifact]}"


def chexpert_table(observations: pd.DataFrame, template: str = "paper") -> NDArray[np.object_]:
    """`chexpert` of many radiographs. Args: observations: a column a label, a row an image. Returns: (N,) str."""
    chexpert({}, template)  # an unknown template is refused even where there is no row
    columns = list(CHEXPERT_CAPTION_LABELS)
    present = observations[columns].to_numpy() == 1.0

    def caption(row: NDArray[np.bool_]) -> str:
        return chexpert(dict(zip(columns, row.astype(float), strict=True)), template)

    return _each_distinct(present, caption)


def isic_table(observations: pd.DataFrame, template: str = "paper") -> NDArray[np.object_]:
    """`isic` of many dermoscopies; where an artifact is unknown (NaN, no column), the bare stem, which denies none.

    Args:    observations: MEL, NV and the artifacts as columns, a row an image.  template: as for `chexpert`.
    Returns: (N,) str.
    Raises:  ValueError: for another diagnosis, or an unknown template.
    """
    if template not in TEMPLATES:
        raise ValueError(f"template: got {template!r}, expected one of {sorted(TEMPLATES)}")
    diagnoses, artifacts = list(ISIC_NEUTRAL), list(ISIC_CAPTION_ARTIFACTS)
    values = observations.reindex(columns=[*diagnoses, *artifacts]).to_numpy()
    if other := int(((values[:, : len(diagnoses)] == 1.0).sum(axis=1) != 1).sum()):
        raise ValueError(f"observations: {other} images are neither {' nor '.join(diagnoses)}, which have no caption")
    unknown = np.isnan(values[:, len(diagnoses) :]).any(axis=1)

    def caption(row: NDArray[np.bool_]) -> str:
        diagnosis = diagnoses[int(np.argmax(row[: len(diagnoses)]))]
        if row[-1]:
            return ISIC_NEUTRAL[diagnosis]
        shown = row[len(diagnoses) : -1]
        return isic(diagnosis, [name for name, here in zip(artifacts, shown, strict=True) if here])

    return _each_distinct(np.column_stack([values == 1.0, unknown]), caption)


def _each_distinct(rows: NDArray[np.bool_], caption: Callable[[NDArray[np.bool_]], str]) -> NDArray[np.object_]:
    """(N,) captions of (N, M) rows, each distinct row worded once."""
    codes = rows @ (1 << np.arange(rows.shape[1]))
    _, first, places = np.unique(codes, return_index=True, return_inverse=True)
    return np.array([caption(rows[i]) for i in first], dtype=object)[places]


def _isic_stem(diagnosis: str) -> str:
    if diagnosis not in ISIC_NEUTRAL:
        raise ValueError(f"diagnosis: got {diagnosis!r}, expected one of {sorted(ISIC_NEUTRAL)}")
    return ISIC_NEUTRAL[diagnosis]
