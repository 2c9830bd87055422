"""The figures and the line numbers of the guided walk, `ldm/README.md`.

python -m ldm_tools.walk figures        # draws ldm/figures/*.png with the shipped model
python -m ldm_tools.walk links          # makes the walk's links point at the lines again
"""

import ast
import re
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

import ldm
from ldm.config import SD15
from ldm.files import complete
from ldm.images import to_uint8
from ldm.phantom.prompts import CELLS, GUIDANCE
from ldm.pipeline import PHANTOM_WEIGHTS, StableDiffusion
from ldm.probe.trace import trace_model
from ldm.samplers import initial_noise
from ldm.schedule import Schedule, leading
from ldm.study.report.plot_style import COLOURS, GREY, PAGE_WIDTH, new_figure, styled
from ldm.traversal.prompt_tree import swaps, traverse_tree

WALK = Path(ldm.__file__).with_name("README.md")
LINK = re.compile(r"\[`(?P<name>[\w.]+)`\]\((?P<file>[\w./]+\.py)#L(?P<line>\d+)\)")

SEED, STEPS = 0, 50
DPI = 120
PROMPTS = (CELLS["chest"].neutral, CELLS["chest"].styles["pleural_effusion"])


# ---- links -----------------------------------------------------------------------------------------


def line_of(file: Path, name: str) -> int:
    """Where a function, class or method is defined.

    Args:    name: "attention", or "UNet.forward".
    Raises:  ValueError: there is no such definition in the file.
    """
    node: ast.AST = ast.parse(file.read_text(encoding="utf-8"))
    for part in name.split("."):
        inner = (child for child in ast.iter_child_nodes(node) if getattr(child, "name", None) == part)
        node = next(inner, ast.Pass())
    if not isinstance(node, ast.FunctionDef | ast.ClassDef):
        raise ValueError(f"{file}: defines no {name}")
    return node.lineno


def with_links(text: str, folder: Path) -> str:
    """The walk's text with every link's line number as it is now."""

    def renewed(link: re.Match[str]) -> str:
        line = line_of(folder / link["file"], link["name"])
        return f"[`{link['name']}`]({link['file']}#L{line})"

    return LINK.sub(renewed, text)


# ---- figures ---------------------------------------------------------------------------------------


@styled
def schedule_figure() -> Figure:
    """abar over time, and the times that 50 steps visit."""
    schedule, visited = Schedule.sd15(), list(leading(STEPS))
    figure = new_figure(0.7 * PAGE_WIDTH, 2.0)
    axes = figure.subplots()
    axes.plot(schedule.alphas_cumprod, color=COLOURS[0])
    axes.plot(visited, schedule.alphas_cumprod[visited], ".", color=COLOURS[1])
    axes.set(xlabel="t, training timestep; sampling goes from right to left", ylabel="abar: share of the image left")
    return figure


@styled
def unet_figure() -> Figure:
    """SD1.5's blocks in running order: operations above, parameters below."""
    blocks = trace_model(SD15)["unet"]
    figure = new_figure(PAGE_WIDTH, 3.6)
    upper, lower = figure.subplots(2, 1, sharex=True)
    kinds = {"attentions": COLOURS[1], "resnets": COLOURS[0]}
    colours = [next((kinds[kind] for kind in kinds if kind in block.name), GREY) for block in blocks]
    upper.bar(range(len(blocks)), [block.flops / 1e9 for block in blocks], color=colours)
    lower.bar(range(len(blocks)), [block.parameters / 1e6 for block in blocks], color=colours)
    upper.set_ylabel("GFLOP at 64 x 64")
    lower.set_ylabel("million parameters")
    upper.set_title("SD1.5's U-Net: resnets blue, transformers orange, the rest grey", loc="left")
    lower.set_xticks(
        range(len(blocks)), [block.name.replace("_blocks", "") for block in blocks], rotation=90, fontsize=5
    )
    return figure


