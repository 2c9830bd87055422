"""Training the autoencoder, and giving its latents unit variance once scaled.

Letters: B batch, H W image height and width, z the unscaled latent.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ldm.vae import AutoencoderKL, DiagonalGaussian


class Images(Protocol):
    """A training set: a length, and batches (B, 3, H, W) in [-1, 1]."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int], /) -> Tensor: ...


PERCEPTUAL_WEIGHT = 0.03  # where its gradient is about that of the pixels' error
Distance = Callable[[Tensor, Tensor], Tensor]  # of images and decoded ones, (B, 3, H, W) each in [-1, 1]: a scalar


def reconstruction_loss(images: Tensor, decoded: Tensor, perceptual: Distance | None = None) -> Tensor:
    """How far decoded images (B, 3, H, W) are off, in [-1, 1] units; and how else they look, where that is measured.

    Absolute error, which keeps edges sharp; that of the horizontal and vertical differences, so that edges count more;
    and the squared error of the image and of its 8 x 8 means, whose gradient is largest where a small structure is
    missing altogether or has the wrong colour.
    """
    error = decoded - images
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    squares = 3.0 * error.square().mean() + 20.0 * F.avg_pool2d(error, 8).square().mean()
    loss = error.abs().mean() + edges + squares
    return loss if perceptual is None else loss + PERCEPTUAL_WEIGHT * perceptual(images, decoded)


def autoencoder_loss(
    vae: AutoencoderKL,
    images: Tensor,
    noise: Tensor,
    kl_weight: float = 5e-4,
    perceptual: Distance | None = None,
) -> Tensor:
    """Reconstruction from a posterior sample, plus kl_weight times the KL per latent element (nats).

    Args:    images: (B, 3, H, W) in [-1, 1].  noise: (B, C, H/f, W/f) standard normal, what the sample is drawn with.
    """
    with torch.autocast(images.device.type, torch.bfloat16):
        posterior = DiagonalGaussian.from_moments(vae.moments(images).float())
        decoded = vae.decode(posterior.sample(noise)).float()
    return reconstruction_loss(images, decoded, perceptual) + kl_weight * posterior.kl().mean() / noise[0].numel()


def decoder_loss(decoder: nn.ModuleDict, images: Tensor, z: Tensor, perceptual: Distance | None = None) -> Tensor:
    """Reconstruction of images (B, 3, H, W) from latents z (B, C, H/f, W/f). Args: decoder: of `decoding_half`."""
    with torch.autocast(images.device.type, torch.bfloat16):
        decoded = decoder["decoder"](decoder["post_quant_conv"](z)).float()
    return reconstruction_loss(images, decoded, perceptual)


def decoding_half(vae: AutoencoderKL) -> nn.ModuleDict:
    """What leads from z to images: it can learn on while latents stay as they are."""
    return nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})


def posterior_noise(vae: AutoencoderKL, images: Tensor, seed: int, step: int) -> Tensor:
    """The noise of a step, for images (B, 3, H, W): (B, C, H/f, W/f), on their device."""
    batch, _, height, width = images.shape
    f = vae.config.downscale
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return torch.randn(batch, vae.config.latent_channels, height // f, width // f, generator=generator).to(
        images.device
    )


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, data: Images, images: int = 2048, batch: int = 64) -> None:
    """Rescale z so that the scaled latents have mean 0 and standard deviation 1 in every channel.

    SD1.5's factor 0.18215 was measured to do this for its autoencoder. Here the autoencoder is changed to fit the
    factor: z' = k (z - m) is folded into the 1x1 convolutions on both sides of z, which leaves the images unchanged.
    """
    seen = range(min(images, len(data)))
    device = vae.quant_conv.weight.device
    means = torch.cat([vae.encode(data.batch(seen[i : i + batch]).to(device)).mean for i in seen[::batch]]).double()
    m = means.mean(dim=(0, 2, 3))
    k = 1.0 / (vae.config.scaling_factor * means.std(dim=(0, 2, 3)))

    c = vae.config.latent_channels
    into, out_of = vae.quant_conv, vae.post_quant_conv
    assert into.bias is not None
    assert out_of.bias is not None
    into.weight[:c] = (into.weight[:c].double() * k[:, None, None, None]).float()
    into.bias[:c] = ((into.bias[:c].double() - m) * k).float()
    into.bias[c:] += (2.0 * k.log()).float()  # the log-variance of z' = k (z - m)
    out_of.bias += (out_of.weight.double()[:, :, 0, 0] @ m).float()
    out_of.weight[:] = (out_of.weight.double() / k[None, :, None, None]).float()


@torch.no_grad()
def encode_all(vae: AutoencoderKL, data: Images, batch: int = 64) -> Tensor:
    """The posterior of every image, scaled: (N, 2 C, H/f, W/f) float32, mean and standard deviation of C channels."""
    rows, device = [], vae.quant_conv.weight.device
    for i in tqdm(range(0, len(data), batch), desc="encoding", mininterval=5):
        posterior = vae.encode(data.batch(range(i, min(i + batch, len(data)))).to(device))
        latents = torch.cat([posterior.mean, (0.5 * posterior.logvar).exp()], dim=1) * vae.config.scaling_factor
        rows.append(latents.cpu())
    return torch.cat(rows)


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """How well images (B, 3, H, W) in [-1, 1] come back from the mean of their posterior: (B,) decibels.

    PSNR = 10 log10(2^2 / mean squared error), of images that range over 2.
    """
    decoded = vae.decode(vae.encode(images).mean).clamp(-1, 1)
    return 10 * torch.log10(4 / (decoded - images).square().mean(dim=(1, 2, 3)).clamp(min=1e-10))
