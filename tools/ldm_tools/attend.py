"""`ldm attend`: where each word of a prompt looks, per layer and step, and whether it is the right place.

ldm attend --out out/attend                        rendered phantoms, whose masks are known; both domains
ldm attend --domains skin --seeds 0-15 --steps 50
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ldm import pipeline
from ldm.files import write_json
from ldm.images import to_uint8
from ldm.phantom.prompts import ATTRIBUTE_WORDS, DOMAINS, Cell
from ldm.probe.parts import short
from ldm.probe.words import END, PADDING, START, Word, own_words, words
from ldm.study.report.plot_style import save_figure
from ldm.study.structure import attention, attention_figures
from ldm.study.structure.attention import ITERATIONS, Looks, MaskedImages
from ldm.study.structure.attention_figures import Shown
from ldm.study.structure.domains import chosen_domains
from ldm.traversal.plan import parse_integers
from ldm_tools.options import add_adapters, add_model, load_model

SHOWN_STEPS = 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command to `parser`."""
    parser.description = (
        "Render phantoms with each attribute, invert them under the prompt that names it, draw them again, and record "
        "the cross-attention's probabilities: where each word, the start and the end token look, in each layer and at "
        "each step, and how the map of the attribute's own words overlaps the true mask. Writes attention.json and the "
        "figures words, depth_and_time, overlap and layers (PNG, PDF). About a minute on two free CPU cores."
    )
    parser.add_argument("--out", type=Path, default=Path("out/attend"), help="folder to write (default %(default)s)")
    parser.add_argument("--domains", default=",".join(DOMAINS), help="default: %(default)s")
    parser.add_argument("--seeds", default="0-3", help="which patients, such as 0-15 (default %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="DDIM steps (default %(default)s)")
    add_model(parser)
    add_adapters(parser)


def run(args: argparse.Namespace) -> None:
    """Raises ValueError for options that do not fit."""
    cells, seeds = chosen_domains(args.domains), parse_integers(args.seeds, "--seeds")
    sd = load_model(args)
    asked = [(cell, attribute) for cell in cells.values() for attribute in cell.styles]
    attributes, shown = {}, []
    total = len(asked) * len(seeds) * args.steps * (ITERATIONS + 1)
    with tqdm(total=total, desc="U-Net rows", unit="row", mininterval=1) as bar:
        for cell, attribute in asked:
            attributes[attribute], first = ask(sd, cell, attribute, seeds, args.steps, bar)
            shown.append(first)

    save_figure(attention_figures.figure_words(shown), args.out / "words")
    save_figure(attention_figures.figure_depth_and_time(shown), args.out / "depth_and_time")
    save_figure(attention_figures.figure_overlap(attributes), args.out / "overlap")
    save_figure(attention_figures.figure_layers(attributes), args.out / "layers")
    write_json(
        args.out / "attention.json",
        {
            "weights_sha256": sd.weights_sha256(),
            "dtype": str(sd.dtype).removeprefix("torch."),
            "seeds": seeds,
            "steps": args.steps,
            "guidance": 1.0,
            "attributes": attributes,
        },
    )
    print(f"look at {args.out / 'words.png'}, depth_and_time.png, overlap.png and layers.png")


def ask(
    sd: pipeline.StableDiffusion, cell: Cell, attribute: str, seeds: tuple[int, ...], steps: int, bar: tqdm
) -> tuple[dict[str, Any], Shown]:
    """One attribute: its part of attention.json, and its first seed for the figures."""
    prompt, size = cell.styles[attribute], sd.config.unet.sample_size * sd.config.vae.downscale
    said = words(sd.tokenizer, prompt)
    own = own_words(said, ATTRIBUTE_WORDS[attribute])
    patients = MaskedImages.render(cell, attribute, seeds, size)
    context = sd.encode_prompts([prompt])
    x_T = attention.invert(sd, patients.images, context, steps, bar.update)
    looks, latents = attention.look(sd, x_T, context, said, steps, bar.update)
    drawn = sd.decode_latents(latents).clamp(-1, 1).cpu()
    return {
        "title": cell.title_of(attribute),
        "prompt": prompt,
        "words": [word.text for word in said],
        "attribute_words": [said[i].text for i in own],
        "share": shares(looks),
        "overlap": overlaps(looks, said, own, patients),
        "overlap_of_every_word": every_word(looks, said, patients),
        **attention.limits(patients.masks, max(layer.shape[-1] for layer in looks.maps)),
        "redrawn_psnr_db": float(10 * np.log10(4 / float((drawn - patients.images).square().mean()))),
    }, material(cell.title_of(attribute), looks, said, own, patients)


def shares(looks: Looks) -> dict[str, list[float]]:
    """How much of all attention each word gets, by layer; mean over images, steps, positions and heads."""
    return {
        short(layer): looked.mean(dim=(0, 1, 3, 4)).tolist()
        for layer, looked in zip(looks.layers, looks.maps, strict=True)
    }


def overlaps(
    looks: Looks, said: list[Word], own: list[int], patients: MaskedImages
) -> dict[str, dict[str, list[float]]]:
    """Mean IoU over images at each step, of the attribute's words and of what stands around the prompt, by layer."""
    texts = [word.text for word in said]
    groups = {"own": own} | {name: [texts.index(name)] for name in (START, END, PADDING)}
    by_layer = {short(layer): looked for layer, looked in zip(looks.layers, looks.maps, strict=True)}
    by_layer["all layers"] = looks.mean_over_layers()
    return {
        group: {
            label: np.nanmean(attention.overlap(looked[:, :, chosen].sum(dim=2), patients.masks), axis=1).tolist()
            for label, looked in by_layer.items()
        }
        for group, chosen in groups.items()
    }


def every_word(looks: Looks, said: list[Word], patients: MaskedImages) -> dict[str, float]:
    """IoU of each word's map, mean over layers and steps: is it the attribute's own that finds the place?"""
    mean = looks.mean_over_layers().mean(dim=0).transpose(0, 1)  # (V, B, G, G)
    scores = np.nanmean(attention.overlap(mean, patients.masks), axis=1)
    return {f"{i}: {word.text}": float(score) for i, (word, score) in enumerate(zip(said, scores, strict=True))}


def material(title: str, looks: Looks, said: list[Word], own: list[int], patients: MaskedImages) -> Shown:
    """The first seed's maps as the figures want them."""
    mean = looks.mean_over_layers()[:, 0]  # (S, V, G, G)
    of_own = mean[:, own].sum(dim=1)
    steps = sorted({round(i * (len(mean) - 1) / (SHOWN_STEPS - 1)) for i in range(SHOWN_STEPS)})
    of_layers = [layer[:, 0, own].sum(dim=1).mean(dim=0) for layer in looks.maps]
    return Shown(
        title=title,
        image=to_uint8(patients.images[:1])[0],
        mask=patients.masks[0],
        words=[
            (word.text, float(looked.mean()), plain(looked))
            for word, looked in zip(said, mean.mean(dim=0), strict=True)
        ],
        layers=[(short(layer), plain(looked)) for layer, looked in zip(looks.layers, of_layers, strict=True)],
        steps=[(str(step), plain(of_own[step])) for step in steps],
    )


def plain(looked: Tensor) -> NDArray[np.float64]:
    """A map as numpy has it."""
    return looked.double().cpu().numpy()
