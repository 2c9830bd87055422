"""Captions from labels, and the prompts of the traversals: neutral ones and one style per attribute.

The wording is that of "Language-Guided Trajectory Traversal in Disentangled Stable Diffusion Latent Space for
Factorized Medical Image Generation" (TehraniNasab, Kumar, Arbel, 2025) and of its published code.
"""

from collections.abc import Collection, Mapping

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


def _isic_stem(diagnosis: str) -> str:
    if diagnosis not in ISIC_NEUTRAL:
        raise ValueError(f"diagnosis: got {diagnosis!r}, expected one of {sorted(ISIC_NEUTRAL)}")
    return ISIC_NEUTRAL[diagnosis]
