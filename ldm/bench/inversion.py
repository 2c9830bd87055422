"""How exactly images come back from their noise: by method, steps, guidance and precision.

Every case inverts an image and retraces it. What is reported of it:

    round_trip_error   |latent retraced - latent| / |latent|: of inversion alone, whatever the autoencoder loses
    psnr_db            of the decoded image against the original
    noise_std          of the x_T that was found; a sampler's noise has 1, and a network was trained on no other
    rows_up, rows_down U-Net rows an image, guidance's second half counted
    seconds            of one run, up and down
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from skimage.metrics import peak_signal_noise_ratio
from torch import Tensor
from tqdm import tqdm

from ldm.bench.harness import Timing, time_in_turn
from ldm.images import Pixels, from_uint8, to_uint8
from ldm.phantom import render
from ldm.phantom.prompts import DOMAINS
from ldm.pipeline import StableDiffusion
from ldm.samplers import Step, ddim
from ldm.schedule import Schedule
from ldm.study.report.plot_style import COLOURS, GREY, MARKERS, PAGE_WIDTH, add_legend, new_figure, styled
from ldm.traversal.inversion import edict
from ldm.traversal.round_trip import METHODS, Inversion, Method, bind, invert, relative_error, retrace

TARGET = 1e-3  # the round trip's error at guidance 1, 50 steps, float32
FIRST_SEED = 5_000_000  # of rendered images; no model here was trained on these
WORST = 10.0  # errors are drawn up to this one; what is lost may be anything, infinity too


@dataclass(frozen=True)
class Subject:
    """An image (H, W, 3) and the prompt that it is inverted under."""

    name: str
    prompt: str
    pixels: Pixels


@dataclass(frozen=True, kw_only=True)
class Case:
    """One cell of the scorecard. The negative prompt is empty, or the prompt itself."""

    method: Method
    steps: int
    guidance: float  # on the way up
    guidance_down: float
    negative: str = "empty"  # or "prompt"; on the way down
    dtype: str


def phantoms(count: int, size: int) -> list[Subject]:
    """Rendered images without attributes, chests and nevi in turn."""
    subjects = []
    for i in range(count):
        domain = list(DOMAINS)[i % len(DOMAINS)]
        pixels = render(domain, FIRST_SEED + i, {}, size).to_uint8()
        subjects.append(Subject(f"{domain} {FIRST_SEED + i}", DOMAINS[domain].neutral, pixels))
    return subjects


def cases(steps: Sequence[int], guidance: Sequence[float], dtypes: Sequence[str]) -> list[Case]:
    """Every method with every number of steps, guidance (the same both ways) and precision; and, at the most steps,
    what becomes of an image inverted at guidance 1 and sampled at the largest one."""
    grid = [
        Case(method=method, steps=s, guidance=g, guidance_down=g, dtype=dtype)
        for dtype in dtypes
        for g in guidance
        for s in steps
        for method in METHODS
    ]
    strongest = max(guidance, key=abs)
    one_sided = Case(method="fixed-point", steps=max(steps), guidance=1.0, guidance_down=strongest, dtype=dtypes[0])
    return grid if strongest == 1 else [*grid, one_sided, replace(one_sided, negative="prompt")]


@torch.no_grad()
def measure(sd: StableDiffusion, case: Case, subject: Subject) -> dict[str, float]:
    """One case on one image; see this file's head."""
    how = Inversion(prompt=subject.prompt, method=case.method, steps=case.steps, guidance=case.guidance)
    back = replace(how, guidance=case.guidance_down, negative=subject.prompt if case.negative == "prompt" else "")
    x_0 = encode(sd, subject)
    up, down = bind(sd, how), bind(sd, back)
    began = time.perf_counter()
    noise = invert(sd, how, up, x_0)
    retraced = retrace(sd, back, down, noise)
    seconds = time.perf_counter() - began
    return {
        "round_trip_error": relative_error(retraced, x_0),
        "psnr_db": psnr_db(sd, subject, retraced),
        "noise_std": float(noise.x_T.std()),
        "rows_up": up.rows,
        "rows_down": down.rows,
        "seconds": seconds,
    }


def encode(sd: StableDiffusion, subject: Subject) -> Tensor:
    """Its latent (1, C, H, W), float32."""
    return sd.encode_image(from_uint8(subject.pixels)[None]).float()


def psnr_db(sd: StableDiffusion, subject: Subject, latent: Tensor) -> float:
    """Of a decoded latent against the original; NaN where the latent is lost to infinity."""
    if not bool(latent.isfinite().all()):
        return math.nan
    return float(peak_signal_noise_ratio(subject.pixels, to_uint8(sd.decode_latents(latent))[0]))


def scorecard(
    models: Mapping[str, StableDiffusion], subjects: Sequence[Subject], todo: Sequence[Case]
) -> list[dict[str, Any]]:
    """Every case on every image: the worst error, the mean of everything else.

    Args:    models: one for each precision, by the name that the cases use.
    """
    check()
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(todo) * len(subjects), desc="inversion: round trips", unit="image", mininterval=1) as bar:
        for case in todo:
            measured = []
            for subject in subjects:
                measured.append(measure(models[case.dtype], case, subject))
                bar.update()
            means = {name: float(np.mean([row[name] for row in measured])) for name in measured[0]}
            errors = [row["round_trip_error"] for row in measured]
            rows.append(asdict(case) | means | {"round_trip_error": float(np.max(errors))})  # max: NaN if any is
    return rows


