"""`ldm evaluate`: everything that the paper reports, and what only phantoms allow.

ldm evaluate --seeds 0-199 --out out/evaluation             the shipped models, all five cells
ldm evaluate out/glasses --weights FILE --classifier FILE   trajectories that exist
ldm evaluate --predictions FILE.csv --attribute hair        a table of probabilities, no model
ldm evaluate --processes 4 ...                              seeds shared among processes; the numbers stay the same
"""

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ldm.data import folders, splits
from ldm.files import read_json, write_json
from ldm.names import nearest
from ldm.phantom.prompts import Cell
from ldm.pipeline import StableDiffusion
from ldm.study import classifier as classifiers
from ldm.study import shipped
from ldm.study.evaluation import report, steps
from ldm.study.evaluation.cells import cell_of_run
from ldm.study.evaluation.instruments import Instruments
from ldm.study.evaluation.judges import Judge, choose
from ldm.study.evaluation.run import Task, Workplace, check, evaluate_cell
from ldm.study.metrics import perceptual, predictions
from ldm.traversal.fewer_steps import stands_for
from ldm.traversal.plan import SWAP_STEPS, Traversal, parse_integers
from ldm.traversal.run_folder import read_record
from ldm.traversal.sampling import latent_shape
from ldm_tools import options, processes

