"""What the frozen autoencoder says of every image, computed once: posteriors on disk, mapped into memory.

Images go into shards in the order of the data set. A shard's name is a hash of its images (path, size, time of the
last change), of what they go through, and of the encoder's weights: a shard that is there is right, one that is
missing is computed, and whatever changes asks for shards of other names. A run that was killed goes on with the next.

Letters: N images, B of a batch, S the side of an image in pixels, h w the latent's height and width.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from ldm.data import images
from ldm.data.reading import AS_STORED, Reading
from ldm.files import complete
from ldm.images import from_uint8
from ldm.train.distributed import Processes
from ldm.vae import AutoencoderKL

SHARD = 256  # images; 32 MiB at 512 x 512 pixels
BATCH = 4  # images in one call of the encoder


class Interrupted(Exception):
    """Someone asked the run to stop while it was still preparing; what is done stays done."""


@dataclass(frozen=True)
class Preprocessing:
    """What a file goes through before the encoder."""

    size: int  # S
    fit: str = "squash"  # as of `ldm.data.images.load_image`; the paper's
    flip: bool = False  # also keep every image's mirror image: its posterior is not the mirrored posterior
    reading: Reading = AS_STORED  # how a file becomes pixels

    def settings(self) -> dict[str, object]:
        """For run.json: a reading as usual is not mentioned, so that older runs can go on."""
        settings = asdict(self)
        if self.reading == AS_STORED:
            del settings["reading"]
        return settings


class Posteriors(Protocol):
    """Where a batch's posteriors come from."""

    def moments(self, rows: NDArray[np.int64], flipped: Sequence[bool]) -> Tensor:
        """(B, 8, h, w) float32 on the CPU: mean and log-variance of the unscaled latents, one after the other."""


