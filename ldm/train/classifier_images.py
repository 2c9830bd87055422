"""The images that a classifier learns from: decoded once, and as an autoencoder returns them.

Letters: N images, K attributes, S the side of an image in pixels.
"""

import hashlib
import logging
import math
import shutil
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset
from tqdm import tqdm

from ldm.data.images import iterate, load_image
from ldm.data.labelled import LabelledImages
from ldm.files import complete
from ldm.images import from_uint8, to_uint8
from ldm.train import latent_cache
from ldm.vae import AutoencoderKL

log = logging.getLogger(__name__)

AT_ONCE = 16  # images in one call of an autoencoder
Labelled = Dataset[tuple[Tensor, Tensor]]


class Decoded(Labelled):
    """Item i is image i, uint8 (S, S, 3), and its labels (K,) float32, NaN = unknown.

    kept: (N, S, S, 3), the images decoded before; None: each is decoded when it is asked for.
    """

    def __init__(self, images: LabelledImages, size: int, kept: NDArray[np.uint8] | None = None) -> None:
        self.images, self.size, self.kept = images, size, kept

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        pixels = self._decoded(i) if self.kept is None else np.array(self.kept[i])
        return torch.from_numpy(pixels), torch.from_numpy(self.images.labels[i])

    def _decoded(self, i: int) -> NDArray[np.uint8]:
        return load_image(self.images.files[i], self.size, reading=self.images.reading)


def kept_path(images: LabelledImages, size: int, folder: Path) -> Path:
    """Where they are kept: another file when one of them has changed."""
    names = [f"{file} {Path(file).stat().st_mtime_ns}" for file in images.files]
    digest = hashlib.sha256("\n".join([f"{size} {images.reading}", *names]).encode()).hexdigest()
    return folder / f"{digest[:16]}.npy"


def keep_decoded(images: LabelledImages, size: int, folder: Path, workers: int = 1) -> NDArray[np.uint8] | None:
    """Decode all images once into a file, or take it as it is there: (N, S, S, 3), mapped; None without room for it."""
    path, shape = kept_path(images, size, folder), (len(images), size, size, 3)
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        needed, free = math.prod(shape), shutil.disk_usage(folder).free
        if needed > free / 2:
            log.warning("images are decoded in every epoch: keeping them takes %.1f GB of disk", needed / 1e9)
            return None
        with complete(path) as partial:
            pixels = np.lib.format.open_memmap(partial, "w+", np.uint8, shape)
            decoded = iterate(images.files, size, workers=workers, reading=images.reading)
            for i, image in tqdm(decoded, desc="decoding", total=len(images), mininterval=5):
                pixels[i] = image
            pixels.flush()
    return np.load(path, mmap_mode="r")


@torch.no_grad()
def redecoded(vae: AutoencoderKL, pixels: Tensor) -> NDArray[np.uint8]:
    """What an autoencoder makes of images (B, S, S, 3), as bytes again."""
    images = from_uint8(pixels.to(vae.quant_conv.weight.device))
    return np.concatenate([to_uint8(vae.decode(vae.encode(part).mean)) for part in images.split(AT_ONCE)])


def keep_redecoded(vae: AutoencoderKL, kept: NDArray[np.uint8], path: Path) -> NDArray[np.uint8]:
    """What an autoencoder makes of all images, once into a file, or as it is there: (N, S, S, 3), mapped."""
    if not path.exists():
        with complete(path) as partial:
            pixels = np.lib.format.open_memmap(partial, "w+", np.uint8, kept.shape)
            for i in tqdm(range(0, len(kept), AT_ONCE), desc="through the autoencoder", mininterval=5):
                pixels[i : i + AT_ONCE] = redecoded(vae, torch.from_numpy(np.array(kept[i : i + AT_ONCE])))
            pixels.flush()
    return np.load(path, mmap_mode="r")


def labelled_pixels(
    images: LabelledImages, size: int, folder: Path | None, workers: int = 1, vae: AutoencoderKL | None = None
) -> Labelled:
    """The images and their labels; with an autoencoder 2 N of them, first as they are and then as it returns them.

    A judge of decoded images has to know them: in what a small autoencoder returns thin hairs are fainter, and a
    classifier that never saw that takes hair for none.

    Args:    folder: where decoded images are kept; None: they are decoded whenever they are asked for.
    Raises:  ValueError: an autoencoder, and no images that are kept.
    """
    kept = None if folder is None else keep_decoded(images, size, folder, workers)
    own = Decoded(images, size, kept)
    if vae is None:
        return own
    if folder is None or kept is None:
        raise ValueError("through an autoencoder: its images are kept on disk, which --no-cache or a full disk forbids")
    path = kept_path(images, size, folder).with_suffix(f".{latent_cache.fingerprint(vae)[:16]}.npy")
    return ConcatDataset([own, Decoded(images, size, keep_redecoded(vae, kept, path))])


def fingerprint(images: LabelledImages) -> str:
    """A hash of keys and labels, which tells one training set from another."""
    digest = hashlib.sha256("\n".join(images.keys).encode())
    digest.update(np.ascontiguousarray(images.labels).tobytes())
    return digest.hexdigest()
