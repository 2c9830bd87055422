"""Example 5: a word that the shipped model has never seen, Cardiomegaly, taught in minutes; what it draws then.

ldm phantom --domain chest --n 2000 --seed 4000000 --extra cardiomegaly --out data/cardiomegaly
ldm finetune --data data/cardiomegaly --out runs/cardiomegaly --train-text-encoder --steps 800 --batch 8 \
    --accumulate 1 --lr 4e-4 --warmup 10 --ema-decay 0.98 --caption-dropout 0.1 --bf16
python -m ldm_tools.examples.new_attribute runs/cardiomegaly/last.safetensors sheet.png

The shipped classifier tells effusion and devices; it knows nothing of hearts, so these a probe of rendered ones tells.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch import Tensor

import ldm
from ldm.images import save_image, to_uint8
from ldm.phantom import render, sample_attributes
from ldm.phantom.prompts import CHEST_LABELS, DOMAINS, chest_style
from ldm.pipeline import PHANTOM_WEIGHTS, StableDiffusion
from ldm.study import classifier
from ldm.traversal import figures
from ldm_tools.examples.measure import sample

PROMPTS = {"neutral": DOMAINS["chest"].neutral} | {name: chest_style(name) for name in CHEST_LABELS}
SEEDS, STEPS, COLUMNS = tuple(range(32)), 20, 6


def coarse(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(N, 128, 128, 3) -> (N, 32 * 32): grey means of 4 x 4 pixels, each image at mean 0 and deviation 1."""
    small = images.mean(-1).reshape(len(images), 32, 4, 32, 4).mean((2, 4)).reshape(len(images), -1)
    return (small - small.mean(1, keepdims=True)) / small.std(1, keepdims=True)


def pairs(seeds: range) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Rendered chests, each without and with a large heart, else as they come: `coarse` images, which is which."""
    images = [
        render("chest", seed, {**sample_attributes("chest", seed), "cardiomegaly": large}).to_uint8()
        for seed in seeds
        for large in (False, True)
    ]
    return coarse(np.stack(images)), np.tile([False, True], len(seeds))


def heart_probe(seeds: range = range(6_000_000, 6_000_300)) -> LogisticRegression:
    """Tells a large heart, having learnt it from pairs of these seeds."""
    return LogisticRegression(C=0.01, max_iter=1000).fit(*pairs(seeds))


def shown(images: Tensor, probe: LogisticRegression) -> dict[str, float]:
    """Attribute -> share of the images (B, 3, 128, 128) in [-1, 1] that show it."""
    judge = classifier.load(classifier.PHANTOM_CLASSIFIERS["chest"])
    known = (judge.probabilities(images) > 0.5).float().mean(0)
    large = float(probe.predict(coarse(to_uint8(images))).mean())
    return {**dict(zip(judge.attributes, known.tolist(), strict=True)), "cardiomegaly": large}


def drawn(sd: StableDiffusion, name: str) -> Tensor:
    """What a model draws for one of PROMPTS, an image a seed: (32, 3, 128, 128) in [-1, 1]."""
    latents = sample(sd, sd.unet, (PROMPTS[name],), SEEDS, STEPS)
    return torch.cat([sd.decode_latents(part) for part in latents.split(8)]).clamp(-1, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="the fine-tuned model")
    parser.add_argument("sheet", type=Path, help="where the contact sheet goes, a .png")
    args = parser.parse_args()
    probe, rows = heart_probe(), {}
    for when, path in (("before", PHANTOM_WEIGHTS), ("after", args.checkpoint)):
        sd = ldm.load(path, dtype=torch.bfloat16)
        for name in PROMPTS:
            images = drawn(sd, name)
            rows[f"{when}: {CHEST_LABELS.get(name, name)}"] = list(to_uint8(images[:COLUMNS]))
            shares = ", ".join(f"{CHEST_LABELS[n]} {share:.0%}" for n, share in shown(images, probe).items())
            print(f"{when}, asked for {CHEST_LABELS.get(name, name)}: {shares}")
    columns = [f"seed {seed}" for seed in SEEDS[:COLUMNS]]
    save_image(args.sheet, figures.grid(list(rows.values()), list(rows), columns).convert("L"))


if __name__ == "__main__":
    main()