@styled
def steps_figure(sd: StableDiffusion, steps: int = STEPS) -> Figure:
    """x_t, eps and x0_pred along a run, as latents by their first three channels; and x0_pred decoded."""
    empty, context = sd.encode_prompts(["", PROMPTS[1]])[:, None]
    run = list(sd.sample(context, [SEED], steps=steps, guidance_scale=GUIDANCE, negative=empty))
    shown = [run[round(i * (steps - 1) / 5)] for i in range(6)]
    rows = {
        "x_t": [as_colours(step.x_t) for step in shown],
        "eps": [as_colours(step.eps) for step in shown],
        "x0_pred": [as_colours(step.x0_pred) for step in shown],
        "decoded": [to_uint8(sd.decode_latents(step.x0_pred))[0] for step in shown],
    }
    return picture_grid(rows, [f"step {step.index}, t = {step.t}" for step in shown])


@styled
def traversal_figure(sd: StableDiffusion, steps: int = STEPS) -> Figure:
    """One noise under the neutral prompt, swapped at several steps; and the Bezier curve through the swaps."""
    at = [round(share * steps) for share in (0.9, 0.7, 0.5, 0.3, 0.1)]
    empty, neutral, style = sd.encode_prompts(["", *PROMPTS])[:, None]
    sample = partial(sd.sample, guidance_scale=GUIDANCE, negative=empty)
    tree = swaps(neutral, {"effusion": style}, at, steps)
    latents = traverse_tree(sample, initial_noise([SEED], sd.latent_shape), tree, [SEED], steps).latents
    swapped = [latents[f"effusion/s{s:02d}"] for s in at]
    curve = ldm.bezier.evaluate(torch.cat([latents["neutral"], *swapped]), torch.linspace(0, 1, 6))
    rows = {
        "swapped": to_uint8(sd.decode_latents(torch.cat([latents["neutral"], *swapped]))),
        "curve": to_uint8(sd.decode_latents(curve)),
    }
    return picture_grid(rows, ["neutral", *(f"s = {s}" for s in at)])


def as_colours(latents: Tensor) -> NDArray[np.uint8]:
    """(1, 4, h, w) -> (h, w, 3): the first three channels, -2 black and 2 bright."""
    return to_uint8(latents[:, :3] / 2)[0]


def picture_grid(rows: Mapping[str, Sequence[NDArray[np.uint8]] | NDArray[np.uint8]], heads: Sequence[str]) -> Figure:
    """Rows of images with a name each, under heads."""
    columns = len(heads)
    figure = new_figure(PAGE_WIDTH, 0.25 + len(rows) * (PAGE_WIDTH - 0.6) / columns)
    panels = figure.subplots(len(rows), columns, squeeze=False)
    for line, (name, images) in zip(panels, rows.items(), strict=True):
        for panel, image in zip(line, images, strict=True):
            panel.imshow(image, interpolation="nearest")
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
        line[0].set_ylabel(name)
    for panel, head in zip(panels[0], heads, strict=True):
        panel.set_title(head)
    return figure


def write_figures(folder: Path, steps: int = STEPS) -> None:
    """schedule.png, unet.png, steps.png and traversal.png; the same bytes whenever the weights are the same."""
    sd = ldm.load(PHANTOM_WEIGHTS)
    folder.mkdir(exist_ok=True)
    figures = {
        "schedule": schedule_figure(),
        "unet": unet_figure(),
        "steps": steps_figure(sd, steps),
        "traversal": traversal_figure(sd, steps),
    }
    for name, figure in figures.items():
        with complete(folder / f"{name}.png") as unfinished:
            figure.savefig(unfinished, format="png", dpi=DPI, metadata={"Software": None})


def main(arguments: Sequence[str]) -> None:
    if arguments == ["figures"]:
        write_figures(WALK.parent / "figures")
    elif arguments == ["links"]:
        WALK.write_text(with_links(WALK.read_text(encoding="utf-8"), WALK.parent), encoding="utf-8")
    else:
        raise SystemExit("python -m ldm_tools.walk: expected figures, or links")


if __name__ == "__main__":
    main(sys.argv[1:])
