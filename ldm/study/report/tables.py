"""The paper's tables from the results of an evaluation, in its own layout, with intervals.

The paper: "Language-Guided Trajectory Traversal in Disentangled Stable Diffusion Latent Space for Factorized Medical
Image Generation" (TehraniNasab, Kumar, Arbel, 2025). Each function takes the content of metrics.json; what is missing
there is None here, and a row of nothing but None is left out.
"""

import logging
from pathlib import Path

import numpy as np

from ldm.files import write_text
from ldm.study.report.results import (
    BASELINES,
    FLIPPED,
    MAIN_READING,
    ON_CURVE,
    READINGS,
    Estimate,
    Results,
    attributes,
    cells,
    data_set_title,
    estimate,
    find,
    number,
    plain,
    series,
)
from ldm.study.report.table_formats import Cell, Table, csv, latex, markdown

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
    "table_path",
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
    "here, and the shipped ones are small, of drawn phantoms or of real skin. The two are not comparable as scores."
)

FLOORS = (
    "The floors of skill and leakage are the autoencoder's alone: the true counterfactual, encoded and decoded. Those "
    "of retrieval and oracle are the inversion's: the original inverted and sampled again without any edit, still "
    "nearest to itself among the patients, outside the attribute's mask, and to itself among its renderings."
)


def table_1(results: Results) -> Table:
    """The attribute classifiers on held-out images (paper, Table 1)."""
    rows: list[tuple[Cell, ...]] = []
    networks = []
    for key, classifier in (find(results, "classifiers") or {}).items():
        data = _data_set(find(classifier, "data") or key, classifier)
        for name, scores in (find(classifier, "attributes") or {}).items():
            counts = [number(find(scores, count)) for count in ("n", "positives")]
            judged = [estimate(find(scores, share)) for share in ("accuracy", "f1", "auroc")]
            rows.append((data, _titles(results).get(name, plain(name)), *counts, *judged, number(find(scores, "ece"))))
        networks += [f"{data}: {model}"] if (model := find(classifier, "model")) else []
    columns = ("Data set", "Attribute", "Images", "Positives", "Accuracy", "F1", "AUROC", "ECE")
    note = "Held-out images; 95 % intervals; ECE: expected calibration error."
    return Table("Attribute classifiers", columns, tuple(rows), " ".join([note, *_sentence("Networks", networks)]))


def table_2(results: Results) -> Table:
    """CFRT of swaps and interpolated samples, with LPIPS and SSIM to the neutral image (paper, Table 2)."""
    rows = []
    for a in attributes(results):
        cfrt = [estimate(find(a.scores, kind, "cfrt", MAIN_READING)) for kind in KINDS]
        distances = [estimate(find(a.scores, metric, kind)) for metric in ("lpips", "ssim") for kind in KINDS]
        if not any((*cfrt, *distances)):
            continue
        printed = PAPER_TABLE_2.get(a.cell_title, {}).get(a.key.lower().replace(" ", "_"), (None, None))
        rows.append((a.data_set, a.diagnosis, a.title, *cfrt, *distances, *printed))
    measures = [f"{metric}\n{kind}" for metric in ("CFRT", "LPIPS", "SSIM") for kind in ("swaps", "interp.")]
    paper = [f"paper,\n{kind}\n(CheXpert\n/ ISIC)" for kind in ("swaps", "interp.")]
    note = (
        f"CFRT as own_head_signed, mean of {_samples(results)}. LPIPS and SSIM to the neutral image, mean of all swap "
        "steps and of the same frames. 95 % intervals; interp.: samples interpolated along the Bezier curve."
    )
    sentences = [note, *_redrawn(results), *_fast(results), NOT_COMPARABLE, *_unavailable(results)]
    columns = ("Data set", "Class", "Attribute", *measures, *paper)
    return Table("Classification flip rate along a trajectory (CFRT)", columns, tuple(rows), " ".join(sentences))


