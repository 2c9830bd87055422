"""Training a small model, stage by stage: what `ldm train-phantom` and `ldm train-small` share.

    autoencoder -> latents of all images -> decoder alone -> text encoder -> U-Net, in one round or several

What a stage was trained to lies in the work folder and is taken from there; within a stage `fit` goes on from its
newest checkpoint. A stage is a function of the seed and of what it draws at each step, so that a run that was stopped
anywhere and started again equals one that was not.

Letters: N images, B a batch, C latent channels, L context tokens, D context width.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.clip import CLIPTextEncoder
from ldm.config import Config
from ldm.files import complete, write_text
from ldm.schedule import Schedule
from ldm.train import autoencoder, diffusion, group_norm, text_encoder
from ldm.train.autoencoder import Distance, Images
from ldm.train.learner import Recipe
from ldm.train.loop import fit
from ldm.train.replicas import Replicas
from ldm.train.text_encoder import CaptionTokens
from ldm.unet import UNet
from ldm.vae import AutoencoderKL

CAPTION_DROPOUT = 0.1

Draw = Callable[[int], NDArray[np.int64]]  # step -> the images of its batch, (B,)


class Networks(NamedTuple):
    """The three parts of a model in training."""

    clip: CLIPTextEncoder
    vae: AutoencoderKL
    unet: UNet


@dataclass(frozen=True)
class Round:
    """One stretch of the U-Net's training."""

    name: str
    recipe: Recipe
    images_of: Draw


def build(config: Config, seed: int, device: torch.device | str = "cpu") -> Networks:
    """Networks with the initial weights of a seed, in the layout that convolutions are fastest in."""
    torch.manual_seed(seed)  # the initial weights; everything else has generators of its own
    vae, clip = AutoencoderKL(config.vae), CLIPTextEncoder(config.clip)
    text_encoder.initialise(clip)
    unet = UNet(config.unet)
    diffusion.initialise(unet)
    for network in (vae, unet):
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        group_norm.quicken(network)
    return Networks(clip.to(device), vae.to(device), unet.to(device))


def start_from(network: nn.Module, weights: Mapping[str, Tensor]) -> int:
    """Take over the tensors that have the same name and shape; the others keep their initial weights.

    Returns: how many tensors were taken.
    """
    own = network.state_dict()
    taken = {
        name: tensor.float() for name, tensor in weights.items() if name in own and own[name].shape == tensor.shape
    }
    network.load_state_dict({**own, **taken})
    return len(taken)


def train_autoencoder(
    vae: AutoencoderKL,
    data: Images,
    images_of: Draw,
    recipe: Recipe,
    folder: Path,
    seed: int,
    encoded_at_once: int = 64,
    threads: int = 1,
    perceptual: Distance | None = None,
    kl_weight: float = 5e-4,
) -> Tensor:
    """The first stage. Returns the latents of all images: (N, 2 C, h, w), mean and standard deviation, scaled.

    Args:    threads: of `Replicas`.  perceptual, kl_weight: of `autoencoder.autoencoder_loss`.
    """
    latents, weights = folder / "latents.safetensors", folder / "vae.safetensors"
    if latents.exists():
        vae.load_state_dict(load_file(weights))
        return load_file(latents)["latents"]
    device, replicas = vae.quant_conv.weight.device, Replicas(vae, threads)
    loss_of = partial(autoencoder.autoencoder_loss, kl_weight=kl_weight, perceptual=perceptual)

    def loss_at(step: int) -> Tensor:
        images = data.batch(images_of(step).tolist()).to(device)
        noise = autoencoder.posterior_noise(vae, images, seed, step)
        return replicas.loss(loss_of, images, noise)

    if recipe.steps:  # one that is taken over as it is keeps its scale too, which the U-Net knows
        fit("autoencoder", vae, loss_at, recipe, folder)
        autoencoder.normalise_latents(vae, data, images=min(2048, len(data)), batch=encoded_at_once)
    encoded = autoencoder.encode_all(vae, data, batch=encoded_at_once)
    store(weights, dict(vae.state_dict()))
    store(latents, {"latents": encoded})
    return encoded


