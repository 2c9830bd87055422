"""The model in weights/: the file is the one that the manifest names, and it does what its card says."""

import json
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch

import ldm
from ldm import checkpoint
from ldm.config import PHANTOM
from ldm.phantom import render, sample_attributes
from ldm.phantom.prompts import DOMAINS
from ldm.pipeline import PHANTOM_WEIGHTS, StableDiffusion, to_uint8
from ldm.samplers import initial_noise
from ldm.study import classifier, shipped
from ldm.traversal.prompt_tree import swaps, traverse_tree


@pytest.fixture(scope="module")
def sd() -> StableDiffusion:
    return ldm.load(PHANTOM_WEIGHTS)


def test_the_manifest_names_every_shipped_file() -> None:
    folder = PHANTOM_WEIGHTS.parent
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, row in manifest.items():
        assert checkpoint.sha256(folder / name) == row["sha256"], name
        assert row["source"]
        assert row["licence"]
    assert PHANTOM_WEIGHTS.name in manifest


def test_all_weights_together_stay_small() -> None:
    """What a clone and a wheel carry, whatever `ldm fetch-weights` has put beside it."""
    folder = PHANTOM_WEIGHTS.parent
    shipped_files = [folder / name for name in json.loads((folder / "manifest.json").read_text())]
    others = [path for path in folder.rglob("*") if path.suffix in (".md", ".png", ".jpg", ".json")]
    assert sum(path.stat().st_size for path in {*shipped_files, *others}) <= 60e6


def test_the_model_of_real_skin_draws_what_its_classifier_can_judge() -> None:
    real = ldm.load(shipped.REAL.weights)
    vae = replace(PHANTOM.vae, latent_channels=16)
    assert real.config == replace(PHANTOM, vae=vae, unet=replace(PHANTOM.unet, latent_channels=16))
    assert real.report.ok
    for name, cell in shipped.REAL.cells.items():
        judge = classifier.load(shipped.REAL.classifiers[name])
        assert set(cell.styles) < set(judge.attributes)
        images = real.decode_latents(initial_noise([0], real.latent_shape))
        assert judge.probabilities(images).shape == (1, len(judge.attributes))


def test_it_is_the_phantom_configuration(sd: StableDiffusion) -> None:
    assert sd.config == PHANTOM
    assert sd.report.ok


def test_the_autoencoder_returns_unseen_phantoms(sd: StableDiffusion) -> None:
    images = [render(domain, seed, sample_attributes(domain, seed)).to_uint8() for seed in (0, 1) for domain in DOMAINS]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1
    back = sd.decode_latents(sd.encode_image(pixels))
    # The noise of the phantoms alone, which no autoencoder of 48 times fewer numbers can return, makes about 0.02.
    assert float((back - pixels).abs().mean()) < 0.05


@pytest.mark.parametrize("domain", sorted(DOMAINS))
def test_earlier_swaps_edit_more(sd: StableDiffusion, domain: str) -> None:
    """Every style of two seeds: the change of the image grows from s = 18, 14 ... to s = 2, of 20 steps.

    Without guidance: at the demo's, hair is complete at the middle, and what changes after that is which hairs.
    """
    steps, swap_steps = 20, (2, 6, 10, 14, 18)  # of 50 steps 5, 15, 25, 35 and 45: the images change by as much
    neutral, styles = DOMAINS[domain].neutral, DOMAINS[domain].styles
    base, *contexts = sd.encode_prompts([neutral, *styles.values()])[:, None]
    tree = swaps(base, dict(zip(styles, contexts, strict=True)), swap_steps, steps)
    sample = partial(sd.sample, guidance_scale=1)
    result = traverse_tree(sample, initial_noise([0, 1], sd.latent_shape), tree, [0, 1], steps)
    images = {name: to_uint8(sd.decode_latents(latents)).astype(float) for name, latents in result.latents.items()}
    for style in styles:
        changes = [np.abs(images[f"{style}/s{s:02d}"] - images["neutral"]).mean() for s in swap_steps[::-1]]
        assert all(less < more for less, more in pairwise(changes)), (style, changes)
