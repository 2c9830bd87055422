"""Fine-tuning the U-Net on images and their captions; text encoder and autoencoder stay as they are. [paper, stage one]

    per image  flipped?, t, dropped caption?, posterior noise, eps <- (seed, place in the run's stream of images)
    per step   accumulate x batch images -> gradients -> clip -> AdamW -> moving average

It has a loop of its own beside `ldm.train.loop.fit`, which trains small networks from scratch with a cosine: this one
accumulates gradients, can be stopped at any step, validates, and writes checkpoints of a whole model.

Letters: N images, B of a batch, C distinct captions, L context tokens, D context width, h w the latent's sides.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from ldm.blocks import ResnetBlock, SpatialTransformer
from ldm.schedule import TRAIN_STEPS, Schedule
from ldm.train.diffusion import drop_captions, min_snr_weights, predict_noise
from ldm.train.latent_cache import Posteriors
from ldm.train.loop import Ema
from ldm.train.phantom_set import draw
from ldm.train.state import RunFolder
from ldm.unet import UNet
from ldm.vae import DiagonalGaussian

EPOCHS = {"chexpert": 100, "isic": 500}  # [authors' code]
VALIDATION_SEED = 0  # its noise is the same in every run, so that runs can be compared
BINS = 4  # quarters of the time axis that the validation loss is told for


@dataclass(frozen=True)
class FineTuning:
    """All that decides a run besides model and images. The defaults are the paper's. [authors' code]"""

    steps: int  # of AdamW
    lr: float = 1e-5
    batch: int = 8  # B, images at a time
    accumulate: int = 4  # batches a step
    seed: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    clip: float = 1.0  # largest norm of a step's gradient
    warmup: int = 0  # steps in which the learning rate rises; then it is constant
    ema_decay: float = 0.0  # 0 keeps no moving average
    caption_dropout: float = 0.0  # share of captions replaced by the empty one
    min_snr_gamma: float = 0.0  # 0 weights all times alike
    flip: bool = False  # mirror half of the images
    bf16: bool = False  # mixed precision
    fused: bool = False  # AdamW in one kernel
    checkpoint_gradients: bool = False  # compute activations twice rather than keep them

    def lr_at(self, step: int) -> float:
        """Of step 0, 1, ...: a linear warm-up, then constant."""
        return self.lr * min(1.0, (step + 1) / self.warmup) if self.warmup else self.lr

    def settings(self) -> dict[str, object]:
        """What must stay the same when a run is continued: all but its length."""
        return {name: value for name, value in asdict(self).items() if name != "steps"}


@dataclass(frozen=True, eq=False)
class Material:
    """What a run learns from; the frozen networks have said all that they will say of it."""

    files: NDArray[np.str_]  # (N,)
    posteriors: Posteriors  # of the N images
    captions: Tensor  # (N,) int64 rows of `contexts`
    contexts: Tensor  # (C + 1, L, D), the last is the empty caption's
    scaling_factor: float  # latents = scaling_factor * z

    def __len__(self) -> int:
        return len(self.files)


class Examples(NamedTuple):
    """One batch of training examples."""

    x_0: Tensor  # (B, 4, h, w) scaled latents
    eps: Tensor  # (B, 4, h, w)
    t: Tensor  # (B,) int64
    context: Tensor  # (B, L, D)


def encode_captions(
    encode_prompts: Callable[[Sequence[str]], Tensor], captions: Iterable[str], batch: int = 64
) -> tuple[Tensor, Tensor]:
    """The text encoder's part, once for each distinct caption.

    Args:    encode_prompts: B texts -> (B, L, D).  captions: N texts.
    Returns: (C + 1, L, D) contexts, the empty caption's last; (N,) int64, the row of each caption.
    """
    texts = list(captions)
    distinct = sorted(set(texts))
    prompts = [*distinct, ""]
    contexts = torch.cat([encode_prompts(prompts[i : i + batch]).float() for i in range(0, len(prompts), batch)])
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
    streams = [_stream(recipe.seed, first_place + i) for i in range(len(rows))]
    t = torch.stack([torch.randint(TRAIN_STEPS, (), generator=stream) for stream in streams])
    flipped = [bool(torch.rand((), generator=stream) < 0.5) and recipe.flip for stream in streams]
    empty = len(material.contexts) - 1
    captions = torch.stack(
        [
            drop_captions(material.captions[row], empty, recipe.caption_dropout, stream)
            for row, stream in zip(rows, streams, strict=True)
        ]
    )
    posterior = DiagonalGaussian.from_moments(material.posteriors.moments(rows, flipped))
    shape = posterior.mean.shape[1:]
    noise, eps = torch.stack([torch.randn((2, *shape), generator=stream) for stream in streams], dim=1)
    return Examples(posterior.sample(noise) * material.scaling_factor, eps, t, material.contexts[captions])


def _stream(seed: int, place: int) -> torch.Generator:
    """The random numbers of one image of the stream; no two seeds or places share theirs."""
    return torch.Generator().manual_seed(
        int(np.random.SeedSequence([seed, place]).generate_state(1, np.uint64)[0] >> 1)
    )


def loss_of(unet: UNet, batch: Examples, schedule: Schedule, recipe: FineTuning) -> Tensor:
    """The mean over a batch of each image's mean squared error of the noise, weighted by time where asked for."""
    x_0, eps, t, context = (tensor.to(unet.conv_in.weight.device) for tensor in batch)
    predicted = predict_noise(unet, x_0, eps, t, context, schedule, bf16=recipe.bf16)
    errors = (predicted - eps).square().flatten(1).mean(1)
    if recipe.min_snr_gamma:
        errors = errors * min_snr_weights(schedule, t, recipe.min_snr_gamma)
    return errors.mean()


