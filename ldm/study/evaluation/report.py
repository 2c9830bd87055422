"""The end of an evaluation: metrics.json put together, and everything that is made of it."""

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ldm.study import shipped
from ldm.study.classifier import Classifier
from ldm.study.evaluation import pictures
from ldm.study.evaluation.run import Task, Workplace, read_latents, settings_of
from ldm.study.evaluation.trajectories import FRAMES
from ldm.study.metrics.cfrt import READINGS
from ldm.study.report import explorer
from ldm.study.report.image_figures import LatentMap
from ldm.study.report.plots import write_figures
from ldm.study.report.results import MAIN_READING, estimate, find
from ldm.study.report.tables import write_tables

Json = dict[str, Any]

MAP_SEEDS = 60  # of a cell in the t-SNE map
RENDERED = (
    "A generated patient comes from noise alone; a rendered one is a phantom that was drawn, encoded, inverted and "
    "edited, so its true counterfactual is known."
)


def assemble(
    tasks: Sequence[Task],
    places: Mapping[str, Workplace],
    cells: Mapping[str, Json | None],
    command: str,
    datasets: Mapping[str, Any],
) -> Json:
    """metrics.json: how it was made, the classifiers, and every cell."""
    first = places[tasks[0].cell.name].instruments
    return {
        "command": command,
        "model": {
            **first.fingerprint,
            "device": str(first.sd.device),
            "backend": first.sd.backend,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "models": {name: place.instruments.fingerprint["weights_sha256"] for name, place in places.items()},
        "sampling": _sampling(tasks, places),
        "classifiers": dict(
            _classifier(place.instruments.classifier, place.instruments.classifier_file)
            for place in places.values()
            if place.instruments.classifier and place.instruments.classifier_file
        ),
        "datasets": dict(datasets),
        "cells": dict(cells),
    }


def _sampling(tasks: Sequence[Task], places: Mapping[str, Workplace]) -> Json:
    """How the cells were sampled; where they differ in something, a value a cell."""
    keys = "steps", "negative", "sampler", "spacing", "end", "eta", "swap_steps", "indexing", "latent_size"
    each: dict[str, Json] = {}
    for task in tasks:
        settings = settings_of(places[task.cell.name].instruments, task.plan)
        each[task.cell.name] = {key: settings[key] for key in keys if key in settings} | {
            "guidance": task.plan.guidance,
            "averaged": list(task.averaged),
            "interpolation_frames": [FRAMES[0], FRAMES[-1]],
            "truth_guidance": task.truth_guidance,
        }
    sampling: Json = {}
    for key in dict.fromkeys(key for settings in each.values() for key in settings):
        of_cells = {cell: settings.get(key) for cell, settings in each.items()}
        first = next(iter(of_cells.values()))
        sampling[key] = first if all(value == first for value in of_cells.values()) else of_cells
    return sampling


def _classifier(trained: Classifier, file: Path) -> tuple[str, Json]:
    """A classifier's name and held-out figures, as it was saved with them."""
    rows = trained.report.get("test")
    return file.stem, {
        "file": file.name,
        "model": trained.model,
        "data": trained.report.get("data_set"),
        "phantoms": bool(trained.report.get("phantoms")),
        "images": trained.report.get("images"),
        "attributes": {
            row["attribute"]: {
                **{key: row[key] for key in ("n", "positives", "ece")},
                **{key: {"value": row[key][0], "interval": row[key][1:]} for key in ("accuracy", "f1", "auroc")},
            }
            for row in (rows if isinstance(rows, list) else [])
        },
    }


def write(metrics: Json, tasks: Sequence[Task], places: Mapping[str, Workplace], out: Path, shown_seeds: int) -> None:
    """Tables, figures and the explorer of an evaluation that has been measured."""
    write_tables(metrics, out)
    shown: dict[str, list[pictures.Shown]] = {}
    maps: dict[str, LatentMap] = {}
    domains = []
    for task in tqdm(tasks, desc="pictures", unit="cell", mininterval=1):
        place, name = places[task.cell.name], task.cell.name
        shown[name] = _decoded(place, task, shown_seeds)
        at = _map(place, task, shown[name])
        maps |= {name: at} if at is not None else {}
        domains.append(_domain(place, task, metrics, shown[name], at, shown_seeds))
    write_figures(metrics, pictures.material(shown, {task.cell.name: task.plan for task in tasks}, maps), out)
    page = explorer.Explorer(
        title="Language-guided trajectories",
        command=metrics["command"],
        note=" ".join(_lacking(metrics) if tasks[0].run else _origins(tasks)),
        domains=tuple(domains),
    )
    explorer.write(page, out / "index.html")


def _origins(tasks: Sequence[Task]) -> list[str]:
    """What the page of sampled cells must say: what was drawn, what is known of it, whom to credit."""
    models = [model for model in shipped.MODELS if any(task.cell.name in model.cells for task in tasks)]
    return [*(model.note for model in models), *([RENDERED] if any(task.truth_seeds for task in tasks) else [])]


def _lacking(metrics: Json) -> list[str]:
    """What the page of a folder must say: how it was traversed, whence its curves, and what could not be judged."""
    fast = [f"{cell['title']}: by ldm traverse --fast." for cell in metrics["cells"].values() if cell.get("fast")]
    curves = [f"Curve of {cell['title']}: drawn anew through the swaps." for cell in metrics["cells"].values()]
    unjudged = [
        f"{scores['title']}: {scores['swaps']['unavailable']}."
        for cell in metrics["cells"].values()
        for scores in cell["attributes"].values()
        if "unavailable" in scores["swaps"]
    ]
    return fast + curves + unjudged


def _decoded(place: Workplace, task: Task, count: int) -> list[pictures.Shown]:
    folder = place.trajectories(task)
    decoded = []
    for seed in task.plan.seeds[:count]:
        decoded.append(
            pictures.decode(place.instruments, task.plan, seed, *read_latents(folder, seed), pictures.POINTS)
        )
    return decoded


def _map(place: Workplace, task: Task, shown: Sequence[pictures.Shown]) -> LatentMap | None:
    folder = place.trajectories(task)
    latents = {seed: read_latents(folder, seed) for seed in task.plan.seeds[:MAP_SEEDS]}
    return pictures.latent_map(task.plan, latents, task.averaged, shown)


def _domain(
    place: Workplace,
    task: Task,
    metrics: Json,
    shown: Sequence[pictures.Shown],
    at: LatentMap | None,
    count: int,
) -> explorer.Domain:
    cell, instruments = task.cell, place.instruments
    patients = [pictures.generated_patient(instruments, cell, task.plan, one, task.judges) for one in shown]
    if task.truth_seeds:
        plan, folder = task.truth_plan, place.truth(task)
        for seed in range(min(count, task.truth_seeds)):
            decoded = pictures.decode(instruments, plan, seed, *read_latents(folder, seed), 0)
            patients.append(pictures.rendered_patient(instruments, cell, plan, decoded, task.judges))
    return pictures.domain(instruments, cell, task.plan, patients, at, _summary(metrics["cells"][cell.name]))


def _summary(cell: Json) -> list[tuple[str, dict[str, str]]]:
    """The title of each attribute and its main figures, as text."""
    rows = []
    for scores in cell["attributes"].values():
        figures = {
            "CFRT": ("swaps", "cfrt", "own_head_signed"),
            "strict": ("swaps", "cfrt", "strict"),
            "interpolated": ("interpolations", "cfrt", "own_head_signed"),
            "flip rate": ("swaps", "flip_rate"),
            "SSIM": ("ssim", "swaps"),
            "LPIPS": ("lpips", "swaps"),
        }
        rows.append((scores["title"], {name: _short(find(scores, *path)) for name, path in figures.items()}))
    return rows


def _short(node: object) -> str:
    figure = estimate(node)
    if figure is None:
        return "-"
    interval = "" if figure.low is None or figure.high is None else f" [{figure.low:.2f}, {figure.high:.2f}]"
    return f"{figure.value:.2f}{interval}"


def headline(metrics: Json) -> str:
    """The table that the terminal shows."""
    head = ("cell", "attribute", "n", "CFRT [95 %]", "strict", "interpolated", "flip rate", "SSIM", "LPIPS")
    rows = [head]
    for cell in metrics["cells"].values():
        for scores, (title, short) in zip(cell["attributes"].values(), _summary(cell), strict=True):
            values = [short[name] for name in ("CFRT", "strict", "interpolated", "flip rate", "SSIM", "LPIPS")]
            n = str(find(scores, "swaps", "cfrt", "own_head_signed", "n") or cell["n"])
            rows.append((cell["title"], title, n, values[0], *(value.split(" ")[0] for value in values[1:])))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in rows)


