"""The smallest model and data set that `ldm finetune` takes, made by the tests that run it."""

from pathlib import Path

import torch
from lookalikes import chexpert, picture, radiograph

from ldm.checkpoint import save
from ldm.clip import CLIPTextEncoder
from ldm.config import SD15_DIFFUSION, CLIPConfig, DiffusionConfig, UNetConfig, VAEConfig
from ldm.unet import UNet
from ldm.vae import AutoencoderKL

CLIP = CLIPConfig(width=32, layers=1, heads=1, mlp_width=32)
VAE = VAEConfig(widths=(32, 64), resnets_per_level=1)
UNET = UNetConfig(sample_size=8, widths=(32, 64), resnets_per_level=1, attention=(True, False), context_width=32)
PATIENTS = 12


def write_weights(path: Path, unet: UNetConfig = UNET, diffusion: DiffusionConfig = SD15_DIFFUSION) -> Path:
    """A model of 16 x 16 pixels that knows CLIP's whole vocabulary."""
    torch.manual_seed(0)
    save(path, {"clip": CLIPTextEncoder(CLIP), "vae": AutoencoderKL(VAE), "unet": UNet(unet)}, diffusion=diffusion)
    return path


def write_data(folder: Path, first: int = 1) -> Path:
    """CheXpert with a grey image of each patient; effusion in every second, nobody has a fracture."""
    numbers = range(first, first + PATIENTS)
    paths = [f"CheXpert-v1.0-small/train/patient{i:05d}/study1/view1_frontal.jpg" for i in numbers]
    for i, path in enumerate(paths):
        picture(folder / path, grey=20 * i)
    rows = [radiograph(path, pleural_effusion=float(i % 2)) for i, path in enumerate(paths)]
    return chexpert(folder / "CheXpert-v1.0-small", rows)


def command(weights: Path, data: Path, out: Path, *more: str) -> list[str]:
    """What `ldm_tools.cli.main` is called with; latents lie beside OUT."""
    common = ["finetune", "--weights", str(weights), "--data", str(data), "--out", str(out), "--workers", "1"]
    return [*common, "--batch", "2", "--accumulate", "1", "--lr", "1e-3", "--cache", str(out.parent / "latents"), *more]