def check() -> None:
    """Where eps does not depend on the latent, nothing is approximated: raises ValueError for a method that errs."""
    schedule, (x_0, eps) = Schedule.sd15(), torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def eps_fn(x_t: Tensor, t: float, step: int) -> Tensor:
        return eps

    for method, way_up in METHODS.items():
        *_, top = way_up(eps_fn, x_0, schedule, 20)
        way_down: Callable[..., Iterator[Step]] = edict if method == "edict" else ddim
        *_, back = way_down(eps_fn, top.x_t, schedule, 20, history=top.history)
        if not (error := relative_error(back.x_prev, x_0)) < 1e-5:  # forty roundings of float32
            raise ValueError(f"{method}: comes back with an error of {error:.1e} where it is exact")


def timings(sd: StableDiffusion, subject: Subject, steps: int, rounds: int) -> dict[str, Timing]:
    """The way up of every method at guidance 1, in turn; ratios are to the naive one."""
    x_0 = encode(sd, subject)

    def run(method: Method) -> None:
        how = Inversion(prompt=subject.prompt, method=method, steps=steps)
        invert(sd, how, bind(sd, how), x_0)

    candidates: dict[str, Callable[[], object]] = {method: partial(run, method) for method in METHODS}
    return time_in_turn(candidates, rounds, label="inversion: timing")


def target_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Whether an inversion other than the naive one returns the latent within `TARGET`.

    At guidance 1, the most steps, full precision.
    """
    exact = {
        row["method"]: row["round_trip_error"]
        for row in rows
        if row["method"] != "naive" and row["guidance"] == row["guidance_down"] == 1 and row["dtype"] == "float32"
        and row["steps"] == max(other["steps"] for other in rows)
    }  # fmt: skip
    return {"limit": TARGET, "errors": exact, "reached": any(error <= TARGET for error in exact.values())}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The scorecard as text."""
    head = "precision  guidance               steps  method         error    PSNR dB  noise std  rows up+down  seconds"
    lines = [head, "-" * len(head)]
    for row in rows:
        lines.append(
            f"{row['dtype']:<10} {guidance_label(row):<22} {row['steps']:>5}  {row['method']:<12} "
            f"{row['round_trip_error']:>8.1e}  {row['psnr_db']:>8.2f}  {row['noise_std']:>9.3f}  "
            f"{row['rows_up']:>6.0f} + {row['rows_down']:<4.0f} {row['seconds']:>7.2f}"
        )
    return "\n".join(lines)


def guidance_label(row: Mapping[str, Any]) -> str:
    """ "1", or "1, back at 7.5", or "1, back at 7.5 *" where the prompt is the negative one."""
    if row["guidance"] == row["guidance_down"]:
        return f"{row['guidance']:g}"
    return f"{row['guidance']:g}, back at {row['guidance_down']:g}" + (" *" if row["negative"] == "prompt" else "")


@styled
def figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Error of the round trip against U-Net rows on the way up, a panel for each guidance."""
    both_ways = [row for row in rows if row["guidance"] == row["guidance_down"]]
    scales = sorted({row["guidance"] for row in both_ways})
    dtypes = list(dict.fromkeys(row["dtype"] for row in both_ways))
    drawn = new_figure(PAGE_WIDTH, 2.9)
    panels = drawn.subplots(1, len(scales), sharey=True, squeeze=False)[0]
    for axes, scale in zip(panels, scales, strict=True):
        _panel(axes, [row for row in both_ways if row["guidance"] == scale], dtypes)
        axes.set(title=f"guidance {scale:g}", xlabel="U-Net rows an image, to invert")
    panels[0].set_ylabel("relative error of the latent\nafter the round trip")
    looks = zip(METHODS, COLOURS, MARKERS, strict=False)
    entries = [Line2D([], [], color=colour, marker=marker, label=method) for method, colour, marker in looks]
    entries += [Line2D([], [], color=GREY, linestyle=_style(dtypes, dtype), label=dtype) for dtype in dtypes]
    add_legend(drawn, entries)
    return drawn


def _panel(axes: Axes, rows: Sequence[Mapping[str, Any]], dtypes: Sequence[str]) -> None:
    """One line a method and precision, from few steps to many."""
    for method, colour, marker in zip(METHODS, COLOURS, MARKERS, strict=False):
        for dtype in dtypes:
            line = [row for row in rows if (row["method"], row["dtype"]) == (method, dtype)]
            errors = [np.fmin(row["round_trip_error"], WORST) for row in line]  # NaN: WORST
            axes.plot(
                [row["rows_up"] for row in line], errors, _style(dtypes, dtype), color=colour, marker=marker,
                markerfacecolor=colour if dtype == dtypes[0] else "white",
            )  # fmt: skip
            if dtype == dtypes[0]:
                for row, error in zip(line, errors, strict=True):
                    axes.annotate(
                        f"{row['steps']}", (row["rows_up"], error), (3, 3), textcoords="offset points", fontsize=6
                    )
    axes.axhline(TARGET, color=GREY, linewidth=0.6, linestyle=":")
    axes.set(xscale="log", yscale="log")
    axes.grid(True)


def _style(dtypes: Sequence[str], dtype: str) -> Literal["-", "--"]:
    return "-" if dtype == dtypes[0] else "--"