# --- validation ------------------------------------------------------------------------------------------------------


def validation_examples(material: Material) -> list[Examples]:
    """Held-out images, each once a bin of times, with noise that is the same in every run.

    Returns: for each of BINS bins, one batch: its times are spread evenly over the bin; latents are the means.
    """
    rows = np.arange(len(material))
    posterior = DiagonalGaussian.from_moments(material.posteriors.moments(rows, [False] * len(rows)))
    x_0 = posterior.mean * material.scaling_factor
    eps = torch.stack([torch.randn(x_0.shape[1:], generator=_stream(VALIDATION_SEED, int(row))) for row in rows])
    within = (torch.arange(len(rows)) + 0.5) / len(rows)
    context = material.contexts[material.captions]
    return [Examples(x_0, eps, ((b + within) * (TRAIN_STEPS / BINS)).long(), context) for b in range(BINS)]


@torch.no_grad()
def validate(unet: UNet, bins: Sequence[Examples], schedule: Schedule, recipe: FineTuning) -> dict[str, float]:
    """The unweighted loss for each bin of times, "0-249" first, and their "mean"; of the weights in training."""
    losses = {}
    for b, batch in enumerate(bins):
        chunks = zip(*(tensor.split(recipe.batch) for tensor in batch), strict=True)
        errors = [_squared_errors(unet, Examples(*chunk), schedule, recipe.bf16) for chunk in chunks]
        losses[f"{b * TRAIN_STEPS // BINS}-{(b + 1) * TRAIN_STEPS // BINS - 1}"] = float(torch.cat(errors).mean())
    return {**losses, "mean": sum(losses.values()) / len(losses)}


def _squared_errors(unet: UNet, batch: Examples, schedule: Schedule, bf16: bool) -> Tensor:
    """(B,) mean squared errors of the noise."""
    x_0, eps, t, context = (tensor.to(unet.conv_in.weight.device) for tensor in batch)
    return (predict_noise(unet, x_0, eps, t, context, schedule, bf16=bf16) - eps).square().flatten(1).mean(1)


# --- the loop --------------------------------------------------------------------------------------------------------