def train_decoder(
    vae: AutoencoderKL,
    data: Images,
    latents: Tensor,
    images_of: Draw,
    recipe: Recipe,
    folder: Path,
    seed: int,
    threads: int = 1,
    perceptual: Distance | None = None,
) -> None:
    """A stage more for the autoencoder's second half, at any time: latents, and so the U-Net, stay as they are.

    It decodes means with half of the posterior's noise, nearer to what a sampler ends with than a full draw.
    """
    half, device = autoencoder.decoding_half(vae), vae.quant_conv.weight.device
    replicas, scale = Replicas(half, threads), vae.config.scaling_factor

    def loss_at(step: int) -> Tensor:
        chosen = images_of(step)
        mean, std = latents[chosen].chunk(2, dim=1)
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed * 1_000_003 + step))
        images = data.batch(chosen.tolist()).to(device)
        z = ((mean + 0.5 * std * noise) / scale).to(device)
        return replicas.loss(partial(autoencoder.decoder_loss, perceptual=perceptual), images, z)

    fit("decoder", half, loss_at, recipe, folder)


def train_text_encoder(
    clip: CLIPTextEncoder,
    latents: Tensor,
    tokens: CaptionTokens,
    images_of: Draw,
    recipe: Recipe,
    folder: Path,
    seed: int,
) -> None:
    """The second stage. The image tower and the temperature are thrown away."""
    if not recipe.steps:
        return
    c, device = latents.shape[1] // 2, clip.text_model.final_layer_norm.weight.device
    model = text_encoder.ContrastiveModel(clip, (c, *latents.shape[2:])).to(device)

    def loss_at(step: int) -> Tensor:
        images = images_of(step)
        captions = tokens.draw(images, seed, step)
        return text_encoder.contrastive_loss(model, latents[images, :c].to(device), captions, tokens)

    fit("text_encoder", model, loss_at, recipe, folder)


def train_unet(
    unet: UNet,
    latents: Tensor,
    contexts: Tensor,
    tokens: CaptionTokens,
    rounds: Sequence[Round],
    folder: Path,
    seed: int,
    gamma: float = 0.0,
    threads: int = 1,
) -> None:
    """The third stage, in one round after the other.

    Args:    contexts: (captions + 1, L, D), of every caption of `tokens`, and last of the empty one: the text encoder
             is frozen by now.  gamma: of `diffusion.min_snr_weights`; 0 weights all times alike.
             threads: of `Replicas`.
    """
    replicas = Replicas(unet, threads)
    schedule, device = Schedule.sd15(), unet.conv_in.weight.device
    contexts = contexts.to(device)

    def loss_at(images_of: Draw, before: int, step: int) -> Tensor:
        images, step = images_of(step), before + step
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        mean, std = latents[images].chunk(2, dim=1)
        x_0 = (mean + std * torch.randn(mean.shape, generator=generator)).to(device)
        captions = tokens.draw(images, seed, step)
        captions = diffusion.drop_captions(captions, len(contexts) - 1, CAPTION_DROPOUT, generator).to(device)
        eps, t = diffusion.draw_noise(x_0, schedule, generator)
        return replicas.loss(error, x_0, eps, t, contexts[captions])

    def error(network: UNet, x_0: Tensor, eps: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return diffusion.noise_error(network, x_0, eps, t, context, schedule, gamma)

    done = 0  # so that no noise is drawn twice
    for one in rounds:
        fit(one.name, unet, partial(loss_at, one.images_of, done), one.recipe, folder)
        done += one.recipe.steps


@torch.no_grad()
def contexts_of(clip: CLIPTextEncoder, ids: Tensor, empty: Tensor) -> Tensor:
    """The context of every caption, and last of the empty one: (captions + 1, L, D). Args: ids, empty: token ids."""
    return clip(torch.cat([ids, empty]).to(clip.text_model.final_layer_norm.weight.device))


def continue_only(note: Path, asked: Mapping[str, object]) -> None:
    """Write down what a work folder is for; ValueError when it was begun for something else."""
    told = json.loads(json.dumps(asked))  # as it reads when it comes back
    if not note.exists():
        write_text(note, json.dumps(told) + "\n")
    elif (begun := json.loads(note.read_text())) != told:
        raise ValueError(f"--work: {note.parent} was begun with {begun}, asked for {told}; use another folder")


def shrunk(recipe: Recipe, by: int) -> Recipe:
    """The same recipe with fewer steps."""
    return replace(recipe, steps=max(2, recipe.steps // by), warmup=recipe.warmup // by)


def store(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A file of tensors that bears its name once it is complete."""
    with complete(path) as partial_path:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial_path)
