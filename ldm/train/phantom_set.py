"""The training set of the phantom model: rendered images on disk, and their captions.

Letters: N images, B a batch, S = 128 pixels a side.
"""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ldm.files import complete
from ldm.images import from_uint8
from ldm.phantom import ATTRIBUTES, render, sample_attributes
from ldm.phantom.prompts import phrasings

DOMAINS = tuple(ATTRIBUTES)


class PhantomSet:
    """N rendered phantoms of both domains, alternating, memory-mapped; image i is phantom seed0 + i // 2."""

    def __init__(self, folder: Path, count: int, seed0: int, size: int = 128, workers: int = 2) -> None:
        """Opens folder/phantoms.npy, rendering it first where it is missing. uint8, (N, S, S, 3)."""
        self.keys = [(DOMAINS[i % 2], seed0 + i // 2) for i in range(count)]
        self.attributes = [sample_attributes(domain, seed) for domain, seed in self.keys]
        self.captions = [phrasings(d, a) for (d, _), a in zip(self.keys, self.attributes, strict=True)]
        path, meta = folder / "phantoms.npy", {"count": count, "seed0": seed0, "size": size}
        note = folder / "phantoms.json"
        if not path.exists():
            note.write_text(json.dumps(meta))
            self._render(path, size, workers)
        if json.loads(note.read_text()) != meta:
            raise ValueError(
                f"{path}: rendered with {note.read_text()}, asked for {json.dumps(meta)}; use a new folder"
            )
        self.images: NDArray[np.uint8] = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.keys)

    def having(self, name: str) -> NDArray[np.int64]:
        """The indices of all images of a domain, or with an attribute."""
        shown = [name == d or a.get(name, False) for (d, _), a in zip(self.keys, self.attributes, strict=True)]
        return np.flatnonzero(shown)

    def batch(self, indices: Sequence[int] | NDArray[np.integer]) -> Tensor:
        """(B, 3, S, S) float32 in [-1, 1], channels last in memory."""
        return from_uint8(self.images[np.asarray(indices)])

    def _render(self, path: Path, size: int, workers: int) -> None:
        jobs = list(zip(self.keys, self.attributes, strict=True))
        with complete(path) as unfinished, ProcessPoolExecutor(workers) as pool:
            images = np.lib.format.open_memmap(unfinished, "w+", np.uint8, (len(self), size, size, 3))
            rendered = pool.map(partial(_render_one, size=size), jobs, chunksize=64)
            for i, image in enumerate(tqdm(rendered, desc="rendering", total=len(self), mininterval=5)):
                images[i] = image
            images.flush()


def _render_one(job: tuple[tuple[str, int], Mapping[str, bool]], size: int) -> NDArray[np.uint8]:
    (domain, seed), attributes = job
    return render(domain, seed, attributes, size).to_uint8()


def draw(seed: int, step: int, count: int, batch: int) -> NDArray[np.int64]:
    """The images of one step: walks through a new permutation each epoch; depends on (seed, step) only."""
    places = np.arange(step * batch, (step + 1) * batch)
    epochs, within = places // count, places % count
    orders = {e: np.random.default_rng([seed, e]).permutation(count) for e in np.unique(epochs)}
    return np.array([orders[e][i] for e, i in zip(epochs, within, strict=True)])
