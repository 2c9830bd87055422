"""One traversal and one round trip of images, with every convention that can be got wrong spelt out as a field.

A trap is a function from the right recipe to a wrong one. The core knows nothing of them: what a trap changes in a
network, it changes in a copy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ldm.clip import CLIPTextEncoder
from ldm.images import to_uint8
from ldm.pipeline import StableDiffusion
from ldm.samplers import initial_noise
from ldm.schedule import Schedule, leading
from ldm.tokenizer import Tokenizer
from ldm.unet import UNet
from ldm.vae import AutoencoderKL, DiagonalGaussian


@dataclass(frozen=True)
class Job:
    """What is drawn: seeds, the prompt that it starts under, the one that it is swapped for, and the settings."""

    seeds: tuple[int, ...]
    neutral: str
    style: str
    swap_step: int = 15
    steps: int = 50
    guidance: float = 3.0


@dataclass(frozen=True, eq=False)
class Conventions:
    """SD1.5's conventions, one a field. Letters: B seeds, L tokens, D context width, S steps."""

    tokenizer: Tokenizer
    clip: CLIPTextEncoder
    unet: UNet
    vae: AutoencoderKL
    schedule: Schedule
    latent_shape: tuple[int, int, int]
    encode_scale: float  # latents = encode_scale * z
    decode_scale: float  # z = latents / decode_scale
    decode_dtype: torch.dtype = torch.float32
    tokens: Callable[[Tokenizer, Sequence[str]], Tensor] = lambda tokenizer, prompts: tokenizer(prompts)
    context: Callable[[CLIPTextEncoder, Tensor], Tensor] = lambda clip, ids: clip(ids)
    noise: Callable[[Sequence[int], Sequence[int]], Tensor] = initial_noise
    timesteps: Callable[[int], Sequence[int]] = leading
    neutral_steps: Callable[[int], int] = lambda swap_step: swap_step
    guide: Callable[[Tensor, Tensor, float], Tensor] = lambda uncond, cond, g: uncond + g * (cond - uncond)
    x0_of: Callable[[Tensor, Tensor, float], Tensor] = lambda x, eps, a: (x - sqrt(1 - a) * eps) / sqrt(a)
    eps_of: Callable[[Tensor, Tensor, float], Tensor] = lambda x, output, a: output
    pick: Callable[[DiagonalGaussian], Tensor] = lambda posterior: posterior.mean
    to_network: Callable[[Tensor], Tensor] = lambda images: images  # from [-1, 1]
    to_bytes: Callable[[Tensor], NDArray[np.uint8]] = to_uint8

    @classmethod
    def right(cls, sd: StableDiffusion) -> Conventions:
        """Everything as it is meant."""
        scale = sd.config.vae.scaling_factor
        return cls(sd.tokenizer, sd.clip, sd.unet, sd.vae, sd.schedule, sd.latent_shape, scale, scale)


Trap = Callable[[Conventions], Conventions]
Network = TypeVar("Network", bound=nn.Module)


@torch.no_grad()
def draw(recipe: Conventions, job: Job) -> Tensor:
    """The latents (B, 4, h, w) of a job: guided DDIM with the prompt swapped on the way.

    The same numbers as ldm.guidance, ldm.conditioning and ldm.samplers compute, in one loop that can be broken.
    """
    ids = recipe.tokens(recipe.tokenizer, ["", job.neutral, job.style])
    empty, neutral, style = recipe.context(recipe.clip, ids)[:, None]
    ts = recipe.timesteps(job.steps)
    alphas = [float(recipe.schedule.alphas_cumprod[t]) for t in ts] + [recipe.schedule.final_alpha_cumprod]
    x = recipe.noise(job.seeds, recipe.latent_shape)
    swap_after = recipe.neutral_steps(job.swap_step)
    for index, t in enumerate(ts):
        cond = neutral if index < swap_after else style
        contexts = torch.cat([empty.expand(len(x), -1, -1), cond.expand(len(x), -1, -1)])
        uncond_eps, cond_eps = recipe.unet(torch.cat([x, x]), t, contexts).chunk(2)
        a_t, a_prev = alphas[index], alphas[index + 1]
        eps = recipe.eps_of(x, recipe.guide(uncond_eps, cond_eps, job.guidance), a_t)
        x0 = recipe.x0_of(x, eps, a_t)
        x = sqrt(a_prev) * x0 + sqrt(1 - a_prev) * eps
    return x


@torch.no_grad()
def decode(recipe: Conventions, latents: Tensor) -> NDArray[np.uint8]:
    """Images (B, H, W, 3) of latents; what is not a number becomes black, as image libraries make it."""
    vae = recipe.vae if recipe.decode_dtype == torch.float32 else copy.deepcopy(recipe.vae).to(recipe.decode_dtype)
    images = vae.decode((latents / recipe.decode_scale).to(recipe.decode_dtype))
    return recipe.to_bytes(torch.nan_to_num(images.float(), nan=-1.0))


@torch.no_grad()
def encode(recipe: Conventions, images: Tensor) -> Tensor:
    """Scaled latents of images (B, 3, H, W) in [-1, 1]."""
    return recipe.encode_scale * recipe.pick(recipe.vae.encode(recipe.to_network(images)))


def replaced(network: Network, kind: type[nn.Module], make: Callable[[nn.Module], nn.Module]) -> Network:
    """A copy of a network in which every module of a kind is another one, made from it."""
    network = copy.deepcopy(network)
    for name in [name for name, module in network.named_modules() if isinstance(module, kind)]:
        network.set_submodule(name, make(network.get_submodule(name)))
    return network