class LatentCache:
    """Posteriors on disk; shards are (up to SHARD, 1 or 2 with mirror images, 8, h, w) float32."""

    def __init__(self, shards: Sequence[NDArray[np.float32]]) -> None:
        self.shards = shards

    def moments(self, rows: NDArray[np.int64], flipped: Sequence[bool]) -> Tensor:
        """As of `Posteriors`."""
        stored = [self.shards[row // SHARD][row % SHARD, int(flip)] for row, flip in zip(rows, flipped, strict=True)]
        return torch.from_numpy(np.stack(stored))


class Uncached:
    """Decodes and encodes each batch anew, for data sets that do not fit on the disk."""

    def __init__(
        self, files: NDArray[np.str_], preprocessing: Preprocessing, vae: AutoencoderKL, workers: int = 1
    ) -> None:
        self.files, self.preprocessing, self.vae = files, preprocessing, vae
        self.threads = ThreadPoolExecutor(max(1, workers))  # Pillow decodes without holding Python's lock

    def moments(self, rows: NDArray[np.int64], flipped: Sequence[bool]) -> Tensor:
        """As of `Posteriors`."""
        size, fit, reading = self.preprocessing.size, self.preprocessing.fit, self.preprocessing.reading
        pixels = self.threads.map(lambda row: images.load_image(str(self.files[row]), size, fit, reading), rows)
        turned = [mirror(image) if flip else image for image, flip in zip(pixels, flipped, strict=True)]
        return encode(self.vae, turned)


def build(
    folder: Path,
    files: NDArray[np.str_],
    preprocessing: Preprocessing,
    vae: AutoencoderKL,
    workers: int = 1,
    stop: Callable[[], bool] = lambda: False,
    processes: Processes | None = None,
) -> LatentCache:
    """Compute the shards that are not there yet, and map all of them.

    Args:    workers: processes that decode images; they do not change the result.
             stop: asked between images whether to leave off.  processes: those that share the work; all wait for all.
    Raises:  ValueError: when the disk cannot hold it, or a file cannot be decoded.  Interrupted: when told to stop.
    """
    folder.mkdir(parents=True, exist_ok=True)
    processes = processes or Processes()
    side = preprocessing.size // vae.config.downscale
    each = (1 + preprocessing.flip, 2 * vae.config.latent_channels, side, side)
    chunks = [files[start : start + SHARD] for start in range(0, len(files), SHARD)]
    recipe = f"{preprocessing} {fingerprint(vae.encoder, vae.quant_conv)}"
    paths = [folder / f"{_name(recipe, chunk)}.npy" for chunk in chunks]
    missing = [i for i, path in enumerate(paths) if _mapped(path, (len(chunks[i]), *each)) is None]

    needed = sum(len(chunks[i]) for i in missing) * int(np.prod(each)) * 4
    require_space(folder, needed, "latents", "choose another --cache, or --no-cache")
    mine = [(paths[i], chunks[i]) for i in processes.share(len(chunks)) if i in missing]
    finished = _fill(mine, each, preprocessing, vae, workers, stop)
    if processes.any(not finished):
        raise Interrupted

    shards = [_mapped(path, (len(chunk), *each)) for path, chunk in zip(paths, chunks, strict=True)]
    return LatentCache([shard for shard in shards if shard is not None])


def _fill(
    shards: Sequence[tuple[Path, NDArray[np.str_]]],
    each: tuple[int, ...],
    preprocessing: Preprocessing,
    vae: AutoencoderKL,
    workers: int,
    stop: Callable[[], bool],
) -> bool:
    """Compute and write some shards. Returns whether all are there: False when told to stop."""
    todo = [str(file) for _, files in shards for file in files]
    decoded = images.iterate(todo, preprocessing.size, preprocessing.fit, workers, reading=preprocessing.reading)
    with tqdm(total=len(todo), desc="latents", unit="image", mininterval=5, disable=not todo) as bar:
        for path, files in shards:
            shard = np.empty((len(files), *each), dtype=np.float32)
            for start in range(0, len(shard), BATCH):
                if stop():
                    return False
                pixels = [image for _, image in islice(decoded, min(BATCH, len(shard) - start))]
                shard[start : start + len(pixels), 0] = encode(vae, pixels)
                if preprocessing.flip:
                    shard[start : start + len(pixels), 1] = encode(vae, [mirror(image) for image in pixels])
                bar.update(len(pixels))
            _write(path, shard)
    return True


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: Sequence[NDArray[np.uint8]]) -> Tensor:
    """B times (S, S, 3) -> (B, 8, h, w) float32 on the CPU: mean and log-variance of the unscaled latents."""
    weight = vae.quant_conv.weight
    posterior = vae.encode(from_uint8(np.stack(pixels)).to(weight.device, weight.dtype))
    return torch.cat([posterior.mean, posterior.logvar], dim=1).float().cpu()


def mirror(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(S, S, 3), left and right exchanged."""
    return pixels[:, ::-1]


def fingerprint(*networks: nn.Module) -> str:
    """A hash of the weights of some networks."""
    digest = hashlib.sha256()
    for network in networks:
        for name, tensor in network.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def require_space(folder: Path, needed: int, what: str, instead: str) -> None:
    """Raises ValueError when the disk has less room than a run will need: now, not after hours."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(f"{folder}: {what} need {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; {instead}")


def _name(recipe: str, files: NDArray[np.str_]) -> str:
    digest = hashlib.sha256(recipe.encode())
    for file in files:
        stat = os.stat(file)
        digest.update(f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:32]


def _mapped(path: Path, shape: tuple[int, ...]) -> NDArray[np.float32] | None:
    """A shard; None where there is none that is whole."""
    try:
        shard = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return shard if shard.shape == shape and shard.dtype == np.float32 else None


def _write(path: Path, shard: NDArray[np.float32]) -> None:
    with complete(path, on_disk=True) as partial, partial.open("wb") as file:
        np.save(file, shard, allow_pickle=False)