def finetune(
    unet: UNet,
    schedule: Schedule,
    material: Material,
    held_out: Sequence[Examples],
    recipe: FineTuning,
    folder: RunFolder,
    save_every: int,
    stop: Callable[[], bool] = lambda: False,
) -> int:
    """Train `unet` in place, going on from the folder's newest state; save every so many steps and at the end.

    Args:    held_out: batches to validate on whenever the run is saved, as of `validation_examples`; may be empty.
             stop: asked after each step whether to save and leave.
    Returns: how many steps are done: recipe.steps, or fewer when told to stop.
    Raises:  ValueError: when a loss or gradient is not finite: the step, the images, the last good checkpoint.
    """
    own_memory(unet)
    if recipe.checkpoint_gradients:
        recompute_activations(unet)
    optimiser = torch.optim.AdamW(
        unet.parameters(), recipe.lr, recipe.betas, recipe.eps, recipe.weight_decay, fused=recipe.fused or None
    )
    ema = Ema(unet, recipe.ema_decay) if recipe.ema_decay else None
    done = start = folder.resume(unet, optimiser, ema)
    folder.forget_after(start)
    if held_out and not start:
        folder.note({"step": 0, "validation": validate(unet, held_out, schedule, recipe)})

    began = time.monotonic()
    images = recipe.batch * recipe.accumulate
    with tqdm(total=recipe.steps, initial=start, desc="fine-tuning", unit="step", mininterval=1) as bar:
        stopping = stop()
        while done < recipe.steps and not stopping:
            loss = accumulate(unet, schedule, material, recipe, done, folder)
            norm = float(nn.utils.clip_grad_norm_(unet.parameters(), recipe.clip))
            if not math.isfinite(norm):
                raise ValueError(f"the gradient's norm at step {done + 1} is {norm}; {_way_back(folder)}")
            for group in optimiser.param_groups:
                group["lr"] = recipe.lr_at(done)
            optimiser.step()
            if ema is not None:
                ema.update(unet, done)

            rate = images * (done + 1 - start) / (time.monotonic() - began)
            row: dict[str, object] = {
                "epoch": (done + 1) * images / len(material),
                "loss": loss,
                "grad_norm": norm,
                "images_per_s": rate,
            }
            done += 1
            bar.update()
            bar.set_postfix_str(f"{rate:.1f} images/s, loss {loss:.4f}")
            stopping = stop()  # asked once a step: who leaves has saved
            due = done % save_every == 0 or done == recipe.steps
            if due and held_out and not stopping:
                row["validation"] = validate(unet, held_out, schedule, recipe)
            folder.note({"step": done, **row, "lr": recipe.lr_at(done - 1)})
            if due or stopping:
                folder.save(done, unet, optimiser, ema)
    return done


def accumulate(
    unet: UNet, schedule: Schedule, material: Material, recipe: FineTuning, step: int, folder: RunFolder
) -> float:
    """Leave the gradients of one step in the network. Returns its loss."""
    unet.zero_grad(set_to_none=True)
    rows = draw(recipe.seed, step, len(material), recipe.batch * recipe.accumulate)
    total = 0.0
    for start in range(0, len(rows), recipe.batch):
        chosen = rows[start : start + recipe.batch]
        batch = examples(material, recipe, chosen, step * len(rows) + start)
        loss = loss_of(unet, batch, schedule, recipe) / recipe.accumulate
        if not math.isfinite(loss.item()):
            names = ", ".join(str(file) for file in material.files[chosen])
            raise ValueError(f"the loss at step {step + 1} is {loss.item()}, of {names}; {_way_back(folder)}")
        loss.backward()
        total += loss.item()
    return total


def _way_back(folder: RunFolder) -> str:
    steps = folder.steps()
    last = f"the last good checkpoint is {folder.checkpoint(steps[-1])}" if steps else "there is no checkpoint yet"
    return f"{last}; try a lower --lr"


def own_memory(unet: UNet) -> None:
    """Move weights that are views of a mapped file into memory of torch's own, and let all of them learn.

    Where numbers lie decides how vector units sum them, in the last bit; a continued run must not differ.
    """
    for p in unet.parameters():
        p.data = torch.empty_like(p).copy_(p)
    unet.train().requires_grad_(True)


def recompute_activations(unet: UNet) -> None:
    """Keep only the inputs of resnets and transformers for the backward pass. [Chen et al. 2016]"""
    for module in unet.modules():
        if isinstance(module, ResnetBlock | SpatialTransformer):
            setattr(module, "forward", partial(checkpoint, module.forward, use_reentrant=False))  # noqa: B010
