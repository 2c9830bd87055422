"""The training set of a small model: the images of labelled folders, decoded once, and their captions.

Every dermoscopy is seen in the eight positions of a square, for skin has no up and no left; a radiograph in its own
only, for a body has both. An image in a position is a view, and a view is what all stages of training draw.

Letters: N images, V views, B a batch, S the side of an image in pixels.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ldm.data import captions, images
from ldm.data.labelled import LabelledImages
from ldm.data.reading import Reading
from ldm.files import complete

POSITIONS = {"skin": 8}  # of a square: quarter turns, and those mirrored; of other images one


def phrasings(data: LabelledImages) -> list[tuple[str, ...]]:
    """The captions that each image goes by, one of which is drawn each time it is seen: N tuples.

    All wordings of the paper and of its code. An image that shows nothing is also captioned with the neutral prompt of
    the paper's traversals, a dermoscopy with a single artifact with the prompt that a traversal swaps in.
    """
    worded = zip(*(data.captions(template) for template in captions.TEMPLATES), strict=True)
    further = {"chest": _of_radiograph, "skin": _of_dermoscopy}.get(data.kind, lambda row: [])
    rows = data.observations.to_dict("records")
    return [tuple(dict.fromkeys([*texts, *further(row)])) for texts, row in zip(worded, rows, strict=True)]


def _of_radiograph(row: Mapping[str, float]) -> list[str]:
    shown = [name for name in captions.CHEXPERT_CAPTION_LABELS if row.get(name) == 1.0]
    return [captions.CHEXPERT_NEUTRAL] if shown == ["No Finding"] else []


def _of_dermoscopy(row: Mapping[str, float]) -> list[str]:
    known = [row.get(name, np.nan) for name in captions.ISIC_CAPTION_ARTIFACTS]
    if np.isnan(known).any():
        return []
    diagnosis = next(name for name in captions.DIAGNOSES if row.get(name) == 1.0)
    shown = [name for name, value in zip(captions.ISIC_CAPTION_ARTIFACTS, known, strict=True) if value == 1.0]
    if not shown:
        return [captions.dermoscopy(diagnosis)]
    return [captions.isic_style(diagnosis, shown[0])] if len(shown) == 1 else []


@dataclass(frozen=True, eq=False)
class FolderSet:
    """V views of the images of one or more folders, shuffled once; view v is image `image[v]` in `position[v]`."""

    pixels: NDArray[np.uint8]  # (N, S, S, 3), may be mapped from disk
    domains: NDArray[np.str_]  # (N,) what an image is of: "skin", "chest", or the name of its data set
    names: NDArray[np.str_]  # (N,) the data set's name of each image
    texts: Sequence[tuple[str, ...]]  # N: the captions of each image
    image: NDArray[np.int64]  # (V,)
    position: NDArray[np.int64]  # (V,) 0..7

    def __len__(self) -> int:
        return len(self.image)

    @property
    def captions(self) -> list[tuple[str, ...]]:
        """V: the captions of each view."""
        return [self.texts[i] for i in self.image]

    def batch(self, views: Sequence[int] | NDArray[np.integer]) -> Tensor:
        """(B, 3, S, S) float32 in [-1, 1], channels last in memory."""
        chosen = np.asarray(views)
        turned = [turn(self.pixels[i], k) for i, k in zip(self.image[chosen], self.position[chosen], strict=True)]
        return torch.from_numpy(np.stack(turned)).permute(0, 3, 1, 2).float() / 127.5 - 1.0

    def chances(
        self, shares: Mapping[str, float], balance: float = 1.0, boosts: Mapping[str, float] | None = None
    ) -> NDArray[np.float64]:
        """How probably each view is drawn: (V,), adding up to 1.

        Args:    shares: of each domain, relative.
                 balance: a caption that n images have is drawn in proportion to n ** balance: 1 as often as it comes,
                 0 as often as any other.  boosts: a piece of caption -> how many times as often it is drawn.
        """
        first = [texts[0] for texts in self.texts]
        _, caption, count = np.unique(first, return_inverse=True, return_counts=True)
        chance = count[caption] ** (balance - 1.0)
        for piece, factor in (boosts or {}).items():
            chance *= np.where([piece in text for text in first], factor, 1.0)
        for domain, share in shares.items():
            of = self.domains == domain
            chance[of] *= share / chance[of].sum()
        per_image = np.bincount(self.image, minlength=len(chance))
        each = (chance / per_image)[self.image]
        return each / each.sum()


def turn(pixels: NDArray[np.uint8], position: int) -> NDArray[np.uint8]:
    """One of the eight positions of a square image (S, S, 3): quarter turns, from 4 on those of its mirror image."""
    turned = np.rot90(pixels, position % 4)
    return turned[:, ::-1] if position >= 4 else turned


def build(parts: Sequence[LabelledImages], size: int, cache: Path, turned: bool, seed: int = 0) -> FolderSet:
    """Decode the images of some folders, or take them from `cache`, an .npy that was made of the same files.

    Args:    turned: in all positions that the domain has; otherwise as they are.
    Raises:  ValueError: for an image that cannot be decoded.
    """
    files = np.concatenate([part.files for part in parts])
    order = np.random.default_rng([seed, 99]).permutation(len(files))
    domains = np.concatenate([np.full(len(part), domain_of(part)) for part in parts])[order]
    readings = [part.reading for part in parts for _ in range(len(part))]
    texts = [text for part in parts for text in phrasings(part)]
    counts = np.array([POSITIONS.get(name, 1) if turned else 1 for name in domains])
    image = np.concatenate([np.flatnonzero(counts > k) for k in range(max(counts))])
    position = np.concatenate([np.full((counts > k).sum(), k) for k in range(max(counts))])
    return FolderSet(
        pixels=_decoded(files[order], [readings[i] for i in order], size, cache),
        domains=domains,
        names=np.concatenate([part.keys for part in parts])[order],
        texts=[texts[i] for i in order],
        image=image,
        position=position,
    )


def domain_of(part: LabelledImages) -> str:
    """ "skin", "chest", or the name of a data set that is neither."""
    return part.kind or part.name


def _decoded(files: NDArray[np.str_], readings: Sequence[Reading], size: int, cache: Path) -> NDArray[np.uint8]:
    told = "\n".join([str(size), *files, *map(repr, readings)])
    path = cache.with_name(f"{cache.stem}-{hashlib.sha256(told.encode()).hexdigest()[:16]}.npy")
    if not path.exists():
        with complete(path) as partial:
            pixels = np.lib.format.open_memmap(partial, "w+", np.uint8, (len(files), size, size, 3))
            pairs = zip(files, readings, strict=True)
            for i, (file, reading) in enumerate(tqdm(pairs, desc="decoding", total=len(files), mininterval=5)):
                pixels[i] = images.load_image(file, size, reading=reading)
            pixels.flush()
    return np.load(path, mmap_mode="r")


def draw_views(chances: NDArray[np.float64], seed: int, step: int, batch: int) -> NDArray[np.int64]:
    """The views of one step, (B,), drawn with replacement; depends on (seed, step) only."""
    return np.random.default_rng([seed, step, 2]).choice(len(chances), batch, p=chances)
