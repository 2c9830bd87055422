"""The few lines a user starts from: load a checkpoint, turn prompts into contexts, noise into latents, into images.

sd = ldm.load("v1-5-pruned-emaonly.safetensors")
for step in sd.sample(sd.encode_prompts(["a photograph of an astronaut"]), seeds=[0]):
    ...
images = sd.decode_latents(step.x_prev)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ldm import checkpoint
from ldm.checkpoint import KeyReport
from ldm.clip import CLIPTextEncoder
from ldm.conditioning import Contexts, constant
from ldm.config import SD15_DIFFUSION, Config, DiffusionConfig, Prediction
from ldm.finite import NotFinite, Watch, blame, is_finite
from ldm.guidance import GuidedEps, guided
from ldm.images import to_uint8
from ldm.prediction import Predicted
from ldm.prompt_weights import weigh
from ldm.samplers import SAMPLERS, History, Sampler, Step, initial_noise, step_noise
from ldm.samplers.names import meaning
from ldm.schedule import SPACINGS, Schedule
from ldm.tokenizer import Tokenizer
from ldm.unet import STANDARD_BLOCKS, UNet, UNetBlocks
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
    diffusion: DiffusionConfig = SD15_DIFFUSION  # what `schedule` and `unet.prediction` were made of
    prompt_chunks: int = 1  # of 75 tokens, each encoded by itself; see `ldm.tokenizer.Tokenizer.chunked`
    max_batch: int | None = None  # most rows in one U-Net call, see `ldm.guidance.guided`; None: all of them

    @property
    def dtype(self) -> torch.dtype:
        """The U-Net's. Latents are float32 between its calls, whatever it is."""
        return self.unet.conv_in.weight.dtype

    @property
    def prediction(self) -> Prediction:
        """What its U-Net predicts; what `guided` makes of it is eps."""
        return self.unet.prediction

    @property
    def backend(self) -> str:
        """What computes its U-Net: "torch", or what `ldm.fast` installed into it: "triton", "openvino"."""
        return getattr(getattr(self.unet, "installed", None), "backend", "torch")

    @property
    def cuda_graph_used(self) -> bool:
        """Whether any call of its U-Net was the replay of a CUDA graph, which `ldm.fast` installs."""
        return getattr(getattr(self.unet, "installed", None), "cuda_graph_used", False)

    @property
    def engine(self) -> dict[str, Any] | None:
        """Which other engine than torch computes its U-Net: name, version, precision, calls; None: none does."""
        return getattr(getattr(self.unet, "installed", None), "engine", None)

    @property
    def kernels_refused(self) -> list[str]:
        """Kernels that were found wrong where this runs, and why; torch computes those operations."""
        return getattr(getattr(self.unet, "installed", None), "refused", [])

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(4, H/f, W/f) at the size that the U-Net was trained at: (4, 64, 64) for SD1.5."""
        return (self.config.unet.latent_channels, self.config.unet.sample_size, self.config.unet.sample_size)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """The contexts of some prompts: (B, L, D), in the U-Net's dtype; L is 77 for each of `prompt_chunks`.

        What a prompt loses at their end is said in the log. Raises NotFinite for NaN or Inf in the contexts.
        """
        self.tokenizer.say_cut(prompts, self.prompt_chunks)
        ids = self.tokenizer.chunked(prompts, self.prompt_chunks).to(self.device)
        contexts = self.clip(ids.flatten(0, 1))
        if self.tokenizer.reads_weights:
            weights = self.tokenizer.weights(prompts, self.prompt_chunks)
            contexts = weigh(contexts, [row for chunks in weights for row in chunks])
        contexts = contexts.unflatten(0, ids.shape[:2]).flatten(1, 2).to(self.dtype)
        if not is_finite(contexts):
            raise blame("text encoder", self.clip)
        return contexts

    def guided(
        self, contexts: Contexts, guidance_scale: float = 7.5, negative: Contexts | Tensor | None = None
    ) -> GuidedEps | Predicted:
        """The U-Net under some contexts, as samplers call it, pushed away from `negative` (None: from "")."""
        if negative is None and guidance_scale != 1:
            negative = self.encode_prompts([""])
        return guided(self.unet, contexts, guidance_scale, negative, max_batch=self.max_batch, schedule=self.schedule)

    @torch.no_grad()
    def sample(
        self,
        contexts: Contexts | Tensor,
        seeds: Sequence[int],
        *,
        steps: int | None = None,
        guidance_scale: float = 7.5,
        negative: Contexts | Tensor | None = None,
        sampler: str | Sampler = "ddim",
        spacing: str | Sequence[float] | None = None,
        end: str | None = None,
        eta: float | None = None,
        size: tuple[int, int] | None = None,
        x_T: Tensor | None = None,
        start: int = 0,
        history: History = (),
    ) -> Iterator[Step]:
        """Denoise a latent for every seed, without gradients: the last Step's `x_prev` are the latents, float32.

        contexts: see `ldm.conditioning`; a tensor (B or 1, L, D) holds for all steps.  steps: S; None: as many as there
        are contexts for, 50 for a tensor.  guidance_scale, negative: see `guided`.  sampler: a name in
        `ldm.samplers.SAMPLERS`, one that users know (`ldm.samplers.names`), or your own.  spacing: a name in
        `ldm.schedule.SPACINGS`, or the S timesteps; None: the model's own.  end: one of `ldm.schedule.ENDS`, likewise.
        eta: of samplers that have one.  size: height and width of the latents; None: as trained.
        x_T: (B, 4, H/f, W/f) instead of the seeds' own noise; with `start`, the latents after so many steps, and
        `history` what that Step remembered.
        Raises ValueError for an argument out of range or of a wrong shape, on the first `next`, and its kind NotFinite
        for NaN or Inf, on a GPU after the last step.
        """
        contexts = _over_steps(contexts, steps)
        steps = len(contexts)
        if x_T is None:
            x_T = initial_noise(seeds, (self.latent_shape[0], *(size or self.latent_shape[1:])))
        if len(x_T) != len(seeds):
            raise ValueError(f"x_T: expected {len(seeds)} rows, one a seed, got {len(x_T)}")
        if isinstance(sampler, str):
            sampler, spacing = meaning(sampler, spacing, SAMPLERS)
        method = SAMPLERS[sampler] if isinstance(sampler, str) else sampler
        schedule = self.schedule if end is None else self.schedule.ending_at(end)
        spacing = schedule.spacing if spacing is None else spacing
        if isinstance(spacing, str):
            spacing = _named("spacing", spacing, SPACINGS)(steps, schedule)
        watch = Watch(self.unet)
        for step in method(
            self.guided(contexts, guidance_scale, negative),
            x_T.to(self.device),
            schedule,
            steps,
            eta=eta,
            start=start,
            history=history,
            noise=step_noise(seeds, x_T.shape[1:]),
            timesteps=spacing,
        ):
            watch(step.index, step.x0_pred, last=step.index == steps - 1)
            yield step

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> scaled latents (B, 4, H/f, W/f): the posterior's mean."""
        vae_dtype = self.vae.quant_conv.weight.dtype
        mean = self.vae.encode(images.to(self.device, vae_dtype)).mean
        return (mean * self.config.vae.scaling_factor).to(self.dtype)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, 4, H/f, W/f) -> images (B, 3, H, W), about [-1, 1] and not clipped.

        Raises NotFinite for NaN or Inf in either.
        """
        vae_dtype = self.vae.quant_conv.weight.dtype
        images = self.vae.decode(latents.to(self.device, vae_dtype) / self.config.vae.scaling_factor)
        if not is_finite(images):
            if not is_finite(latents):
                raise NotFinite("latents: got NaN or Inf in them, expected finite ones; sample them anew")
            raise blame("autoencoder", self.vae)
        return images

    def weights_sha256(self) -> str:
        """The SHA-256 of the checkpoint file; for several, adapters included, that of their lines "hash  name"."""
        hashes = sorted(("/".join(path.parts[-2:]), checkpoint.sha256(path)) for path in self.files)
        if len(hashes) == 1 and not self.adapters:
            return hashes[0][1]
        lines = [*(f"{digest}  {name}\n" for name, digest in hashes), *(f"{line}\n" for line in self.adapters)]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


Choice = TypeVar("Choice")


def _named(argument: str, name: str, known: Mapping[str, Choice]) -> Choice:
    if name not in known:
        raise ValueError(f"{argument}: expected one of {', '.join(known)}, got {name!r}")
    return known[name]


def _over_steps(contexts: Contexts | Tensor, steps: int | None) -> Contexts:
    if isinstance(contexts, Tensor):
        return constant(contexts, 50 if steps is None else steps)
    if steps not in (None, len(contexts)):
        raise ValueError(f"steps: expected {len(contexts)}, as many as there are contexts for, got {steps}")
    return contexts


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = torch.float32,
    *,
    ema: checkpoint.WeightSet | None = None,
    base: str | Path | None = None,
    loras: Sequence[tuple[str | Path, float]] = (),
    embeddings: Sequence[str | Path] = (),
    blocks: UNetBlocks = STANDARD_BLOCKS,
) -> StableDiffusion:
    """Read a model from a file or folder in any supported layout, as plain torch; see `ldm.checkpoint`.

    dtype: None keeps what is stored.  ema: "ema" or "plain", where a file holds both.  base: a whole model to take from
    what `path` lacks.  loras: files and weights, merged.  embeddings: files, whose words prompts may say.
    blocks: that the file's U-Net was saved with.
    Raises CheckpointError (a ValueError): in one line what the path is instead, or which keys do not fit.
    """
    # In half precision the autoencoder is float32 all the same: in float16 its activations overflow, in bfloat16 images
    # lose grey levels.
    device = torch.device(device)
    vae_dtype = dtype if dtype is None else torch.float32
    loaded = checkpoint.load_parts(
        path,
        dtype=dtype,
        vae_dtype=vae_dtype,
        device=device,
        ema=ema,
        base=base,
        loras=loras,
        embeddings=embeddings,
        blocks=blocks,
    )
    tokenizer = Tokenizer(loaded.config.clip.tokens, loaded.vocabulary)
    with checkpoint.naming(Path(path)):
        tokenizer.require_rows(loaded.config.clip.vocabulary)
    loaded.unet.prediction = loaded.diffusion.prediction
    return StableDiffusion(
        config=loaded.config,
        tokenizer=tokenizer,
        clip=loaded.clip,
        unet=loaded.unet,
        vae=loaded.vae,
        schedule=Schedule.of(loaded.diffusion),
        device=device,
        report=loaded.report,
        files=loaded.files,
        weight_set=loaded.weight_set,
        adapters=loaded.adapters,
        diffusion=loaded.diffusion,
    )
