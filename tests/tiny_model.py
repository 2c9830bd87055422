"""A whole model of random weights, small enough to run commands on."""

from pathlib import Path

import torch

from ldm import checkpoint
from ldm.clip import CLIPTextEncoder
from ldm.config import CLIPConfig, UNetConfig, VAEConfig
from ldm.unet import UNet
from ldm.vae import AutoencoderKL

UNET = UNetConfig(
    sample_size=8,
    widths=(16, 16),
    resnets_per_level=1,
    attention=(True, False),
    heads=2,
    context_width=16,
    norm_groups=8,
)


def write_tiny_model(path: Path) -> Path:
    """16 x 16 pixels, latents of 8 x 8, in the single-file layout."""
    torch.manual_seed(0)
    parts = {
        "clip": CLIPTextEncoder(CLIPConfig(width=16, layers=1, heads=2, mlp_width=32)),
        "vae": AutoencoderKL(VAEConfig(widths=(8, 8), resnets_per_level=1, norm_groups=4)),
        "unet": UNet(UNET),
    }
    with torch.no_grad():  # latents of size 1, as a trained model's: networks normalise, so small ones are all change
        parts["vae"].quant_conv.weight *= 20
    checkpoint.save(path, parts)
    return path
