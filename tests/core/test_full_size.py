"""The commands on a file of SD1.5's size and layout, as a researcher would run them on the published one."""

import json
from pathlib import Path

import pytest
import torch
from ldm_tools.cli import main
from PIL import Image
from safetensors.torch import load_file

from ldm import checkpoint
from ldm.clip import CLIPTextEncoder
from ldm.unet import UNet
from ldm.vae import AutoencoderKL


@pytest.mark.slow
def test_traverse_from_a_single_file_to_images(
    full_clip: CLIPTextEncoder, full_vae: AutoencoderKL, full_unet: UNet, tmp_path: Path
) -> None:
    """Two steps at 64 x 64 latents, a swap after the first: three U-Net rows, two images of 512 x 512."""
    weights, out = tmp_path / "full.safetensors", tmp_path / "out"
    checkpoint.save(weights, {"clip": full_clip, "vae": full_vae, "unet": full_unet}, dtype=torch.float16)
    prompts = ["--neutral", "Chest X-ray of a subject", "--style", "effusion=Chest X-ray showing Pleural Effusion"]
    few = ["--steps", "2", "--swap-steps", "1", "--bezier-points", "0", "--guidance", "1"]
    where = ["--weights", str(weights), "--device", "cpu", "--out", str(out)]
    assert main(["traverse", *prompts, *few, *where]) == 0

    assert json.loads((out / "run.json").read_text())["unet_rows"] == 3
    latents = load_file(out / "latents.safetensors")
    assert latents["seed0000/neutral"].shape == (4, 64, 64)
    assert not torch.equal(latents["seed0000/neutral"], latents["seed0000/effusion/s01"])
    assert all(bool(tensor.isfinite().all()) for tensor in latents.values())
    assert Image.open(out / "images/seed0000/effusion/s01.png").size == (512, 512)
