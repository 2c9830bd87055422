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
# All that ISIC's sets tell apart, in the words of their own pages; the paper has the first two.
DIAGNOSES = {
    "MEL": "melanoma",
    "NV": "melanocytic nevus",
    "BCC": "basal cell carcinoma",
    "AK": "actinic keratosis",
    "AKIEC": "actinic keratosis or Bowen's disease",
    "BKL": "benign keratosis",
    "DF": "dermatofibroma",
    "VASC": "vascular lesion",
    "SCC": "squamous cell carcinoma",
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

    Args:    diagnosis: one of DIAGNOSES, such as "MEL" or "NV".  artifacts: those present, in any order.
    Raises:  ValueError: for an unknown diagnosis or artifact.
    """
    stem = dermoscopy(diagnosis)
    if isinstance(artifacts, str) or (unknown := sorted(set(artifacts) - set(ISIC_CAPTION_ARTIFACTS))):
        got = artifacts if isinstance(artifacts, str) else unknown
        raise ValueError(f"artifacts: got {got!r}, expected a collection of {list(ISIC_CAPTION_ARTIFACTS)}")
    shown = [name.replace("_", " ") for name in ISIC_CAPTION_ARTIFACTS if name in artifacts]
    return f"{stem} showing {', '.join(shown)}" if shown else f"{stem} with no visible artifacts"


def dermoscopy(diagnosis: str) -> str:
    """The neutral prompt of a diagnosis, which says nothing of artifacts. Raises ValueError for an unknown one."""
    if diagnosis not in DIAGNOSES:
        raise ValueError(f"diagnosis: got {diagnosis!r}, expected one of {sorted(DIAGNOSES)}")
    return f"a dermoscopic image with {DIAGNOSES[diagnosis]} ({diagnosis})"


def isic_style(diagnosis: str, artifact: str) -> str:
    """The prompt of a traversal towards one artifact. Raises ValueError for an unknown diagnosis or artifact."""
    stem = dermoscopy(diagnosis)
    if artifact not in ISIC_STYLES:
        raise ValueError(f"artifact: got {artifact!r}, expected one of {sorted(ISIC_STYLES)}")
    return f"{stem} {ISIC_STYLES[artifact]}"


def chexpert_table(observations: pd.DataFrame, template: str = "paper") -> NDArray[np.object_]:
    """`chexpert` of many radiographs. Args: observations: a column a label, a row an image. Returns: (N,) str."""
    return findings_table(observations, {name: name for name in CHEXPERT_CAPTION_LABELS}, template)


def findings_table(
    observations: pd.DataFrame, words: Mapping[str, str], template: str = "paper"
) -> NDArray[np.object_]:
    """As `chexpert_table`, with labels of any other set.

    Args:    words: column -> words, in the order of the caption.
    Returns: (N,) str.
    Raises:  ValueError: for an unknown template.
    """
    if template not in CHEXPERT_STEMS:
        raise ValueError(f"template: got {template!r}, expected one of {sorted(CHEXPERT_STEMS)}")
    present = observations[list(words)].to_numpy() == 1.0
    spoken = np.array(list(words.values()), dtype=object)

    def caption(row: NDArray[np.bool_]) -> str:
        return f"{CHEXPERT_STEMS[template]} {', '.join(spoken[row])}" if row.any() else CHEXPERT_NEUTRAL

    return each_distinct(present, caption)


def isic_table(
    observations: pd.DataFrame, template: str = "paper", named: Collection[str] = ISIC_CAPTION_ARTIFACTS
) -> NDArray[np.object_]:
    """`isic` of many dermoscopies; where an artifact is unknown (NaN, no column), the bare stem, which denies none.

    Args:    observations: diagnoses and artifacts as columns, a row an image.  template: as for `chexpert`.
             named: the artifacts that captions name; an image with others alone has the bare stem.
    Returns: (N,) str.
    Raises:  ValueError: for an image of none of the diagnoses, or an unknown template.
    """
    if template not in TEMPLATES:
        raise ValueError(f"template: got {template!r}, expected one of {sorted(TEMPLATES)}")
    diagnoses = [name for name in DIAGNOSES if name in ISIC_NEUTRAL or name in observations]
    artifacts = list(ISIC_CAPTION_ARTIFACTS)
    values = observations.reindex(columns=[*diagnoses, *artifacts]).to_numpy()
    if other := int(((values[:, : len(diagnoses)] == 1.0).sum(axis=1) != 1).sum()):
        raise ValueError(f"observations: {other} images are neither {' nor '.join(diagnoses)}, which have no caption")
    unknown = np.isnan(values[:, len(diagnoses) :]).any(axis=1)

    def caption(row: NDArray[np.bool_]) -> str:
        diagnosis = diagnoses[int(np.argmax(row[: len(diagnoses)]))]
        shown = [name for name, here in zip(artifacts, row[len(diagnoses) : -1], strict=True) if here]
        said = [name for name in shown if name in named]
        return dermoscopy(diagnosis) if row[-1] or (shown and not said) else isic(diagnosis, said)

    return each_distinct(np.column_stack([values == 1.0, unknown]), caption)


def each_distinct(rows: NDArray[np.bool_], caption: Callable[[NDArray[np.bool_]], str]) -> NDArray[np.object_]:
    """(N,) captions of (N, M) rows, each distinct row worded once."""
    _, first, places = np.unique(np.packbits(rows, axis=1), axis=0, return_index=True, return_inverse=True)
    return np.array([caption(rows[i]) for i in first], dtype=object)[places.reshape(-1)]