def of_table(scores: Json) -> str:
    """The report of one table of predictions, as the terminal shows it."""
    lines = [f"CFRT of {scores['attribute']}, mean of swap steps {', '.join(map(str, scores['swap_steps']))}"]
    for reading in READINGS:
        verdict = scores["cfrt"][reading]
        counts = ", ".join(f"{name} {verdict[name]}" for name in ("n", "ties", "dropped"))
        chance = f", chance {verdict['chance']:.2f}" if verdict["chance"] is not None else ""
        lines.append(f"  {reading:16} {_short(verdict):22} {counts}{chance}")
    present = scores["flip_rate"]["already_present"]
    lines.append(f"  {'flip rate':16} {_short(scores['flip_rate']):22} already present before {present}")
    lines.append(f"  {'target change':16} {_short(scores['target_change'])}")
    off = scores["largest_off_target"]
    lines.append(f"  {'off target':16} {off['attribute'] or '-'} {_short(off)}")
    curves = scores["per_swap_step"]
    lines.append("  " + f"{'swap step':16} " + " ".join(f"{step:5}" for step in curves["swap_steps"]))
    for name in (MAIN_READING, "strict", "flip_rate", "target_change", "off_target"):
        values = " ".join("    -" if value is None else f"{value:5.2f}" for value in curves[name])
        lines.append(f"  {name if name in READINGS else name.replace('_', ' '):16} {values}")
    return "\n".join(lines)
