"""What `ldm evaluate` measures: folders of `ldm traverse`, or cells that it samples itself; by which model, judge."""

import argparse
import logging
from dataclasses import replace
from pathlib import Path

from ldm.names import nearest
from ldm.phantom.prompts import Cell
from ldm.pipeline import StableDiffusion
from ldm.study import classifier as classifiers
from ldm.study import shipped
from ldm.study.evaluation import steps
from ldm.study.evaluation.cells import cell_of_run
from ldm.study.evaluation.judges import Judge
from ldm.study.evaluation.run import Task
from ldm.traversal.plan import SWAP_STEPS, Traversal, parse_integers
from ldm.traversal.run_folder import read_record
from ldm.traversal.sampling import latent_shape
from ldm_tools.evaluate.options import BASELINE_SEEDS

log = logging.getLogger(__name__)


def task_of_run(folder: Path, averaged: tuple[int, ...] | None) -> Task:
    """A finished traversal's folder. It has no ground truth, and its seeds are all taken.

    Args:    averaged: None: the authors' swap steps where it has them, or else its own that are as early.
    """
    cell, plan = cell_of_run(folder)
    if averaged is None:
        averaged = steps.early(plan.swap_steps, plan.steps)
        if averaged != steps.AVERAGED:
            shown = ", ".join(map(str, averaged))
            log.info("%s: CFRT averages swap steps %s of its %d (--swap-steps names others)", folder, shown, plan.steps)
    return Task(cell=cell, plan=plan, run=folder, averaged=averaged)


def sampled_tasks(args: argparse.Namespace, averaged: tuple[int, ...] | None) -> list[Task]:
    """The cells that are sampled here. Args: averaged: None: the authors' swap steps, or their shares."""
    seeds = parse_integers(args.seeds, "--seeds")
    swap_steps, early = steps.shares(SWAP_STEPS, args.steps), steps.shares(steps.AVERAGED, args.steps)
    if args.sampled_swap_steps is not None:
        swap_steps = parse_integers(args.sampled_swap_steps, "--sampled-swap-steps")
        early = steps.early(swap_steps, args.steps)
    elif swap_steps != SWAP_STEPS:
        log.info("swap steps %s of %d (--sampled-swap-steps names others)", ", ".join(map(str, swap_steps)), args.steps)
    averaged = averaged or early
    few = min(BASELINE_SEEDS, len(seeds)) if len(seeds) > 1 else 0  # the linear direction is a mean over other seeds
    cells = shipped.CELLS
    names = [name.strip() for name in args.cells.split(",")] if args.cells else cells_for(args)
    for name in names:
        if name not in cells:
            raise ValueError(f"--cells: got {name!r}{nearest(name, list(cells))}; expected some of {', '.join(cells)}")
    return [
        Task(
            cell=cells[name],
            plan=Traversal(
                seeds=seeds,
                steps=args.steps,
                guidance=shipped.model_of(name).guidance if args.guidance is None else args.guidance,
                negative=args.negative,
                neutral=cells[name].neutral,
                styles=cells[name].styles,
                swap_steps=swap_steps,
            ),
            averaged=averaged,
            baseline_seeds=few if args.baseline_seeds is None else min(args.baseline_seeds, len(seeds)),
            truth_seeds=truth_seeds(args, cells[name], len(seeds)),
            truth_swap_steps=(
                tuple(sorted({*steps.shares(steps.TRUTH, args.steps), *averaged}))
                if args.truth_swap_steps is None
                else parse_integers(args.truth_swap_steps, "--truth-swap-steps")
            ),
            truth_guidance=args.truth_guidance,
        )
        for name in dict.fromkeys(names)
    ]


def cells_for(args: argparse.Namespace) -> list[str]:
    """Without --weights those of every shipped model; those of the phantoms for any other than the real one."""
    if args.weights is None:
        return list(shipped.CELLS)
    real = args.weights.resolve() == shipped.REAL.weights.resolve()
    return list((shipped.REAL if real else shipped.PHANTOM).cells)


def truth_seeds(args: argparse.Namespace, cell: Cell, seeds: int) -> int:
    """How many rendered patients a cell has. Real skin has no known counterfactuals."""
    if cell.domain is None:
        return 0
    return seeds if args.truth_seeds is None else args.truth_seeds


def weights_for(task: Task, args: argparse.Namespace) -> Path:
    """The model that samples or decodes a task: the one that was asked for, or the cell's own."""
    if args.weights is not None:
        return Path(args.weights)
    return shipped.PHANTOM.weights if task.run else shipped.model_of(task.cell.name).weights


def with_weights(args: argparse.Namespace, weights: Path) -> argparse.Namespace:
    """The options, with a model."""
    return argparse.Namespace(**{**vars(args), "weights": weights})


def reading_as(task: Task, args: argparse.Namespace, sd: StableDiffusion) -> StableDiffusion:
    """The model, reading prompts as a RUN did: as many chunks of them, brackets as weights or as text."""
    record = read_record(task.run) if task.run else {"prompt_weights": {}} if args.prompt_weights else {}
    chunks = record.get("prompt_chunks", 1)
    if not isinstance(chunks, int) or chunks < 1:
        raise ValueError(f"{task.run}/run.json: prompt_chunks is {chunks!r}, expected 1 or more")
    tokenizer = sd.tokenizer.reading_weights() if "prompt_weights" in record else sd.tokenizer
    return replace(sd, prompt_chunks=chunks, tokenizer=tokenizer)


def classifiers_for(task: Task, args: argparse.Namespace, weights: Path) -> list[Path]:
    """The one that was given, or the cell's own; of a RUN the shipped ones, those of its model first."""
    if args.classifier is not None:
        return [args.classifier]
    if not task.run:
        return [shipped.model_of(task.cell.name).classifiers[task.cell.name]]
    ordered = sorted(shipped.MODELS, key=lambda model: model.weights.resolve() != weights.resolve())
    return list(dict.fromkeys(file for model in ordered for file in model.classifiers.values()))


def of_that_size(task: Task, judge: Judge, args: argparse.Namespace, sd: StableDiffusion) -> Judge:
    """The judge, unless it is a shipped one that nobody asked for and looks at images of another size."""
    if not task.run or args.classifier or judge.file is None:
        return judge
    side, wanted = latent_shape(sd, task.plan)[-1] * sd.config.vae.downscale, classifiers.load(judge.file).input_size
    if side == wanted:
        return judge
    lacking = f"the shipped classifiers look at {wanted} pixels, and the images have {side}; --classifier names another"
    return Judge(None, {}, f"no CFRT, flip rate and probabilities: {lacking}")
