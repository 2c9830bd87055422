"""The paper's tables from the results of an evaluation, in its own layout, with intervals.

The paper: "Language-Guided Trajectory Traversal in Disentangled Stable Diffusion Latent Space for Factorized Medical
Image Generation" (TehraniNasab, Kumar, Arbel, 2025). Each function takes the content of metrics.json; what is missing
there is "-" here.
"""

import logging
from pathlib import Path

import numpy as np

from ldm.report.results import (
    BASELINES,
    FLIPPED,
    MAIN_READING,
    ON_CURVE,
    READINGS,
    Estimate,
    Results,
    attributes,
    estimate,
    find,
    number,
    plain,
    series,
)
from ldm.report.table_formats import Cell, Table, csv, latex, markdown

__all__ = [
    "Estimate",
    "Table",
    "csv",
    "latex",
    "markdown",
    "table_1",
    "table_2",
    "table_3",
    "table_methods",
    "table_readings",
    "table_truth",
    "table_truth_steps",
    "write_tables",
]

log = logging.getLogger(__name__)

KINDS = ("swaps", "interpolations")

# As printed in the paper's Table 2, CheXpert and ISIC 2019: title of the cell -> attribute -> (swaps, interpolations).
PAPER_TABLE_2: dict[str, dict[str, tuple[str, str | None]]] = {
    "Chest X-ray": {"pleural_effusion": ("0.78", "0.73"), "support_devices": ("0.89", "0.86")},
    "Melanoma": {
        **{"hair": ("0.907", None), "gel_bubble": ("0.985", None)},
        **{"ruler": ("0.721", None), "ink": ("0.59", None)},
    },
    "Melanocytic nevus": {
        **{"hair": ("0.855", None), "gel_bubble": ("0.973", None)},
        **{"ruler": ("0.956", None), "ink": ("0.71", None)},
    },
}
NOT_COMPARABLE = (
    "The paper's columns are its printed values, on CheXpert and ISIC 2019 with SD1.5; ours are of the model evaluated "
    "here, and the shipped one knows drawn phantoms only. The two are not comparable as scores."
)


def table_1(results: Results) -> Table:
    """The attribute classifiers on held-out images (paper, Table 1)."""
    rows: list[tuple[Cell, ...]] = []
    for data, classifier in (find(results, "classifiers") or {}).items():
        for name, scores in (find(classifier, "attributes") or {}).items():
            counts = [number(find(scores, key)) for key in ("n", "positives")]
            judged = [estimate(find(scores, key)) for key in ("accuracy", "f1", "auroc")]
            rows.append((plain(data), plain(name), *counts, *judged, number(find(scores, "ece"))))
    columns = ("Data set", "Attribute", "Images", "Positives", "Accuracy", "F1", "AUROC", "ECE")
    models = {
        plain(data): find(classifier, "model") for data, classifier in (find(results, "classifiers") or {}).items()
    }
    named = [f"{data}: {model}" for data, model in models.items() if model]
    note = "Held-out images; 95 % intervals; ECE: expected calibration error."
    return Table("Attribute classifiers", columns, tuple(rows), " ".join([note, *_sentence("Networks", named)]))


def table_2(results: Results) -> Table:
    """CFRT of swaps and interpolated samples, with LPIPS and SSIM to the neutral image (paper, Table 2)."""
    rows = []
    for a in attributes(results):
        cfrt = [estimate(find(a.scores, kind, "cfrt", MAIN_READING)) for kind in KINDS]
        distances = [estimate(find(a.scores, metric, kind)) for metric in ("lpips", "ssim") for kind in KINDS]
        printed = PAPER_TABLE_2.get(a.cell_title, {}).get(a.key.lower().replace(" ", "_"), (None, None))
        rows.append((a.data_set, a.diagnosis, a.title, *cfrt, *distances, *printed))
    measures = [f"{metric}\n{kind}" for metric in ("CFRT", "LPIPS", "SSIM") for kind in ("swaps", "interp.")]
    paper = [f"paper,\n{kind}\n(CheXpert\n/ ISIC)" for kind in ("swaps", "interp.")]
    note = (
        f"CFRT as own_head_signed, mean of {_samples(results)}; LPIPS and SSIM to the neutral image; 95 % intervals; "
        "interp.: samples interpolated along the Bezier curve."
    )
    sentences = [note, NOT_COMPARABLE, *_unavailable(results)]
    columns = ("Data set", "Class", "Attribute", *measures, *paper)
    return Table("Classification flip rate along a trajectory (CFRT)", columns, tuple(rows), " ".join(sentences))