# The options that only sampling takes, with their defaults; None: as many as there are seeds, or as is needed.
SAMPLED = {
    **{"cells": None, "seeds": "0-15", "steps": 50, "negative": "", "prompt_weights": False, "max_batch": None},
    "guidance": 3.0,  # of the shipped models: see the cards in weights/
    **{
        "sampled_swap_steps": None,
        "baseline_seeds": None,
        "truth_seeds": None,
        "truth_swap_steps": None,
        "truth_guidance": 1.0,
    },
}
BASELINE_SEEDS = 8
SEEDS_A_PROCESS = 4  # at least, unless told: one takes as long to start as a seed of a shipped model or two
SMALL = 2**28  # bytes of weights that each process may hold beside the others without being told to

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command to `parser`."""
    parser.description = (
        "Score trajectories: CFRT in four readings, LPIPS, SSIM, latent directions, baselines and, for phantoms, "
        "ground truth. Writes metrics.json, the paper's tables (Markdown, CSV, LaTeX) and figures (PNG, PDF), and "
        "index.html, an explorer that opens from disk. Without RUN it samples phantoms and real skin itself, with the "
        "shipped models. Run it again to go on after a stop."
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folders that `ldm traverse` has written")
    parser.add_argument("--out", type=Path, help="folder to write (needed but for --predictions, which prints)")
    parser.add_argument(
        "--swap-steps", help="those that CFRT averages (default 5,10,15 of 50, as the authors; else as early ones)"
    )
    parser.add_argument(
        "--classifier", type=Path, help="from `ldm classify train` (default: the shipped one that fits)"
    )
    parser.add_argument(
        "--map",
        action="append",
        default=[],
        metavar="STYLE=ATTRIBUTE",
        help="which of the classifier's attributes a RUN's style is; repeat for each. A style that no classifier knows "
        "has no CFRT, but all the rest",
    )
    parser.add_argument("--lpips", default="alex", choices=("alex", "vgg", "squeeze"), help="network (default alex)")
    parser.add_argument("--fetch", action="store_true", help="download LPIPS' ImageNet weights if they are not on disk")
    parser.add_argument(
        "--data",
        type=Path,
        action="append",
        default=[],
        help="a data set to count in Table 3 (default: what the classifiers learned)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="CPU threads of each process (default %(default)s, as under torchrun; more change the last bits)",
    )
    parser.add_argument(
        "--processes",
        type=int,
        help="that share the seeds; the numbers stay the same (default: on a CPU, with models as small as the shipped "
        f"ones, as many as it has cores, of {SEEDS_A_PROCESS} seeds at least; else 1; torchrun starts its own)",
    )
    parser.add_argument("--shown-seeds", type=int, default=6, help="in figures and explorer (default %(default)s)")

    tables = parser.add_argument_group("from a table alone")
    tables.add_argument(
        "--predictions", type=Path, action="append", metavar="FILE.csv",
        help="seed,path,neutral_<attr>,5_<attr>,...,45_<attr>; several files: one per classifier",
    )  # fmt: skip
    tables.add_argument("--attribute", help="the attribute that the table's trajectories swap in")

    # Absent unless typed, so that an option which would do nothing is refused.
    phantoms = parser.add_argument_group(
        "what is sampled, where no RUN is given", "a RUN was sampled with its own", argument_default=argparse.SUPPRESS
    )
    phantoms.add_argument(
        "--cells", help=f"default: {','.join(shipped.CELLS)}; beside --weights those that the model is for"
    )
    phantoms.add_argument("--seeds", help=f"such as 0-199 (default {SAMPLED['seeds']})")
    phantoms.add_argument("--steps", type=int, help=f"DDIM steps (default {SAMPLED['steps']})")
    phantoms.add_argument(
        "--sampled-swap-steps", help="the swaps (default 5,10..45; of fewer than 46 steps the same shares of them)"
    )
    phantoms.add_argument("--guidance", type=float, help=f"guidance scale (default {SAMPLED['guidance']})")
    phantoms.add_argument("--negative", help="the prompt that guidance pushes away from (default: empty)")
    phantoms.add_argument(
        "--prompt-weights", action="store_true", help="read brackets in it as weights, as `ldm generate` does"
    )
    phantoms.add_argument(
        "--baseline-seeds", type=int, help=f"so many for the baselines (default {BASELINE_SEEDS}; one seed has none)"
    )
    phantoms.add_argument("--truth-seeds", type=int, help="rendered phantoms (default: as many as --seeds)")
    phantoms.add_argument(
        "--truth-swap-steps",
        help=f"of those (default {','.join(map(str, steps.TRUTH))}, and those of --swap-steps)",
    )
    phantoms.add_argument("--truth-guidance", type=float, help=f"of those (default {SAMPLED['truth_guidance']})")
    phantoms.add_argument("--max-batch", type=int, help="most rows in one U-Net call, to bound memory")
    options.add_model(parser)
    parser.set_defaults(weights=None)  # each cell has a model of its own
    options.add_adapters(parser)
    options.add_cuda_graph(parser)


def run(args: argparse.Namespace) -> None:
    """Raises ValueError for whatever does not fit, before anything is overwritten."""
    averaged = None if args.swap_steps is None else parse_integers(args.swap_steps, "--swap-steps")
    refuse_idle_options(args)
    for name, default in SAMPLED.items():
        vars(args).setdefault(name, default)
    if args.predictions:
        score_table(args, averaged)
        return
    if args.attribute:
        raise ValueError("--attribute: it belongs to --predictions, which is missing")
    if args.out is None:
        raise ValueError("--out: missing; name a folder to write, such as out/evaluation")
    if args.shown_seeds < 1:
        raise ValueError(f"--shown-seeds: got {args.shown_seeds}, expected 1 or more")
    if args.threads < 1:
        raise ValueError(f"--threads: got {args.threads}, expected 1 or more")
    if args.processes is not None and args.processes < 1:
        raise ValueError(f"--processes: got {args.processes}, expected 1 or more")
    if args.processes is not None and "WORLD_SIZE" in os.environ:
        raise ValueError("--processes: torchrun has started some already; leave out one of the two")
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
    """How many processes share the seeds, this one included."""
    if processes.are_shared():
        return 1
    if args.processes is not None:
        return args.processes
    files = [file for path in weights for file in ([path] if path.is_file() else path.rglob("*.safetensors"))]
    if options.device_of(args).type != "cpu" or sum(file.stat().st_size for file in files) > SMALL:
        return 1
    seeds = max(len(task.plan.seeds) for task in tasks)
    return max(1, min(processes.of_this_machine() // args.threads, seeds // SEEDS_A_PROCESS))


def weights_for(task: Task, args: argparse.Namespace) -> Path:
    """The model that samples or decodes a task: the one that was asked for, or the cell's own."""
    if args.weights is not None:
        return Path(args.weights)
    return shipped.PHANTOM.weights if task.run else shipped.model_of(task.cell.name).weights


def reading_as(task: Task, args: argparse.Namespace, sd: StableDiffusion) -> StableDiffusion:
    """The model, reading prompts as a RUN did: as many chunks of them, brackets as weights or as text."""
    record = read_record(task.run) if task.run else {"prompt_weights": {}} if args.prompt_weights else {}
    chunks = record.get("prompt_chunks", 1)
    if not isinstance(chunks, int) or chunks < 1:
        raise ValueError(f"{task.run}/run.json: prompt_chunks is {chunks!r}, expected 1 or more")
    tokenizer = sd.tokenizer.reading_weights() if "prompt_weights" in record else sd.tokenizer
    return replace(sd, prompt_chunks=chunks, tokenizer=tokenizer)


def with_weights(args: argparse.Namespace, weights: Path) -> argparse.Namespace:
    """The options, with a model."""
    return argparse.Namespace(**{**vars(args), "weights": weights})