def table_3(results: Results) -> Table:
    """Images and positives per label in each part of the data sets (paper, Table 3).

    Of those that were counted; where none was, of the classifiers'.
    """
    parts = ("train", "validation", "test")
    rows: list[tuple[Cell, ...]] = []
    counted = find(results, "datasets")
    for data, split in (counted or _seen_by_classifiers(results)).items():
        labels = dict.fromkeys(label for part in parts for label in (find(split, part) or {}))
        for label in sorted(labels, key=lambda label: label != "images"):
            title = _titles(results).get(label, plain(label))
            rows.append((_data_set(data, split), title, *(number(find(split, part, label)) for part in parts)))
    note = "Images, then those that are positive for each label."
    if not counted:
        note += (
            " What the attribute classifiers were trained and tested on, which keeps the positives of the test only."
        )
    return Table("Data sets", ("Data set", "Label", "Train", "Validation", "Test"), tuple(rows), note)


def table_readings(results: Results) -> Table:
    """All four readings of CFRT (paper, eq. 3) with what they were counted over."""
    rows: list[tuple[Cell, ...]] = []
    for a in attributes(results):
        for kind in KINDS:
            for reading in READINGS:
                score = find(a.scores, kind, "cfrt", reading)
                if score is None:
                    continue
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
        if not find(a.scores, "baselines"):
            continue  # nothing to set the swaps beside
        for kind, label in (("swaps", "prompt swaps"), ("interpolations", "Bezier curve")):
            rows.append((a.images, a.title, label, *_method(find(a.scores, kind), None)))
        for name, label in BASELINES.items():
            if find(a.scores, "baselines", name) is not None:
                ours = find(a.scores, "interpolations" if name in ON_CURVE else "swaps")
                rows.append((a.images, a.title, label, *_method(find(a.scores, "baselines", name), ours)))
    note = (
        "n: seeds. CFRT as own_head_signed. Minus ours: the straight chord against the Bezier curve, the others "
        "against the prompt swaps, on the seeds of the baseline; below zero the baseline is worse. Target: mean change "
        "of the target's probability; off-target: the largest mean change of another attribute's. 95 % intervals."
    )
    columns = (
        *("Images", "Attribute", "Method", "n", "CFRT", "Minus ours", "Strict", "Flip rate", "Target", "Off-target"),
    )
    return Table("Baselines", columns, tuple(rows), note)


def table_path(results: Results) -> Table:
    """How far the trajectories are from a straight line, and how far from a random walk (the paper's claim, eq. 4)."""
    measures = ("arc_over_chord", "total_turning", "line_residual", "first_direction")
    rows: list[tuple[Cell, ...]] = []
    shown = [a for a in attributes(results) if find(a.scores, "path", "first_direction")]
    for a in shown:
        along = find(a.scores, "path", "first_direction")
        estimates = [estimate(find(a.scores, "path", measure)) for measure in measures]
        estimates += [estimate(find(along, "departs")), estimate(find(a.scores, "strength_correlation"))]
        rows.append((a.images, a.title, number(find(along, "n")), *estimates))
    for label, reference in (("Straight line", "straight"), ("Random walk", "walk")) if shown else ():
        known = [number(find(shown[0].scores, "path", measure, reference)) for measure in measures]
        rows.append((label, None, None, *known, None, None))
    limit = number(find(shown[0].scores, "path", "first_direction", "departs", "below")) if shown else None
    note = (
        "Paths from neutral over late swaps to early ones, in the latents; means over n seeds with 95 % intervals. "
        "Arc / chord: length over the distance between the ends. Turning: the sum of the angles between segments. "
        "Residual: root mean square distance from the best line, over the chord. First direction: share of the points' "
        "variance along their first principal direction. Random walk: as many points, all steps of one length and at "
        "right angles to each other. The steps of a trajectory are of different lengths; in a walk that leaves the "
        "turning as it is and mostly brings the rest nearer to a line."
    )
    no_line = f" No line: share of seeds whose first direction holds less than {100 * limit:.0f} %." if limit else ""
    strength = " Strength: Spearman correlation of the attribute's probability with how early it was swapped in."
    names = ("Arc / chord", "Turning\n(rad)", "Residual", "First\ndirection", "No line", "Strength")
    title = "Paths of the trajectories, beside a straight line and a random walk"
    return Table(title, ("Images", "Attribute", "n", *names), tuple(rows), note + no_line + strength)


