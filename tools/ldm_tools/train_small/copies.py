"""What a small model has learned to draw, and whether it repeats its training images."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ldm import conditioning, guidance, pipeline, samplers
from ldm.data.labelled import LabelledImages
from ldm.images import save_image, to_uint8
from ldm.pipeline import StableDiffusion
from ldm.train import memorisation
from ldm.train.folder_set import FolderSet, domain_of
from ldm.traversal.figures import grid

SAMPLE_STEPS, SAMPLE_GUIDANCE = 25, 3.0
SHEET_COLUMNS = 8


def look_for_copies(
    args: argparse.Namespace, parts: Sequence[LabelledImages], training: FolderSet, held_out: FolderSet
) -> dict[str, dict[str, float]]:
    """Draw every prompt, save the sheets, and measure how near the samples come to the training images.

    Returns: for each domain what `memorisation.report` says.
    """
    sd = pipeline.load(args.out, args.device)
    found = {}
    for domain, prompts in prompts_of(parts).items():
        rows = [sample(sd, prompt, range(args.samples)) for prompt in tqdm(prompts, desc=f"sampling {domain}")]
        bank_rows, unseen_rows = (np.flatnonzero(of.domains[of.image] == domain) for of in (training, held_out))
        bank = in_batches(lambda rows: memorisation.fingerprint(training.batch(rows)), bank_rows)
        near = memorisation.nearest(memorisation.fingerprint(torch.cat(rows)), bank)
        unseen = in_batches(lambda rows: memorisation.fingerprint(held_out.batch(rows)), unseen_rows)
        found[domain] = memorisation.report(near, memorisation.nearest(unseen, bank))
        save_sheets(args.work, domain, prompts, rows, near, training, bank_rows)
    return found


def prompts_of(parts: Sequence[LabelledImages]) -> dict[str, list[str]]:
    """domain -> the neutral prompts and those of every label."""
    prompts: dict[str, list[str]] = {}
    for part in parts:
        known = prompts.setdefault(domain_of(part), [])
        known += [prompt for prompt in part.prompts() if prompt not in known]
    return prompts


@torch.no_grad()
def sample(sd: StableDiffusion, prompt: str, seeds: Sequence[int]) -> Tensor:
    """What the model draws for a prompt: (B, 3, S, S) in [-1, 1], one image a seed."""
    context, empty = sd.encode_prompts([prompt, ""])[:, None]
    eps_fn = guidance.guided(sd.unet, conditioning.constant(context, SAMPLE_STEPS), SAMPLE_GUIDANCE, empty)
    noise = samplers.initial_noise(list(seeds), sd.latent_shape).to(sd.device)
    *_, last = samplers.ddim(eps_fn, noise, sd.schedule, SAMPLE_STEPS)
    return sd.decode_latents(last.x_t).clamp(-1, 1).float().cpu()


def in_batches(of: Callable[[NDArray[np.int64]], Tensor], rows: NDArray[np.int64], batch: int = 256) -> Tensor:
    """`of` some rows, not all at once."""
    return torch.cat([of(rows[i : i + batch]) for i in range(0, len(rows), batch)])


def save_sheets(
    work: Path,
    domain: str,
    prompts: Sequence[str],
    rows: Sequence[Tensor],
    near: memorisation.Nearest,
    training: FolderSet,
    bank_rows: NDArray[np.int64],
) -> None:
    """samples_DOMAIN.png, a row a prompt; nearest_DOMAIN.png, the samples most like a training image beside it."""
    save_image(
        work / f"samples_{domain}.png", grid([list(to_uint8(row)) for row in rows], list(prompts), [""] * len(rows[0]))
    )
    worst = np.argsort(near.ratio)[:SHEET_COLUMNS]
    shown = to_uint8(torch.cat(list(rows))[worst])
    beside = to_uint8(training.batch(bank_rows[near.index[worst]]))
    columns = [f"{ratio:.2f}" for ratio in near.ratio[worst]]
    save_image(work / f"nearest_{domain}.png", grid([list(shown), list(beside)], ["sample", "nearest"], columns))
