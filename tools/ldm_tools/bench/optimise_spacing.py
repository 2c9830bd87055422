"""`ldm bench samplers --optimise spacing`: levels for a few steps, found by search, and held to seeds it has not seen.

ldm bench samplers --optimise spacing --steps 10 --out out/levels
ldm generate --prompt PROMPT --steps 10 --sampler deis --spacing out/levels/deis_10.json --out out/ten
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from ldm.bench import samplers, spacing_search
from ldm.bench.sampler_statistics import mean_error, ratio_interval
from ldm.checkpoint import identify
from ldm.files import write_json
from ldm.samplers import SAMPLERS
from ldm.samplers.names import understood
from ldm.samplers.own import GeneratorSampler
from ldm.schedule import Schedule
from ldm_tools.bench.spacing_judge import HELD_SEEDS, Judge, held_seeds, training_seeds

STEPS, TRAINING_SEEDS = 10, 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options to `parser`."""
    parser.add_argument(
        "--optimise",
        choices=("spacing",),
        help="choose the levels of --steps steps, and the times that the network is told there, for each of --samplers "
        f"(default: deis) on the network at one --guidance (default: 1), hold them to --seeds (default: {HELD_SEEDS}), "
        "and write SAMPLER_STEPS.json, which --spacing takes; SAMPLER_STEPS.jsonl has a line a round, from which a "
        "search that was cut off goes on; with --known-flow in seconds, without a network",
    )
    parser.add_argument("--steps", type=int, help=f"of the run to optimise (default: {STEPS})")
    parser.add_argument(
        "--tries", type=int, help="runs of all training seeds in a search (default: 20 x --steps, 10 a number searched)"
    )
    parser.add_argument("--training-seeds", type=int, help=f"how many to choose levels by (default: {TRAINING_SEEDS})")


def run_on_known_flow(args: argparse.Namespace) -> None:
    """Every sampler's search, without a network."""
    args.out.mkdir(parents=True, exist_ok=True)
    for name in checked(args):
        found = spacing_search.on_known_flow(SAMPLERS[name], args.steps, tries=args.tries)
        print(f"{name} on the known flow: error {found.error:.2e} after {found.tried} runs", flush=True)
        write(args, name, found.content())


def run(args: argparse.Namespace, bench: samplers.Bench, own_code: Mapping[str, Any]) -> None:
    """Every sampler's search on a network; options are those that `checked` has seen. ValueError for another --out."""
    judge = Judge(bench, args, {"own_code": own_code, "ema": args.ema, "blocks": args.blocks, "backend": args.backend})
    files = {name: judge.file(name) for name in args.samplers.split(",")}
    judge.say_how_long(files)
    verified: dict[tuple[str, str], list[float]] = {}  # sampler, spacing -> error of every unseen seed
    for name, file in files.items():
        content, errors = judge.optimised(name, file)
        verified |= {(name, spacing): found for spacing, found in errors.items()}
        write(args, name, content)
    if len(files) > 1:
        print(of_all(verified))


def write(args: argparse.Namespace, name: str, content: Mapping[str, Any]) -> None:
    """The file that --spacing takes, and a line that says what is in it."""
    path = args.out / f"{name}_{args.steps}.json"
    write_json(path, {"steps": args.steps, "sampler": name, **content})
    told = f", told {_listed(content['told'])}" if "told" in content else ""
    print(f"timesteps {_listed(content['timesteps'])}{told}; see {path}, which --spacing takes")


# ---- options ---------------------------------------------------------------------------------------


def refuse_named_spacings(texts: Sequence[str]) -> None:
    """ValueError for a sampler's name that says a spacing, which is what a search looks for."""
    for text in texts:
        meant = understood(text, SAMPLERS)
        if meant and meant.spacing:
            raise ValueError(
                f"--samplers: {text!r} says a spacing, which --optimise spacing searches; expected {meant.sampler}"
            )


def checked(args: argparse.Namespace) -> list[str]:
    """The samplers to search for. Raises ValueError for options that do not fit; none needs the weights to be read."""
    names: list[str] = args.samplers.split(",")
    for name in names:
        if name not in SAMPLERS or SAMPLERS[name].random or SAMPLERS[name].even:
            raise ValueError(
                f"--samplers: got {name!r}, expected samplers that follow the flow and take uneven timesteps"
            )
    args.steps = STEPS if args.steps is None else args.steps
    args.training_seeds = TRAINING_SEEDS if args.training_seeds is None else args.training_seeds
    args.tries = 20 * args.steps if args.tries is None else args.tries
    if not 2 <= args.steps <= 100 or args.tries < 1 or args.training_seeds < 1:
        raise ValueError(
            "--steps, --tries, --training-seeds: expected 2..100, 1 or more, 1 or more, got "
            f"{args.steps}, {args.tries}, {args.training_seeds}"
        )
    if both := set(training_seeds(args)) & set(held_seeds(args)):
        raise ValueError(f"--seeds: got {min(both)}, by which levels are chosen; expected seeds unseen")
    for name in names:
        spacing_search.fixed(SAMPLERS[name], args.steps, Schedule.sd15())  # one of your own may have none for them
    tell = args.known_flow or _prediction(args) == "eps"
    require_enough(args, tell)
    if own := [name for name in names if tell and isinstance(SAMPLERS[name], GeneratorSampler)]:
        raise ValueError(f"--samplers: {own[0]} is a generator of its own, which knows no told times to search")
    args.evaluations = ",".join(str(SAMPLERS[name].evaluations_of(args.steps)) for name in names)
    return names


def _prediction(args: argparse.Namespace) -> str:
    """What the U-Net predicts, by the headers of its file."""
    found = identify(args.weights)
    return (found if "unet" in found.parts or args.base is None else identify(args.base)).diffusion.prediction


def require_enough(args: argparse.Namespace, tell: bool) -> None:
    """Raises ValueError for fewer tries than one round: the begin, each number moved, one step."""
    numbers = args.steps * (2 if tell else 1)
    if args.tries < numbers + 2:
        raise ValueError(
            f"--tries: got {args.tries}, expected {numbers + 2} or more: {numbers} numbers are each moved before a step"
        )


# ---- what is printed -------------------------------------------------------------------------------


def of_all(verified: Mapping[tuple[str, str], list[float]]) -> str:
    """The best found beside the best fixed, over samplers; of samplers that take one evaluation a step alike."""

    def error(case: tuple[str, str]) -> float:
        return mean_error(verified[case])

    found = min((case for case in verified if case[1] == "found"), key=error)
    fixed = min((case for case in verified if case[1] != "found"), key=error)
    ratio, low, high = ratio_interval(verified[found], verified[fixed])
    return (
        f"of all: {found[0]} with the levels found, {error(found):.2e}, {ratio:.2f} x [{low:.2f}, {high:.2f}] beside "
        f"the best fixed, {' '.join(fixed)}, {error(fixed):.2e}"
    )


def _listed(timesteps: Sequence[float]) -> str:
    return ", ".join(f"{t:g}" for t in timesteps)