def table_truth(results: Results) -> Table:
    """Swaps of inverted rendered images against their rendered counterfactuals, one row an attribute."""
    rows = []
    for a in attributes(results):
        truth = find(a.scores, "truth")
        if truth is None:
            continue
        flipped = _steps_flipped(truth)
        ceiling = find(truth, "share_of_ceiling", MAIN_READING) or find(truth, "share_of_ceiling")
        row: list[Cell] = [a.images, a.title, number(find(truth, "n")), ", ".join(f"{s}" for s in flipped) or None]
        row += [min(_when_flipped(truth, "skill"), default=None), max(_when_flipped(truth, "leakage"), default=None)]
        row += [min(_when_flipped(truth, "retrieval"), default=None)]
        floors = ("skill", "leakage", "retrieval", "oracle", "latent", "psnr")
        row += [number(find(truth, "floor", name)) for name in floors]
        row += [estimate(find(truth, "strength_correlation")), estimate(ceiling)]
        rows.append(tuple(row))
    note = (
        f"Skill, leakage and identity retrieval@1: the worst over the swap steps that flip at least {FLIPPED:.0%}, "
        f"which the column before them names. {FLOORS} Latent error and PSNR: of the same image against the original, "
        "before decoding and after. Strength: Spearman correlation of target probability with the edit's strength. "
        "Ceiling: CFRT (own_head_signed) over the one on true pairs."
    )
    columns = (
        *("Images", "Attribute", "n", "Steps\nflipped", "Skill", "Leakage", "Retrieval"),
        *("Floor:\nskill", "Floor:\nleakage", "Floor:\nretrieval", "Floor:\noracle"),
        *("Latent\nerror", "PSNR\n(dB)", "Strength", "Share of\nceiling"),
    )
    return Table("Swaps against the true counterfactual", columns, tuple(rows), note)


def table_truth_steps(results: Results) -> Table:
    """The same for every swap step, and under the steps their floor."""
    measures = ("skill", "leakage", "retrieval", "flip_rate", "oracle")
    rows: list[tuple[Cell, ...]] = []
    for a in attributes(results):
        steps = find(a.scores, "truth", "per_swap_step", "swap_steps") or []
        curves = [series(find(a.scores, "truth", "per_swap_step", name), len(steps)) for name in measures]
        for i in sorted(range(len(steps)), key=lambda i: -steps[i]):
            rows.append((a.images, a.title, int(steps[i]), *(number(float(curve[i])) for curve in curves)))
        floors = [number(find(a.scores, "truth", "floor", name)) for name in measures]
        if steps and floors != [None] * len(measures):
            rows.append((a.images, a.title, "floor", *floors))
    note = (
        "Skill: 1 is the true counterfactual, 0 no edit. Leakage: share of the squared change outside the mask. "
        f"Oracle: share of edits that are nearest to their own true counterfactual among the renderings. {FLOORS}"
    )
    columns = ("Images", "Attribute", "Swap step", "Skill", "Leakage", "Retrieval", "Flip rate", "Oracle")
    return Table("Swaps against the true counterfactual, per swap step", columns, tuple(rows), note)


