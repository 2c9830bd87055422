"""`ldm evaluate`: check everything, measure what is missing, write the report."""

import argparse
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ldm.data import folders, splits
from ldm.files import write_json
from ldm.study import classifier as classifiers
from ldm.study.evaluation import report
from ldm.study.evaluation.instruments import Instruments
from ldm.study.evaluation.judges import Judge, choose
from ldm.study.evaluation.run import Task, Workplace, check, evaluate_cell
from ldm.study.metrics import perceptual
from ldm.traversal.plan import parse_integers
from ldm_tools import options, processes
from ldm_tools.evaluate.options import (
    MOST_PROCESSES,
    SAMPLED,
    SEEDS_A_PROCESS,
    check_options,
    named_attributes,
    refuse_idle_options,
)
from ldm_tools.evaluate.table import command_line, refuse_to_replace, score_table
from ldm_tools.evaluate.tasks import (
    classifiers_for,
    of_that_size,
    reading_as,
    sampled_tasks,
    task_of_run,
    weights_for,
    with_weights,
)

SMALL = 2**28  # bytes of weights that each process may hold beside the others without being told to

log = logging.getLogger(__name__)


def run(args: argparse.Namespace) -> None:
    """Raises ValueError for whatever does not fit, before anything is overwritten."""
    averaged = None if args.swap_steps is None else parse_integers(args.swap_steps, "--swap-steps")
    refuse_idle_options(args)
    for name, default in SAMPLED.items():
        vars(args).setdefault(name, default)
    if args.predictions:
        score_table(args, averaged)
        return
    check_options(args)
    refuse_to_replace(args.out, "cfrt", "the report of a table")
    named = named_attributes(args)
    tasks = [task_of_run(folder, averaged) for folder in args.runs] or sampled_tasks(args, averaged)
    if len({task.cell.name for task in tasks}) < len(tasks):
        raise ValueError(f"RUN: {[str(folder) for folder in args.runs]} end in the same name, rename one")
    weights = {task.cell.name: weights_for(task, args) for task in tasks}
    judges = {
        task.cell.name: choose(
            tuple(task.plan.styles),
            classifiers_for(task, args, weights[task.cell.name]),
            named,
            given=args.classifier is not None,
            all_of_them=task.run is None,
        )
        for task in tasks
    }
    datasets = {name: counts for folder in args.data for name, counts in count(folder).items()}

    shared = processes_for(args, tasks, set(weights.values()))
    with processes.beside(args.words, shared):
        measured = measure(args, tasks, weights, judges)
    if measured is None:
        return
    tasks, places, results = measured
    metrics = report.assemble(tasks, places, results, command_line(), datasets)
    write_json(args.out / "metrics.json", metrics)
    report.write(metrics, tasks, places, args.out, args.shown_seeds)
    print(report.headline(metrics))
    print(f"look at {args.out / 'index.html'}, then at {args.out / 'tables'} and {args.out / 'figures'}")


def measure(
    args: argparse.Namespace, tasks: list[Task], weights: Mapping[str, Path], judges: dict[str, Judge]
) -> tuple[list[Task], dict[str, Workplace], dict[str, Any]] | None:
    """Sample and measure what is missing, as one of the processes that share it.

    Args:    weights, judges: by the cell's name.
    Returns: the tasks as they were judged, where, and metrics.json's part of each; None in all processes but the first.
    """
    worker = processes.worker()
    models = {path: options.load_model(with_weights(args, path)) for path in dict.fromkeys(weights.values())}
    sds = {task.cell.name: reading_as(task, args, models[weights[task.cell.name]]) for task in tasks}
    if not worker.first:  # what it has to say is said once
        logging.getLogger(perceptual.__name__).setLevel(logging.WARNING)
        worker.wait()  # until the first has fetched
    lpips = perceptual.load_lpips(args.lpips, fetch=args.fetch)
    if worker.first:
        worker.wait()
    judges = {name: of_that_size(task, judges[name], args, sds[name]) for task in tasks for name in [task.cell.name]}
    device = next(iter(models.values())).device
    files = {judge.file for judge in judges.values()}
    trained = {file: None if file is None else classifiers.load(file, device) for file in files}
    tasks = [replace(task, judged=judges[task.cell.name].styles) for task in tasks]
    places = {
        name: Workplace(Instruments(sds[name], trained[judge.file], judge.file, lpips), args.out, worker)
        for name, judge in judges.items()
    }
    for name, judge in judges.items() if worker.first else ():
        if judge.lacking:
            log.warning("%s: %s", name, judge.lacking)
    check(tasks, places)
    torch.set_num_threads(args.threads)  # sums of several threads are taken in another order
    results = {task.cell.name: evaluate_cell(places[task.cell.name], task) for task in tasks}
    worker.leave()
    return (tasks, places, results) if worker.first else None


def processes_for(args: argparse.Namespace, tasks: Sequence[Task], weights: set[Path]) -> int:
    """How many processes share the seeds, this one included: no more than there are seeds of one cell."""
    if processes.are_shared():
        return 1
    seeds = max(max(len(task.plan.seeds), task.truth_seeds) for task in tasks)
    if args.processes is not None:
        if args.processes > seeds:
            log.info("--processes: %d for %d seeds of a cell, the others would have nothing to do", seeds, seeds)
        return min(args.processes, seeds)
    files = [file for path in weights for file in ([path] if path.is_file() else path.rglob("*.safetensors"))]
    if options.device_of(args).type != "cpu" or sum(file.stat().st_size for file in files) > SMALL:
        return 1
    return max(1, min(processes.of_this_machine() // args.threads, seeds // SEEDS_A_PROCESS, MOST_PROCESSES))


def count(folder: Path) -> dict[str, dict[str, dict[str, int]]]:
    """Table 3 of one data set, split by patient or lesion: name -> part -> label -> positives."""
    images = folders.read(folder)
    split = splits.grouped(images)
    parts = {"train": split.train, "validation": split.validation, "test": split.test}
    return {images.name: {part: images.counts(rows) for part, rows in parts.items()}}