def classifiers_for(task: Task, args: argparse.Namespace, weights: Path) -> list[Path]:
    """The one that was given, or the cell's own; of a RUN the shipped ones, those of its model first."""
    if args.classifier is not None:
        return [args.classifier]
    if not task.run:
        return [shipped.model_of(task.cell.name).classifiers[task.cell.name]]
    ordered = sorted(shipped.MODELS, key=lambda model: model.weights.resolve() != weights.resolve())
    return list(dict.fromkeys(file for model in ordered for file in model.classifiers.values()))


def refuse_idle_options(args: argparse.Namespace) -> None:
    """ValueError for an option that would do nothing beside a RUN or --predictions."""
    idle = [name for name in SAMPLED if name in args] if args.runs or args.predictions else []
    if args.predictions:
        idle += [name for name in ("classifier", "data", "fetch") if getattr(args, name)]
    if idle:
        option, beside = "--" + idle[0].replace("_", "-"), "--predictions" if args.predictions else "RUN"
        raise ValueError(f"{option}: it does nothing beside {beside}, whose samples exist; leave it out")


def refuse_to_replace(out: Path, key: str, what: str) -> None:
    """ValueError where OUT/metrics.json is of the other kind, told by a key that only that has."""
    path = out / "metrics.json"
    if key in read_json(path):
        raise ValueError(f"--out: {path} is {what}, which this would replace; name another folder")


def of_that_size(task: Task, judge: Judge, args: argparse.Namespace, sd: StableDiffusion) -> Judge:
    """The judge, unless it is a shipped one that nobody asked for and looks at images of another size."""
    if not task.run or args.classifier or judge.file is None:
        return judge
    side, wanted = latent_shape(sd, task.plan)[-1] * sd.config.vae.downscale, classifiers.load(judge.file).input_size
    if side == wanted:
        return judge
    lacking = f"the shipped classifiers look at {wanted} pixels, and the images have {side}; --classifier names another"
    return Judge(None, {}, f"no CFRT, flip rate and probabilities: {lacking}")


def named_attributes(args: argparse.Namespace) -> dict[str, str]:
    """What --map says: style -> attribute. Raises ValueError for what is no such pair, or without a RUN."""
    if args.map and not args.runs:
        raise ValueError("--map: it belongs to a RUN, whose styles have names of their own; phantoms' are known")
    pairs = [text.partition("=") for text in args.map]
    for style, equals, attribute in pairs:
        if not (style and equals and attribute):
            raise ValueError(f"--map: got {style + equals + attribute!r}, expected STYLE=ATTRIBUTE")
    named = {style: attribute for style, _, attribute in pairs}
    if len(set(named.values())) < len(pairs):
        raise ValueError(f"--map: expected each style and each attribute once, got {' '.join(args.map)}")
    return named


def task_of_run(folder: Path, averaged: tuple[int, ...] | None) -> Task:
    """A finished traversal's folder. It has no ground truth, and its seeds are all taken.

    Args:    averaged: None: the authors' swap steps where it has them, or else its own that are as early.
    """
    cell, plan = cell_of_run(folder)
    if averaged is None:
        averaged = stands_for(read_record(folder), steps.AVERAGED) or steps.early(plan.swap_steps, plan.steps)
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
                guidance=args.guidance,
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


def count(folder: Path) -> dict[str, dict[str, dict[str, int]]]:
    """Table 3 of one data set, split by patient or lesion: name -> part -> label -> positives."""
    images = folders.read(folder)
    split = splits.grouped(images)
    parts = {"train": split.train, "validation": split.validation, "test": split.test}
    return {images.name: {part: images.counts(rows) for part, rows in parts.items()}}


def score_table(args: argparse.Namespace, averaged: tuple[int, ...] | None) -> None:
    """Print the report of a table of probabilities, of every attribute unless one is named; write that one's."""
    if args.runs:
        raise ValueError(
            f"RUN: got {[str(folder) for folder in args.runs]} beside --predictions; expected one or the other"
        )
    table = predictions.read(*args.predictions)
    if args.attribute is None and args.out is not None:
        raise ValueError(
            f"--attribute: missing; which one do the trajectories swap in? The table has {', '.join(table.attributes)}"
        )
    if args.out is not None:
        refuse_to_replace(args.out, "cells", "an evaluation")
    names = table.attributes if args.attribute is None else (args.attribute,)
    reports = [
        {"command": command_line(), "attribute": name, **predictions.report(table, name, averaged)} for name in names
    ]
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        write_json(args.out / "metrics.json", reports[0])
    if len(reports) > 1:
        print("No --attribute: each of them, as if it were the one that the trajectories swap in.\n")
    print("\n\n".join(report.of_table(scores) for scores in reports))


def command_line() -> str:
    """The command as it was typed."""
    return shlex.join(["ldm", *sys.argv[1:]])
