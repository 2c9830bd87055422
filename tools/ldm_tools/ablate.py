"""`ldm ablate`: which part of the U-Net carries which attribute, and when.

ldm ablate --out out/ablate                        every block, skip, attention, head and resnet; both domains
ldm ablate --domains chest --seeds 0-7 --steps 20
"""

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ldm import pipeline
from ldm.files import write_json
from ldm.images import to_uint8
from ldm.phantom.prompts import DOMAINS, GUIDANCE, Cell
from ldm.probe.parts import HEAD, KINDS, Part, cross_attentions, parts, short
from ldm.study import classifier as classifiers
from ldm.study.metrics.stats import or_none
from ldm.study.report.plot_style import save_figure
from ldm.study.structure import ablation, ablation_figures
from ldm.study.structure.ablation import Ablation, Intact, Removed
from ldm.study.structure.domains import Settings, chosen_domains
from ldm.traversal.figures import Pixels
from ldm.traversal.plan import parse_integers
from ldm_tools.options import add_adapters, add_model, load_model

SHOWN_KINDS = ("block", "skip")  # whose images are drawn; all are measured


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command to `parser`."""
    parser.description = (
        "Take every part of the U-Net out in turn, and give the style's prompt to one cross-attention during one "
        "window of steps, and measure on phantoms what becomes of each attribute (by the shipped classifiers), of "
        "everything around it, and of the neutral image. Writes ablation.json and the figures parts, heads, injection "
        "and images (PNG, PDF). Some minutes on two free CPU cores."
    )
    parser.add_argument("--out", type=Path, default=Path("out/ablate"), help="folder to write (default %(default)s)")
    parser.add_argument("--domains", default=",".join(DOMAINS), help="default: %(default)s")
    parser.add_argument("--kinds", default=",".join(KINDS), help="what to take out (default: %(default)s)")
    parser.add_argument("--seeds", default="0,1", help="which patients, such as 0-7 (default %(default)s)")
    parser.add_argument("--steps", type=int, default=6, help="DDIM steps (default %(default)s)")
    parser.add_argument("--windows", type=int, default=3, help="windows of steps to inject in (default %(default)s)")
    parser.add_argument("--guidance", type=float, default=GUIDANCE, help="guidance scale (default %(default)s)")
    add_model(parser)
    add_adapters(parser)


def run(args: argparse.Namespace) -> None:
    """Raises ValueError for options that do not fit."""
    cells = chosen_domains(args.domains)
    settings = Settings(parse_integers(args.seeds, "--seeds"), args.steps, args.guidance)
    ablation.windows(settings.steps, args.windows)  # refused before the weights are read
    sd = load_model(args)
    removable = parts(sd.unet, args.kinds.split(","))
    domains: dict[str, Any] = {}
    images: dict[tuple[str, str], list[Pixels]] = defaultdict(list)
    for name, cell in cells.items():
        domains[name], shown = measure(sd, cell, settings, removable, args.windows)
        for row, pixels in shown.items():
            images[row] += pixels

    titles = [title for entry in domains.values() for title in ("neutral", *entry["attributes"].values())]
    figures = {
        "injection": ablation_figures.figure_injection(domains),
        "images": ablation_figures.figure_images([(*row, pixels) for row, pixels in images.items()], titles),
    }
    if set(args.kinds.split(",")) != {HEAD}:
        figures["parts"] = ablation_figures.figure_parts(domains)
    if HEAD in args.kinds.split(","):
        figures["heads"] = ablation_figures.figure_heads(domains)
    for name, figure in figures.items():
        save_figure(figure, args.out / name)
    write_json(
        args.out / "ablation.json",
        {
            "weights_sha256": sd.weights_sha256(),
            "dtype": str(sd.dtype).removeprefix("torch."),
            "seeds": settings.seeds,
            "steps": settings.steps,
            "guidance": settings.guidance,
            "domains": domains,
        },
    )
    print(f"look at {', '.join(f'{args.out / name}.png' for name in figures)}")


def measure(
    sd: pipeline.StableDiffusion, cell: Cell, settings: Settings, removable: list[Part], count: int
) -> tuple[dict[str, Any], dict[tuple[str, str], list[Pixels]]]:
    """One domain: its part of ablation.json, and the first seed's images by (kind, label) of what was removed."""
    layers, attributes = cross_attentions(sd.unet), list(cell.styles)
    total = ablation.rows_of_ablation(len(removable), len(attributes), settings)
    total += ablation.rows_of_injections(len(layers), count, len(attributes), settings)
    classifier = classifiers.load(classifiers.PHANTOM_CLASSIFIERS[cell.name])
    with tqdm(total=total, desc=f"{cell.name}: U-Net rows", unit="row", mininterval=1) as bar:
        whole = Ablation(sd, cell, classifier, settings, bar.update)
        intact = whole.intact()
        removed = []
        images = {("intact", ""): list(to_uint8(intact.images[:, 0]))}
        for part in removable:
            removed.append(whole.remove(part, intact))
            if part.kind in SHOWN_KINDS:
                images[(f"no {part.kind}", part.label)] = list(to_uint8(removed[-1].images))
        probability = {name: [[0.0] * (count + 1) for _ in range(len(layers) + 1)] for name in attributes}
        for layer, window, p in ablation.injections(whole, count):
            for name, value in zip(attributes, p.mean(dim=1).tolist(), strict=True):
                probability[name][layer][window] = value
    spans = [f"{window.start}\N{EN DASH}{window.stop - 1}" for window in ablation.windows(settings.steps, count)]
    return {
        "attributes": {name: cell.title_of(name) for name in attributes},
        "intact": intact_entry(intact, attributes),
        "parts": [part_entry(one, attributes) for one in removed],
        "injection": {
            "layers": layers,
            "labels": [short(layer) for layer in layers],
            "windows": spans,
            "probability": probability,
        },
    }, images


def intact_entry(intact: Intact, attributes: list[str]) -> dict[str, Any]:
    """The whole network, means over seeds."""
    return {
        "seeds": intact.effect.shape[1],
        "effect": dict(zip(attributes, intact.effect.mean(dim=1).tolist(), strict=True)),
        "identity": or_none(float(intact.identity.nanmean())),
        "region": dict(zip(attributes, intact.regions.float().mean(dim=(1, 2, 3)).tolist(), strict=True)),
    }


def part_entry(removed: Removed, attributes: list[str]) -> dict[str, Any]:
    """One removed part, means over seeds; its identity over attributes as well."""
    return {
        "kind": removed.part.kind,
        "name": removed.part.name,
        "label": removed.part.label,
        "effect": dict(zip(attributes, removed.effect.mean(dim=1).tolist(), strict=True)),
        "identity": or_none(float(removed.identity.nanmean())),
        "neutral": float(removed.neutral.mean()),
    }
