"""A fine-tuning run watched: its log, the loss on held-out images by time, pictures of what it draws when asked.

OUT/log.jsonl                  a line a step: epoch, loss, grad_norm, lr, images_per_s, outside (the share of the step's
                               time outside network and optimiser); when the run is saved also the validation loss
OUT/tensorboard/               the same numbers and pictures for TensorBoard
OUT/samples/step-00000500.png  a row for each prompt, a column for each seed
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ldm.config import Prediction
from ldm.files import complete
from ldm.images import save_image, to_uint8
from ldm.pipeline import StableDiffusion
from ldm.schedule import TRAIN_STEPS, Schedule
from ldm.train.diffusion import Network
from ldm.train.objective import Examples, FineTuning, Material, squared_errors, stream
from ldm.traversal import figures
from ldm.vae import DiagonalGaussian

LOG = "log.jsonl"
VALIDATION_SEED = 0  # its noise is the same in every run, so that runs can be compared
BINS = 4  # quarters of the time axis that the validation loss is told for
SAMPLE_SEEDS = (0, 1, 2, 3)  # columns
SAMPLE_STEPS = 25  # of DDIM
SAMPLE_GUIDANCE = 3.0


# --- the log ---------------------------------------------------------------------------------------------------------


class Log:
    """Where a run writes what happens, a line a step.

    Args:    start: the step that the run goes on from. What a killed run did after it is removed: it will be done
             again.  writes: whether this process is the one that writes; the others' logs do nothing.
    """

    def __init__(self, folder: Path, start: int, writes: bool = True) -> None:
        self.folder, self.writes = folder, writes
        if writes:
            from torch.utils.tensorboard import SummaryWriter  # seconds to import, and of use nowhere else

            forget_after(folder / LOG, start)
            self.board = SummaryWriter(folder / "tensorboard", purge_step=start + 1 if start else 0)

    def note(self, step: int, row: Mapping[str, float | Mapping[str, float]]) -> None:
        """Numbers by name, or several under one name: {"loss": 0.1, "validation": {"0-249": 0.2}}."""
        if not self.writes:
            return
        with (self.folder / LOG).open("a") as file:
            file.write(json.dumps({"step": step, **row}) + "\n")
        for name, value in row.items():
            parts = value if isinstance(value, Mapping) else {"": value}
            for part, number in parts.items():
                self.board.add_scalar(f"{name}/{part}" if part else name, number, step)

    def picture(self, step: int, image: Image.Image) -> None:
        """What the model draws after so many steps."""
        if self.writes:
            save_image(self.folder / "samples" / f"step-{step:08d}.png", image)
            self.board.add_image("samples", np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        """Write what TensorBoard has not written yet."""
        if self.writes:
            self.board.close()


def forget_after(path: Path, step: int) -> None:
    """Remove the log's lines after a step, and one that was cut short."""
    lines = path.read_text().splitlines() if path.exists() else []
    with complete(path, on_disk=True) as partial:
        partial.write_text("".join(f"{line}\n" for line in lines if _step_of(line) <= step))


def _step_of(line: str) -> float:
    """A log line's step; infinite for a line that was cut short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


# --- validation ------------------------------------------------------------------------------------------------------


def validation_examples(material: Material) -> list[Examples]:
    """Held-out images, each once a bin of times, with noise that is the same in every run.

    Returns: for each of BINS bins, one batch: its times are spread evenly over the bin; latents are the means.
    """
    rows = np.arange(len(material))
    posterior = DiagonalGaussian.from_moments(material.posteriors.moments(rows, [False] * len(rows)))
    x_0 = posterior.mean * material.scaling_factor
    eps = torch.stack([torch.randn(x_0.shape[1:], generator=stream(VALIDATION_SEED, int(row))) for row in rows])
    within = (torch.arange(len(rows)) + 0.5) / len(rows)
    context = material.contexts[material.captions]
    return [Examples(x_0, eps, ((b + within) * (TRAIN_STEPS / BINS)).long(), context) for b in range(BINS)]


@torch.no_grad()
def validate(
    network: Network,
    bins: Sequence[Examples],
    schedule: Schedule,
    recipe: FineTuning,
    device: torch.device,
    prediction: Prediction = "eps",
) -> dict[str, float]:
    """The unweighted loss for each bin of times, "0-249" first, and their "mean"."""
    losses = {}
    for b, batch in enumerate(bins):
        chunks = zip(*(tensor.split(recipe.batch) for tensor in batch), strict=True)
        errors = [squared_errors(network, Examples(*chunk), schedule, recipe, device, prediction) for chunk in chunks]
        losses[f"{b * TRAIN_STEPS // BINS}-{(b + 1) * TRAIN_STEPS // BINS - 1}"] = float(torch.cat(errors).mean())
    return {**losses, "mean": sum(losses.values()) / len(losses)}


# --- pictures --------------------------------------------------------------------------------------------------------


def draw_samples(sd: StableDiffusion, prompts: Sequence[str]) -> Image.Image:
    """A row for each prompt, a column for each of SAMPLE_SEEDS: the same noise in every run and at every step."""
    rows = []
    for context in sd.encode_prompts(prompts)[:, None]:
        *_, last = sd.sample(context, SAMPLE_SEEDS, steps=SAMPLE_STEPS, guidance_scale=SAMPLE_GUIDANCE)
        rows.append(list(to_uint8(sd.decode_latents(last.x_prev))))
    return figures.grid(rows, list(prompts), [f"seed {seed}" for seed in SAMPLE_SEEDS])
