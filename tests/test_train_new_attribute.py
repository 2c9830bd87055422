"""`ldm finetune` teaches the shipped model what it has never seen, a large heart, and it forgets nothing else."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import Tensor

import ldm
from ldm import classifier
from ldm.data import folders
from ldm.data.phantom import render, sample_attributes
from ldm.data.phantom.folders import write_chexpert
from ldm.pipeline import PHANTOM_WEIGHTS, StableDiffusion
from tools import cli

PROMPTS = {
    "neutral": "Normal chest X-ray with no significant findings",
    "pleural_effusion": "Chest X-ray of a subject with Pleural Effusion",
    "support_devices": "Chest X-ray of a subject with Support Devices",
    "cardiomegaly": "Chest X-ray of a subject with Cardiomegaly",
}
IMAGES, FIRST_SEED = 2000, 4_000_000  # seeds that neither the shipped model nor its classifiers have seen
# Higher rate and smaller batches than the paper's: the model is small, and minutes on a CPU must do
RECIPE = (
    "--steps",
    "200",
    "--batch",
    "8",
    "--accumulate",
    "1",
    "--lr",
    "4e-4",
    "--warmup",
    "10",
    "--ema-decay",
    "0.98",
)
DROPOUT = ("--caption-dropout", "0.1")  # guidance also needs to know these images without a caption


def finetune(data: Path, out: Path) -> Path:
    """Returns the model."""
    arguments = ["finetune", "--data", str(data), "--out", str(out), *RECIPE, *DROPOUT, "--bf16", "--sample-every", "0"]
    assert cli.main([*arguments, "--validate", "32", "--save-every", "40", "--keep", "1"]) == 0
    return out / "last.safetensors"


@torch.no_grad()
def sampled(sd: StableDiffusion, prompt: str, seeds: range, steps: int = 20, guidance: float = 3.0) -> Tensor:
    """(B, 3, 128, 128) in [-1, 1]."""
    context, empty = sd.encode_prompts([prompt, ""])[:, None]
    eps_fn = ldm.guidance.guided(sd.unet, ldm.conditioning.constant(context, steps), guidance, empty, max_batch=16)
    noise = ldm.samplers.initial_noise(list(seeds), sd.latent_shape)
    *_, last = ldm.samplers.ddim(eps_fn, noise, sd.schedule, steps)
    return torch.cat([sd.decode_latents(part) for part in last.x_t.split(8)]).float().clamp(-1, 1)


def features(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(N, 32 * 32) of (N, 128, 128) grey images: means of 4 x 4 pixels, each image at mean 0 and deviation 1."""
    small = images.reshape(len(images), 32, 4, 32, 4).mean(axis=(2, 4)).reshape(len(images), -1)
    return (small - small.mean(axis=1, keepdims=True)) / small.std(axis=1, keepdims=True)


def heart_probe(data: Path) -> LogisticRegression:
    """Tells a large heart, having learnt it from the rendered images of a folder."""
    images = folders.read(data)
    pixels = np.stack([np.array(Image.open(file).convert("L")) for file in images.files])
    return LogisticRegression(C=0.01, max_iter=1000).fit(features(pixels), images.observations["Cardiomegaly"] == 1)


def held_out_accuracy(probe: LogisticRegression, seeds: range) -> float:
    """On phantoms of other seeds, with effusion and devices as they come: each with and without a large heart."""
    states = [(seed, {**sample_attributes("chest", seed), "cardiomegaly": large}) for seed in seeds for large in (0, 1)]
    pixels = np.stack([render("chest", seed, state).to_uint8()[..., 0] for seed, state in states])
    return float((probe.predict(features(pixels)) == [bool(state["cardiomegaly"]) for _, state in states]).mean())


def shown(images: Tensor, probe: LogisticRegression) -> dict[str, float]:
    """attribute -> share of the images that show it."""
    judge = classifier.load(classifier.PHANTOM_CLASSIFIERS["chest"])
    known = (judge.probabilities(images) > 0.5).float().mean(dim=0)
    grey = ((images.mean(dim=1) + 1) * 127.5).round().to(torch.uint8).numpy()
    large = float(probe.predict(features(grey)).mean())
    return {**dict(zip(judge.attributes, known.tolist(), strict=True)), "cardiomegaly": large}


@pytest.mark.slow
def test_a_new_attribute_appears_on_demand_and_the_others_stay(tmp_path):
    data = write_chexpert(tmp_path / "data", IMAGES, FIRST_SEED, extras=("cardiomegaly",))
    probe = heart_probe(data)
    assert held_out_accuracy(probe, range(5_000_000, 5_000_040)) > 0.95
    before = ldm.load(PHANTOM_WEIGHTS, dtype=torch.bfloat16)
    after = ldm.load(finetune(data, tmp_path / "out"), dtype=torch.bfloat16)

    seeds = range(32)
    assert shown(sampled(before, PROMPTS["cardiomegaly"], seeds), probe)["cardiomegaly"] < 0.5
    now = {name: shown(sampled(after, prompt, seeds), probe) for name, prompt in PROMPTS.items()}
    for name in ("cardiomegaly", "pleural_effusion", "support_devices"):
        assert now[name][name] >= 0.9, now
        assert now["neutral"][name] <= 0.1, now