def write_tables(results: Results, out: Path) -> list[Path]:
    """Every table that has rows as OUT/tables/<name>.md, .csv and .tex.

    Returns: the files written, in the order of the tables.
    """
    tables = {
        **{"table_1": table_1(results), "table_2": table_2(results), "table_3": table_3(results)},
        **{"table_readings": table_readings(results), "table_methods": table_methods(results)},
        **{"table_path": table_path(results), "table_truth": table_truth(results)},
        **{"table_truth_steps": table_truth_steps(results)},
    }
    written = []
    for name, table in tables.items():
        if not table.rows:
            log.info("%s: nothing was measured for it; not written", name)
            continue
        for ending, text in (("md", markdown(table)), ("csv", csv(table)), ("tex", latex(table))):
            path = out / "tables" / f"{name}.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, text)
            written.append(path)
    return written


# ---- parts of rows and notes -----------------------------------------------------------------------


def _method(report: object, ours: object) -> list[Cell]:
    """n, CFRT, its difference to ours, strict, flip rate, change of the target and the largest one off it."""
    cfrt = estimate(find(report, "cfrt", MAIN_READING))
    given = estimate(find(report, "difference", MAIN_READING))
    reference = estimate(find(ours, "cfrt", MAIN_READING))
    if given is None and cfrt and reference:
        given = Estimate(cfrt.value - reference.value)
    values = [estimate(find(report, *path)) for path in (("cfrt", "strict"), ("flip_rate",), ("target_change",))]
    off_target = number(find(report, "largest_off_target", "value"))
    n = number(find(report, "cfrt", MAIN_READING, "n"))
    return [n, cfrt, given, *(value.value if value else None for value in values), off_target]


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
    each = [find(results, "cells", cell, "averaged") or [] for cell in cells(results)]
    alike = [steps for i, steps in enumerate(each) if steps and steps not in each[:i]]
    averaged = alike or [find(results, "sampling", "averaged") or []]
    frames = find(results, "sampling", "interpolation_frames") or []
    swaps = " or ".join(", ".join(map(str, steps)) for steps in averaged if steps)
    named = f"swap steps {swaps}" if swaps else "the swap steps"
    return named + (f" and of frames {frames[0]}-{frames[-1]} of the curve" if frames else "")


def _redrawn(results: Results) -> list[str]:
    """That the curve of a folder is not its own, which may have other points."""
    drawn = [
        f"{title}: {find(results, 'cells', cell, 'redrawn')}"
        for cell, title in cells(results).items()
        if find(results, "cells", cell, "redrawn")
    ]
    return _sentence("The curve is drawn anew through the swaps", drawn)


def _fast(results: Results) -> list[str]:
    """Which trajectories are near those of the paper's way and not them."""
    titles = [title for cell, title in cells(results).items() if find(results, "cells", cell, "fast")]
    return _sentence("Traversed with fewer questions, by ldm traverse --fast", titles)


def _unavailable(results: Results) -> list[str]:
    """Why a distance is missing, each reason once."""
    parts = ("swaps", "lpips", "ssim")
    reasons = [find(a.scores, part, "unavailable") for a in attributes(results) for part in parts]
    return [f"{reason}".rstrip(".") + "." for reason in dict.fromkeys(reasons) if reason]


def _seen_by_classifiers(results: Results) -> dict[str, dict[str, object]]:
    """What `table_3` takes, as far as the classifiers' files know it."""
    seen: dict[str, dict[str, object]] = {}
    for key, classifier in (find(results, "classifiers") or {}).items():
        parts = {part: {"images": count} for part, count in (find(classifier, "images") or {}).items()}
        for name, scores in (find(classifier, "attributes") or {}).items() if "test" in parts else ():
            parts["test"][name] = find(scores, "positives")
        if parts:
            seen[find(classifier, "data") or key] = {**parts, "phantoms": find(classifier, "phantoms")}
    return seen


def _data_set(name: str, node: object) -> str:
    return data_set_title(name, drawn=bool(find(node, "phantoms")))


def _titles(results: Results) -> dict[str, str]:
    """Key of an attribute -> its title in the cells."""
    return {a.key: a.title for a in attributes(results)}