def table_3(results: Results) -> Table:
    """Images and positives per label in each part of the data sets (paper, Table 3)."""
    parts = ("train", "validation", "test")
    rows: list[tuple[Cell, ...]] = []
    for data, split in (find(results, "datasets") or {}).items():
        labels = dict.fromkeys(label for part in parts for label in (find(split, part) or {}))
        for label in sorted(labels, key=lambda label: label != "images"):
            rows.append((plain(data), plain(label), *(number(find(split, part, label)) for part in parts)))
    note = "Images, then those that are positive for each label."
    return Table("Data sets", ("Data set", "Label", "Train", "Validation", "Test"), tuple(rows), note)


def table_readings(results: Results) -> Table:
    """All four readings of CFRT (paper, eq. 3) with what they were counted over."""
    rows: list[tuple[Cell, ...]] = []
    for a in attributes(results):
        for kind in KINDS:
            for reading in READINGS:
                score = find(a.scores, kind, "cfrt", reading)
                counts = [number(find(score, key)) for key in ("n", "ties", "dropped", "chance")]
                rows.append((a.images, a.title, kind, reading, estimate(score), *counts))
    note = (
        "own_head_signed: the mean change of the edited attribute's own probability is strictly the largest; "
        "own_head_abs: the same in absolute values; single_f: the attribute's classifier changes more on its own edit "
        "than on any other; strict: own_head_abs, the class kept, and no other attribute crossing 1/2. Ties fail. "
        "Dropped: seeds with a NaN. Wilson 95 % intervals."
    )
    columns = ("Images", "Attribute", "Samples", "Reading", "CFRT", "n", "Ties", "Dropped", "Chance")
    return Table("The four readings of CFRT", columns, tuple(rows), note)


def table_methods(results: Results) -> Table:
    """The baselines beside the swaps and the Bezier curve, with their differences in CFRT.

    A baseline's difference to ours is read from its "difference" -> reading, {"value", "interval"}, baseline minus
    ours; without one it is the difference of the two values, and has no interval.
    """
    rows: list[tuple[Cell, ...]] = []
    for a in attributes(results):
        for kind, label in (("swaps", "prompt swaps"), ("interpolations", "Bezier curve")):
            rows.append((a.images, a.title, label, *_method(find(a.scores, kind), None)))
        for name, label in BASELINES.items():
            ours = find(a.scores, "interpolations" if name in ON_CURVE else "swaps")
            rows.append((a.images, a.title, label, *_method(find(a.scores, "baselines", name), ours)))
    note = (
        "CFRT as own_head_signed. Minus ours: the straight chord against the Bezier curve, the others against the "
        "prompt swaps; below zero the baseline is worse. Target: mean change of the target's probability; off-target: "
        "the largest mean change of another attribute's. 95 % intervals."
    )
    columns = ("Images", "Attribute", "Method", "CFRT", "Minus ours", "Strict", "Flip rate", "Target", "Off-target")
    return Table("Baselines", columns, tuple(rows), note)


def table_truth(results: Results) -> Table:
    """Swaps of inverted rendered images against their rendered counterfactuals, one row an attribute."""
    rows = []
    for a in attributes(results):
        truth = find(a.scores, "truth")
        flipped = _steps_flipped(truth)
        ceiling = find(truth, "share_of_ceiling", MAIN_READING) or find(truth, "share_of_ceiling")
        row: list[Cell] = [a.images, a.title, number(find(truth, "n")), ", ".join(f"{s}" for s in flipped) or None]
        row += [min(_when_flipped(truth, "skill"), default=None), max(_when_flipped(truth, "leakage"), default=None)]
        row += [min(_when_flipped(truth, "retrieval"), default=None)]
        row += [number(find(truth, "floor", name)) for name in ("skill", "leakage", "psnr")]
        row += [estimate(find(truth, "strength_correlation")), estimate(ceiling)]
        rows.append(tuple(row))
    note = (
        f"Skill, leakage and identity retrieval@1: the worst over the swap steps that flip at least {FLIPPED:.0%}, "
        "which the column before them names. Floor: what a perfect edit would score, the true counterfactual encoded "
        "and decoded. Inversion: the original, inverted and sampled again. Strength: Spearman correlation of target "
        "probability with the edit's strength. Ceiling: CFRT (own_head_signed) over the one on true pairs."
    )
    columns = (
        *("Images", "Attribute", "n", "Swap steps\nflipped", "Skill", "Leakage", "Retrieval"),
        *("Floor:\nskill", "Floor:\nleakage", "Inversion:\nPSNR (dB)", "Strength", "Share of\nceiling"),
    )
    return Table("Swaps against the true counterfactual", columns, tuple(rows), note)


