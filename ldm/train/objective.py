"""What a step of fine-tuning learns from: images and captions made into noisy latents; and its loss. [paper, stage one]

    per image  flipped?, t, dropped caption?, posterior noise, eps <- (seed, place in the run's stream of images)

Letters: N images, B of a batch, C distinct captions, L context tokens, D context width, h w the latent's sides.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.config import Prediction
from ldm.schedule import TRAIN_STEPS, Schedule
from ldm.train.diffusion import Network, drop_captions, min_snr_weights, predict_noise, target
from ldm.train.latent_cache import Posteriors
from ldm.train.learner import Recipe
from ldm.vae import DiagonalGaussian

EPOCHS = {"chest": 100, "skin": 500}  # of CheXpert and ISIC 2019   [authors' code]
AUTOCAST = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class FineTuning(Recipe):
    """All that decides a run besides model and images. The defaults are the paper's. [authors' code]"""

    lr: float = 1e-5
    warmup: int = 0  # steps in which the learning rate rises; then it is constant
    final_lr: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    batch: int = 8  # B, images at a time
    accumulate: int = 4  # batches a step, whatever number of processes they are dealt to
    seed: int = 0
    caption_dropout: float = 0.0  # share of captions replaced by the empty one
    min_snr_gamma: float = 0.0  # 0 weights all times alike
    flip: bool = False  # mirror half of the images
    precision: Literal["float32", "bf16", "fp16"] = "float32"  # of the arithmetic; weights are float32
    fused: bool = False  # AdamW in one kernel
    compile: bool = False  # the network translated by torch.compile
    checkpoint_gradients: bool = False  # compute activations twice rather than keep them

    def settings(self) -> dict[str, object]:
        """What must stay the same when a run is continued: all but its length, and what is the same in every run."""
        return {name: value for name, value in asdict(self).items() if name not in ("steps", "final_lr", "save_every")}


@dataclass(frozen=True, eq=False)
class Material:
    """What a run learns from; the frozen networks have said all that they will say of it."""

    files: NDArray[np.str_]  # (N,)
    posteriors: Posteriors  # of the N images
    captions: Tensor  # (N,) int64 rows of `contexts`
    contexts: Tensor  # (C + 1, L, D), the last is the empty caption's; token ids (C + 1, L) for a learning encoder
    scaling_factor: float  # latents = scaling_factor * z

    def __len__(self) -> int:
        return len(self.files)


class Examples(NamedTuple):
    """One batch of training examples."""

    x_0: Tensor  # (B, 4, h, w) scaled latents
    eps: Tensor  # (B, 4, h, w)
    t: Tensor  # (B,) int64
    context: Tensor  # (B, L, D); or (B, L) token ids


def encode_captions(
    encode_prompts: Callable[[Sequence[str]], Tensor], captions: Iterable[str], batch: int = 64
) -> tuple[Tensor, Tensor]:
    """The frozen text encoder's part, or the tokenizer's before one that learns, once for each distinct caption.

    Args:    encode_prompts: B texts -> (B, L, D) contexts, or (B, L) token ids.  captions: N texts.
    Returns: (C + 1, L, D) or (C + 1, L), the empty caption's last; (N,) int64, the row of each caption.
    """
    texts = list(captions)
    distinct = sorted(set(texts))
    prompts = [*distinct, ""]
    contexts = torch.cat([encode_prompts(prompts[i : i + batch]) for i in range(0, len(prompts), batch)])
    place = {text: i for i, text in enumerate(distinct)}
    return contexts, torch.tensor([place[text] for text in texts])


def data_hash(keys: Iterable[str], captions: Iterable[str]) -> str:
    """Tells one training set from another: which images with which captions, in which order."""
    digest = hashlib.sha256()
    for key, caption in zip(keys, captions, strict=True):
        digest.update(f"{key}\0{caption}\n".encode())
    return digest.hexdigest()


def examples(material: Material, recipe: FineTuning, rows: NDArray[np.int64], first_place: int) -> Examples:
    """A batch. Each image's random numbers come from its place in the run's stream of images, so they depend neither
    on the size of the batch nor on how many processes share it.

    Args:    rows: (B,) images.  first_place: of rows[0], counted from the run's first image.
    """
    streams = [stream(recipe.seed, first_place + i) for i in range(len(rows))]
    t = torch.stack([torch.randint(TRAIN_STEPS, (), generator=own) for own in streams])
    flipped = [bool(torch.rand((), generator=own) < 0.5) and recipe.flip for own in streams]
    empty = len(material.contexts) - 1
    captions = torch.stack(
        [
            drop_captions(material.captions[row], empty, recipe.caption_dropout, own)
            for row, own in zip(rows, streams, strict=True)
        ]
    )
    posterior = DiagonalGaussian.from_moments(material.posteriors.moments(rows, flipped))
    shape = posterior.mean.shape[1:]
    noise, eps = torch.stack([torch.randn((2, *shape), generator=own) for own in streams], dim=1)
    return Examples(posterior.sample(noise) * material.scaling_factor, eps, t, material.contexts[captions])


def stream(seed: int, place: int) -> torch.Generator:
    """The random numbers of one image of the stream; no two seeds or places share theirs."""
    return torch.Generator().manual_seed(
        int(np.random.SeedSequence([seed, place]).generate_state(1, np.uint64)[0] >> 1)
    )


def squared_errors(
    network: Network,
    batch: Examples,
    schedule: Schedule,
    recipe: FineTuning,
    device: torch.device,
    prediction: Prediction = "eps",
) -> Tensor:
    """(B,) each image's mean squared error of the noise, or of what else the network predicts, on the device."""
    x_0, eps, t, context = (tensor.to(device) for tensor in batch)
    predicted = predict_noise(network, x_0, eps, t, context, schedule, autocast=AUTOCAST[recipe.precision])
    return (predicted - target(prediction, x_0, eps, t, schedule)).square().flatten(1).mean(1)


def loss_of(
    network: Network,
    batch: Examples,
    schedule: Schedule,
    recipe: FineTuning,
    device: torch.device,
    prediction: Prediction = "eps",
) -> Tensor:
    """The mean of the squared errors over a batch, weighted by time where asked for."""
    errors = squared_errors(network, batch, schedule, recipe, device, prediction)
    if recipe.min_snr_gamma:
        errors = errors * min_snr_weights(schedule, batch.t, recipe.min_snr_gamma, prediction).to(device)
    return errors.mean()
