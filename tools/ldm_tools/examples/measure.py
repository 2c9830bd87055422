"""What the examples have in common: the same few phantoms sampled with a changed network, and how far they move."""

import torch
from torch import Tensor

from ldm.conditioning import constant
from ldm.guidance import UNetFn, guided
from ldm.images import to_uint8
from ldm.phantom.prompts import DOMAINS, GUIDANCE
from ldm.pipeline import StableDiffusion
from ldm.samplers import ddim, initial_noise

PROMPTS = (DOMAINS["chest"].styles["pleural_effusion"], DOMAINS["skin"].styles["hair"])


@torch.no_grad()
def sample(
    sd: StableDiffusion,
    unet: UNetFn,
    prompts: tuple[str, ...] = PROMPTS,
    seeds: tuple[int, ...] = (0, 1),
    steps: int = 50,
) -> Tensor:
    """Latents (prompts * seeds, 4, h, w) by guided DDIM through any network."""
    contexts = sd.encode_prompts(["", *prompts])
    rows = contexts[1:].repeat_interleave(len(seeds), dim=0)
    eps_fn = guided(unet, constant(rows, steps), GUIDANCE, contexts[:1])
    x_t = initial_noise(seeds * len(prompts), sd.latent_shape)
    for step in ddim(eps_fn, x_t, sd.schedule, steps):
        x_t = step.x_prev
    return x_t


def greys(sd: StableDiffusion, changed: Tensor, plain: Tensor) -> float:
    """The mean absolute difference of the decoded images, of 255 grey levels."""
    images = [to_uint8(sd.decode_latents(latents)).astype(float) for latents in (changed, plain)]
    return float(abs(images[0] - images[1]).mean())