def table_truth_steps(results: Results) -> Table:
    """The same for every swap step."""
    measures = ("skill", "leakage", "retrieval", "flip_rate", "oracle")
    rows: list[tuple[Cell, ...]] = []
    for a in attributes(results):
        steps = find(a.scores, "truth", "per_swap_step", "swap_steps") or []
        curves = [series(find(a.scores, "truth", "per_swap_step", name), len(steps)) for name in measures]
        for i in sorted(range(len(steps)), key=lambda i: -steps[i]):
            rows.append((a.images, a.title, int(steps[i]), *(number(float(curve[i])) for curve in curves)))
    note = "Skill: 1 is the true counterfactual, 0 no edit. Leakage: share of the squared change outside the mask."
    columns = ("Images", "Attribute", "Swap step", "Skill", "Leakage", "Retrieval", "Flip rate", "Oracle")
    return Table("Swaps against the true counterfactual, per swap step", columns, tuple(rows), note)


def write_tables(results: Results, out: Path) -> list[Path]:
    """Every table that has rows as OUT/tables/<name>.md, .csv and .tex.

    Returns: the files written, in the order of the tables.
    """
    tables = {
        **{"table_1": table_1(results), "table_2": table_2(results), "table_3": table_3(results)},
        **{"table_readings": table_readings(results), "table_methods": table_methods(results)},
        **{"table_truth": table_truth(results), "table_truth_steps": table_truth_steps(results)},
    }
    written = []
    for name, table in tables.items():
        if not table.rows:
            log.info("%s: nothing was measured for it; not written", name)
            continue
        for ending, text in (("md", markdown(table)), ("csv", csv(table)), ("tex", latex(table))):
            path = out / "tables" / f"{name}.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(path.name + ".partial")
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
            written.append(path)
    return written


# ---- parts of rows and notes -----------------------------------------------------------------------


def _method(report: object, ours: object) -> list[Cell]:
    """CFRT, its difference to ours, strict, flip rate, change of the target and the largest one off it."""
    cfrt = estimate(find(report, "cfrt", MAIN_READING))
    given = estimate(find(report, "difference", MAIN_READING))
    reference = estimate(find(ours, "cfrt", MAIN_READING))
    if given is None and cfrt and reference:
        given = Estimate(cfrt.value - reference.value)
    values = [estimate(find(report, *path)) for path in (("cfrt", "strict"), ("flip_rate",), ("target_change",))]
    off_target = number(find(report, "largest_off_target", "value"))
    return [cfrt, given, *(value.value if value else None for value in values), off_target]


def _steps_flipped(truth: object) -> list[int]:
    steps = find(truth, "per_swap_step", "swap_steps") or []
    flip_rate = series(find(truth, "per_swap_step", "flip_rate"), len(steps))
    return sorted(int(s) for s, rate in zip(steps, flip_rate, strict=True) if rate >= FLIPPED)


def _when_flipped(truth: object, name: str) -> list[float]:
    """A measure at the swap steps that flip; what was not measured is left out."""
    steps = find(truth, "per_swap_step", "swap_steps") or []
    values = series(find(truth, "per_swap_step", name), len(steps))
    flipped = _steps_flipped(truth)
    return [float(value) for s, value in zip(steps, values, strict=True) if s in flipped and np.isfinite(value)]


def _sentence(head: str, parts: list[str]) -> list[str]:
    return [f"{head}: {'; '.join(parts)}."] if parts else []


def _samples(results: Results) -> str:
    """Which swap steps and frames a seed's mean is taken over."""
    averaged = find(results, "sampling", "averaged") or []
    frames = find(results, "sampling", "interpolation_frames") or []
    swaps = f"swap steps {', '.join(str(s) for s in averaged)}" if averaged else "the swap steps"
    return swaps + (f" and of frames {frames[0]}-{frames[-1]} of the curve" if frames else "")


def _unavailable(results: Results) -> list[str]:
    """Why a distance is missing, each reason once."""
    reasons = dict.fromkeys(
        f"{metric.upper()}: {reason}"
        for a in attributes(results)
        for metric in ("lpips", "ssim")
        if (reason := find(a.scores, metric, "unavailable"))
    )
    return [reason.rstrip(".") + "." for reason in reasons]
