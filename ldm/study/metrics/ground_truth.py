"""What only phantoms allow: an edit compared, pixel by pixel, with the counterfactual that it should have been.

Images are (B, 3, H, W) and masks (B, H, W) booleans, numpy arrays or CPU tensors, values on one scale such as [-1, 1].
Norms run over all pixels and channels. Letters: B images, G other patients, n seeds, C classes, S swap steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import binary_dilation
from scipy.spatial.distance import cdist
from scipy.stats import rankdata

Floats = NDArray[np.float64]


def skill(edited: ArrayLike, truth: ArrayLike, original: ArrayLike) -> Floats:
    """How much of the way from the original to the true counterfactual an edit went.

    skill = 1 - |edited - truth| / |original - truth|

    Args:    edited, truth, original: (B, 3, H, W).
    Returns: (B,): 1 perfect, 0 as good as no edit, negative worse; NaN where the truth is the original.
    Raises:  ValueError: shapes that do not fit.
    """
    edited, truth, original = _images(edited=edited, truth=truth, original=original)
    return 1 - _ratio(_norm(edited - truth), _norm(original - truth))


def leakage(edited: ArrayLike, original: ArrayLike, mask: ArrayLike, dilate: int = 0) -> Floats:
    """The share of an edit's squared change that lies outside the attribute's mask.

    Args:    edited, original: (B, 3, H, W).  mask: (B, H, W).  dilate: pixels by which the mask is widened.
    Returns: (B,) in 0..1; NaN where nothing changed.
    Raises:  ValueError: shapes that do not fit, or a negative dilate.
    """
    edited, original = _images(edited=edited, original=original)
    inside = dilated(_masks(mask, edited), dilate)
    change = ((edited - original) ** 2).sum(axis=1)  # (B, H, W)
    return _ratio(np.where(inside, 0, change).sum(axis=(1, 2)), change.sum(axis=(1, 2)))


def dilated(masks: ArrayLike, pixels: int) -> NDArray[np.bool_]:
    """Masks (B, H, W) widened by so many pixels, sideways and diagonally. Raises ValueError for a negative number."""
    masks = np.asarray(masks, bool)
    if pixels < 0 or masks.ndim != 3:
        raise ValueError(f"dilate: expected 0 or more pixels and (B, H, W) masks, got {pixels} and {masks.shape}")
    if pixels == 0:  # to scipy, 0 means "until nothing changes"
        return masks
    return binary_dilation(masks, structure=np.ones((1, 3, 3), bool), iterations=pixels)


def identity_hits(edited: ArrayLike, original: ArrayLike, others: ArrayLike, mask: ArrayLike) -> NDArray[np.bool_]:
    """Whether each edit of one patient is still as near to the patient's own original as to anyone else's.

    The distance is Euclidean over the pixels outside the mask. Equally near is a hit.

    Args:    edited: (B, 3, H, W).  original: (3, H, W).  others: (G, 3, H, W), of other patients.  mask: (H, W).
    Returns: (B,) booleans.
    Raises:  ValueError: shapes that do not fit.
    """
    (edited,), (candidates,) = (
        _images(edited=edited),
        _images(original=np.concatenate([np.asarray(original)[None], np.asarray(others)])),
    )
    if edited.shape[1:] != candidates.shape[1:]:
        raise ValueError(f"original: expected {edited.shape[1:]}, as edited, got {candidates.shape[1:]}")
    outside = ~_masks(np.asarray(mask)[None], edited[:1])[0]
    compared = (images[:, :, outside].reshape(len(images), -1) for images in (edited, candidates))
    distances = cdist(*compared, "sqeuclidean")
    return distances[:, 0] <= distances.min(axis=1)


def oracle_class(edited: ArrayLike, renderings: ArrayLike) -> NDArray[np.int64]:
    """Which of several renderings of its own seed an edit resembles most: a classifier that cannot be fooled.

    Args:    edited: (B, 3, H, W).  renderings: (B, C, 3, H, W), such as without and with an attribute.
    Returns: (B,) int64 in 0..C-1; of equally near ones the first.
    Raises:  ValueError: shapes that do not fit.
    """
    (edited,), renderings = _images(edited=edited), np.asarray(renderings, np.float64)
    if renderings.ndim != 5 or renderings.shape[:1] + renderings.shape[2:] != edited.shape or not renderings.shape[1]:
        raise ValueError(
            f"renderings: expected (B, classes, 3, H, W) for images {edited.shape}, got {renderings.shape}"
        )
    return ((edited[:, None] - renderings) ** 2).sum(axis=(2, 3, 4)).argmin(axis=1)


def edit_strength_correlations(target_probabilities: ArrayLike, swap_steps: Sequence[int]) -> Floats:
    """Spearman's correlation of each seed's target probability with edit strength, which falls with the swap step.

    Args:    target_probabilities: (n, S).  swap_steps: the S steps.
    Returns: (n,); NaN where a row has a NaN or is constant.
    Raises:  ValueError: shapes that do not fit, or fewer than two steps.
    """
    rows = np.asarray(target_probabilities, np.float64)
    if rows.ndim != 2 or rows.shape[1] != len(swap_steps) or len(swap_steps) < 2:
        raise ValueError(f"target_probabilities: expected (seeds, {len(swap_steps)} swap steps >= 2), got {rows.shape}")
    # Spearman's is Pearson's of the ranks; equal values share their mean rank.
    ranks, strength = _centred_ranks(rows), _centred_ranks(-np.asarray(swap_steps, np.float64)[None])
    norms = np.sqrt((ranks**2).sum(axis=1) * (strength**2).sum())
    return _ratio((ranks * strength).sum(axis=1), norms)


def share_of_ceiling(value: float | None, ceiling: float | None) -> float | None:
    """A figure over what the true pairs reach; None where either is missing or the ceiling is 0."""
    if value is None or not ceiling:
        return None
    return value / ceiling


def _images(**named: ArrayLike) -> list[Floats]:
    """The arguments as float64, all of one shape (B, 3, H, W)."""
    arrays = {name: np.asarray(values, np.float64) for name, values in named.items()}
    first = next(iter(arrays.values())).shape
    for name, array in arrays.items():
        if array.ndim != 4 or array.shape[1] != 3 or array.shape != first:
            expected = "(B, 3, H, W)" if array.shape == first else f"{first}, as {next(iter(arrays))}"
            raise ValueError(f"{name}: expected {expected}, got {array.shape}")
    return list(arrays.values())


def _masks(masks: ArrayLike, images: Floats) -> NDArray[np.bool_]:
    array = np.asarray(masks)
    if array.dtype != np.bool_ or array.shape != images[:, 0].shape:
        raise ValueError(f"mask: expected booleans {images[:, 0].shape}, got {array.shape} {array.dtype}")
    return array


def _centred_ranks(rows: Floats) -> Floats:
    """Ranks within each row minus their mean; a row with a NaN is all NaN."""
    ranks = rankdata(rows, axis=1, nan_policy="propagate")
    return ranks - ranks.mean(axis=1, keepdims=True)


def _norm(images: Floats) -> Floats:
    return np.sqrt((images**2).sum(axis=(1, 2, 3)))


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    """NaN instead of a division by zero."""
    return np.where(denominator > 0, numerator / np.where(denominator > 0, denominator, 1), np.nan)
