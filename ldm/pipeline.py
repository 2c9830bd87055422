"""The few lines a user starts from: load a checkpoint, turn prompts into contexts, latents into images.

sd = ldm.load("v1-5-pruned-emaonly.safetensors")
context, empty = sd.encode_prompts(["a photograph of an astronaut", ""])[:, None]
eps_fn = ldm.guidance.guided(sd.unet, ldm.conditioning.constant(context, 50), 7.5, empty)
with torch.no_grad():
    for step in ldm.samplers.ddim(eps_fn, ldm.samplers.initial_noise([0], sd.latent_shape), sd.schedule, 50):
        ...
images = sd.decode_latents(step.x_prev)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ldm import checkpoint
from ldm.checkpoint import KeyReport
from ldm.clip import CLIPTextEncoder
from ldm.config import Config
from ldm.images import to_uint8
from ldm.schedule import Schedule
from ldm.tokenizer import Tokenizer
from ldm.unet import UNet
from ldm.vae import AutoencoderKL

__all__ = ["PHANTOM_WEIGHTS", "WEIGHTS", "StableDiffusion", "load", "to_uint8"]

PACKAGE = Path(__file__).parent
WEIGHTS = PACKAGE / "weights" if (PACKAGE / "weights").exists() else PACKAGE.parent / "weights"  # installed, checkout
PHANTOM_WEIGHTS = WEIGHTS / "phantom.safetensors"


@dataclass(frozen=True, eq=False)
class StableDiffusion:
    """A loaded model. Letters: B batch, L = 77 tokens, D context width, f = 8 image pixels a latent pixel."""

    config: Config
    tokenizer: Tokenizer
    clip: CLIPTextEncoder
    unet: UNet
    vae: AutoencoderKL
    schedule: Schedule
    device: torch.device
    report: KeyReport = field(repr=False)  # what became of every key of the files
    files: tuple[Path, ...] = ()
    weight_set: checkpoint.WeightSet | None = None  # which U-Net weights, where the file holds both sets
    adapters: tuple[str, ...] = ()  # a line for each LoRA and embedding: its SHA-256, its file's name, its weight

    @property
    def dtype(self) -> torch.dtype:
        """The U-Net's. Latents are float32 between its calls, whatever it is."""
        return self.unet.conv_in.weight.dtype

    @property
    def backend(self) -> str:
        """What computes its U-Net: "torch", or "triton" where `ldm.fast` installed kernels into it."""
        return getattr(getattr(self.unet, "installed", None), "backend", "torch")

    @property
    def cuda_graph_used(self) -> bool:
        """Whether any call of its U-Net was the replay of a CUDA graph, which `ldm.fast` installs."""
        return getattr(getattr(self.unet, "installed", None), "cuda_graph_used", False)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(4, H/f, W/f) at the size that the U-Net was trained at: (4, 64, 64) for SD1.5."""
        return (self.config.unet.latent_channels, self.config.unet.sample_size, self.config.unet.sample_size)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """The contexts of some prompts: (B, L, D), in the U-Net's dtype."""
        return self.clip(self.tokenizer(prompts).to(self.device)).to(self.dtype)

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """Scaled latents: the posterior's mean times 0.18215.

        Args:    images: (B, 3, H, W) in [-1, 1].
        Returns: (B, 4, H/f, W/f) in the U-Net's dtype.
        """
        vae_dtype = self.vae.quant_conv.weight.dtype
        mean = self.vae.encode(images.to(self.device, vae_dtype)).mean
        return (mean * self.config.vae.scaling_factor).to(self.dtype)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images of scaled latents.

        Args:    latents: (B, 4, H/f, W/f).
        Returns: (B, 3, H, W) in the autoencoder's dtype, about [-1, 1] and not clipped.
        """
        vae_dtype = self.vae.quant_conv.weight.dtype
        return self.vae.decode(latents.to(self.device, vae_dtype) / self.config.vae.scaling_factor)

    def weights_sha256(self) -> str:
        """The SHA-256 of the checkpoint file; for several, adapters included, that of their lines "hash  name"."""
        hashes = sorted(("/".join(path.parts[-2:]), checkpoint.sha256(path)) for path in self.files)
        if len(hashes) == 1 and not self.adapters:
            return hashes[0][1]
        lines = [*(f"{digest}  {name}\n" for name, digest in hashes), *(f"{line}\n" for line in self.adapters)]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = torch.float32,
    *,
    ema: checkpoint.WeightSet | None = None,
    base: str | Path | None = None,
    loras: Sequence[tuple[str | Path, float]] = (),
    embeddings: Sequence[str | Path] = (),
) -> StableDiffusion:
    """Read a model from a file or folder in any supported layout, as plain torch; see `ldm.checkpoint`.

    Args:    dtype: float32, float16 or bfloat16; None keeps what is stored.
             ema: "ema" or "plain", needed only where a file holds both sets of U-Net weights.
             base: a whole model to take from what `path` lacks; for U-Net-only files of fine-tuning frameworks.
             loras: files and weights, merged.  embeddings: files, whose words prompts may say.
    Returns: the model in evaluation mode. With dtype float16 or bfloat16 the autoencoder is float32 all the same:
             in float16 its activations overflow, in bfloat16 images lose grey levels.
    Raises:  CheckpointError (a ValueError): in one line what the path is instead, or which keys do not fit.
    """
    device = torch.device(device)
    vae_dtype = dtype if dtype is None else torch.float32
    loaded = checkpoint.load_parts(
        path, dtype=dtype, vae_dtype=vae_dtype, device=device, ema=ema, base=base, loras=loras, embeddings=embeddings
    )
    tokenizer = Tokenizer(loaded.config.clip.tokens, loaded.vocabulary)
    with checkpoint.naming(Path(path)):
        tokenizer.require_rows(loaded.config.clip.vocabulary)
    return StableDiffusion(
        config=loaded.config,
        tokenizer=tokenizer,
        clip=loaded.clip,
        unet=loaded.unet,
        vae=loaded.vae,
        schedule=Schedule.sd15(),
        device=device,
        report=loaded.report,
        files=loaded.files,
        weight_set=loaded.weight_set,
        adapters=loaded.adapters,
    )
