"""How different two images look: LPIPS and SSIM.

LPIPS compares features of a network trained on ImageNet. The lpips package brings the small linear heads (v0.1), but
not the network's own weights: those are torchvision's, 5 to 530 MB, and often there is no way to fetch them.
`load_lpips` then says so instead of failing, and everything else can go on.

Images are float tensors in [-1, 1]. Letters: B images, H W pixels.
Sources: Zhang et al. 2018 (LPIPS); Wang et al. 2004 (SSIM).
"""

from __future__ import annotations

import hashlib
import logging
import socket
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Literal

import lpips
import torch
from skimage.metrics import structural_similarity
from torch import Tensor
from torchvision import models

log = logging.getLogger(__name__)

Net = Literal["alex", "vgg", "squeeze"]
BACKBONES = {
    "alex": models.AlexNet_Weights.IMAGENET1K_V1,
    "vgg": models.VGG16_Weights.IMAGENET1K_V1,
    "squeeze": models.SqueezeNet1_1_Weights.IMAGENET1K_V1,
}
PATIENCE_S = 20  # of silence from one of the server's addresses, before it is given up
SMALLEST_LPIPS_PX = {"alex": 31, "vgg": 16, "squeeze": 17}  # the networks' strides leave nothing of less
SMALLEST_SSIM_PX = 11  # the window


@dataclass(frozen=True)
class Unavailable:
    """Why LPIPS cannot be computed here, and what to do about it; as text, a sentence fit for a table's note."""

    reason: str
    how_to_get_them: str

    def __str__(self) -> str:
        return f"LPIPS was not measured: {self.reason}; {self.how_to_get_them}"


@dataclass(frozen=True)
class Lpips:
    """LPIPS v0.1, ready to compare images."""

    net: Net
    network: lpips.LPIPS

    @torch.inference_mode()
    def __call__(self, images: Tensor, reference: Tensor) -> Tensor:
        """The distance of each image to its reference: 0 for the same image, about 0.5 to 1 for unrelated ones.

        Args:    images: (B, 3, H, W) in [-1, 1].  reference: (3, H, W), or (B, 3, H, W).
        Returns: (B,) float32, on the images' device.
        Raises:  ValueError: other shapes, values outside [-1, 1], or sides under `SMALLEST_LPIPS_PX`.
        """
        reference = _check_images(images, reference, SMALLEST_LPIPS_PX[self.net])
        distances = self.network.to(images.device)(images.float(), reference.float())
        return distances.flatten()


def load_lpips(net: Net = "alex", *, fetch: bool = False) -> Lpips | Unavailable:
    """LPIPS with a backbone's weights from torch's cache folder.

    Nothing is downloaded without `fetch`, and a server that is silent for 20 s is given up. The file's place and what
    went wrong are told to the log, not in the answer, which reports print. A weight file counts only if its SHA-256
    begins as its name says. torchvision publishes these files as pickles; they are read by torchvision's own loader
    restricted to tensors (weights_only), and so does lpips read its linear heads.

    Args:    net: "alex" as in the paper, "vgg" or "squeeze".  fetch: download the weights if they are not there.
    Returns: the distance, or why there is none.
    Raises:  ValueError: another net.
    """
    if net not in BACKBONES:
        raise ValueError(f"net: expected one of {list(BACKBONES)}, got {net!r}")
    path, url = backbone_path(net), BACKBONES[net].url
    if not path.exists() and not fetch:
        log.info("LPIPS: %s belongs at %s", url, path)
        return Unavailable("its ImageNet weights were not on disk", "`ldm evaluate --fetch` gets them")
    if not path.exists() and (failure := _fetch(url, path)):
        log.info("LPIPS: %s could not be fetched to %s: %s", url, path, failure)
        return Unavailable("its ImageNet weights could not be fetched", "`ldm evaluate --fetch` tries again")
    if not _sha256(path).startswith(_promised_sha256(path)):
        log.info("LPIPS: %s does not have the SHA-256 that its name promises; delete it", path)
        reason = f"the SHA-256 of its ImageNet weights, {path.name}, is not the one that the name promises"
        return Unavailable(reason, "delete that file, and `ldm evaluate --fetch` gets another")
    backbone = BACKBONES[net].get_state_dict(progress=False, weights_only=True)  # on disk: downloads nothing
    return Lpips(net, build_network(net, backbone))


def backbone_path(net: Net) -> Path:
    """Where torch keeps a backbone's weights."""
    return Path(torch.hub.get_dir(), "checkpoints", Path(BACKBONES[net].url).name)


def build_network(net: Net, backbone: Mapping[str, Tensor]) -> lpips.LPIPS:
    """lpips' network around a torchvision state dict, without lpips fetching one itself.

    lpips cuts torchvision's `features` into slices, whose layers keep their numbers: features.3.weight is
    net.slice2.3.weight.
    """
    # Its random first weights must not shift anyone's draws, and it calls torchvision by arguments long deprecated.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
        network = lpips.LPIPS(net=net, version="0.1", pnet_rand=True, verbose=False)
    layers = network.net.state_dict()
    network.net.load_state_dict({name: backbone["features." + name.split(".", 1)[1]] for name in layers})
    return network.eval().requires_grad_(False)


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity to a reference: 1 for the same image; means of the channels and of all windows.

    As in Wang et al.: Gaussian window of 11 x 11 pixels (sigma 1.5), population covariance, K1 = 0.01, K2 = 0.03, and
    2 as the range of the values.

    Args:    images: (B, 3, H, W) in [-1, 1].  reference: (3, H, W), or (B, 3, H, W).
    Returns: (B,) float64 on the CPU.
    Raises:  ValueError: other shapes, values outside [-1, 1], or sides under 11 pixels.
    """
    reference = _check_images(images, reference, SMALLEST_SSIM_PX)
    values = [
        structural_similarity(
            image,
            other,
            channel_axis=0,
            data_range=2.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for image, other in zip(images.double().cpu().numpy(), reference.double().cpu().numpy(), strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64)


def _check_images(images: Tensor, reference: Tensor, smallest_px: int) -> Tensor:
    """The reference of each image, (B, 3, H, W)."""
    if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < smallest_px:
        raise ValueError(
            f"images: expected (B, 3, H, W) with sides of at least {smallest_px} px, got {tuple(images.shape)}"
        )
    if reference.shape not in (images.shape[1:], images.shape):
        raise ValueError(f"reference: expected one image or {len(images)} as large, got {tuple(reference.shape)}")
    for name, values in (("images", images), ("reference", reference)):
        if values.numel() and not bool((values.abs() <= 1 + 1e-3).all()):  # room for the rounding of low precisions
            raise ValueError(f"{name}: expected values in [-1, 1], got up to {float(values.abs().max()):g}; clamp them")
    return reference.expand_as(images)


def _fetch(url: str, path: Path) -> str | None:
    """Download to a temporary name, check, rename. Returns what went wrong."""
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE_S)  # torch's downloader has no such argument
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=_promised_sha256(path), progress=False)
    except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: the hash is another
        return f"{type(error).__name__}: {error}"
    finally:
        socket.setdefaulttimeout(patience)
    return None


def _promised_sha256(path: Path) -> str:
    """alexnet-owt-7be5be79.pth -> 7be5be79."""
    return path.stem.rpartition("-")[2]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
