"""`ldm bench samplers --optimise spacing`: levels for a few steps, found by search, and held to seeds it has not seen.

ldm bench samplers --optimise spacing --steps 10 --samplers unipc --out out/levels
ldm generate --prompt PROMPT --steps 10 --sampler unipc --spacing out/levels/unipc_10.json --out out/ten
"""

import argparse
import math
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from ldm.bench import samplers, spacing_search
from ldm.bench.sampler_statistics import errors_by_seed, mean_error, ratio_interval
from ldm.files import write_json
from ldm.samplers import SAMPLERS
from ldm.schedule import Schedule, log_snr
from ldm.traversal.plan import parse_integers

FIRST_TRAINING_SEED = 1_000_000  # those that levels are chosen by; --seeds are those that they are held to


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options to `parser`."""
    parser.add_argument(
        "--optimise",
        choices=("spacing",),
        help="choose the levels of --steps steps for one of --samplers (default: unipc), on the known flow and on "
        "the network at the first --guidance (default: 1), hold them to --seeds (default: 0-7), and write "
        "SAMPLER_STEPS.json, which --spacing takes; with --known-flow without a network",
    )
    parser.add_argument("--steps", type=int, default=10, help="of the run to optimise (default: %(default)s)")
    parser.add_argument("--tries", type=int, default=200, help="runs of all seeds in the search (default: %(default)s)")


def run(args: argparse.Namespace, bench: samplers.Bench | None) -> None:
    """Raises ValueError for options that do not fit."""
    name = args.samplers or "unipc"
    if name not in SAMPLERS or SAMPLERS[name].random or SAMPLERS[name].even:
        raise ValueError(
            f"--samplers: got {name!r}, expected one sampler that follows the flow and takes uneven timesteps"
        )
    if not 2 <= args.steps <= 100 or args.tries < 1:
        raise ValueError(f"--steps, --tries: expected 2..100 and 1 or more, got {args.steps} and {args.tries}")
    schedule = Schedule.sd15() if bench is None else bench.sd.schedule
    on_flow = spacing_search.on_known_flow(SAMPLERS[name], args.steps)
    print(f"on the known flow: error {on_flow.error:.2e} after {on_flow.tried} runs", flush=True)
    candidates = {**spacing_search.fixed(SAMPLERS[name], args.steps, schedule), "known flow": on_flow.timesteps}
    content: dict[str, Any] = {"steps": args.steps, "timesteps": list(on_flow.timesteps), "sampler": name}
    if bench is not None:
        content |= on_checkpoint(args, bench, name, candidates)
    path = args.out / f"{name}_{args.steps}.json"
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(path, content)
    print(f"timesteps {', '.join(f'{t:g}' for t in content['timesteps'])}; see {path}, which --spacing takes")


def on_checkpoint(
    args: argparse.Namespace, bench: samplers.Bench, name: str, candidates: Mapping[str, tuple[float, ...]]
) -> dict[str, Any]:
    """Search from the best candidate, hold all to unseen seeds, print what came of it; for the file."""
    guidance, schedule = bench.comparison.guidances[0], bench.sd.schedule
    held = parse_integers(args.seeds or "0-7", "--seeds")
    training = tuple(range(FIRST_TRAINING_SEED, FIRST_TRAINING_SEED + len(held)))
    rows = len(held) * (1 if guidance == 1 else 2)
    rows *= 2 * args.reference_steps + args.steps * SAMPLERS[name].evaluations * (2 * len(candidates) + args.tries + 1)
    print(
        f"{rows} U-Net rows: about {rows * samplers.seconds_a_row(bench) / 60:.1f} minutes at this moment's speed",
        flush=True,
    )
    fine = log_snr(args.reference_steps, schedule)
    exact = {seeds: bench.traverse("unipc", fine, {}, guidance, seeds).latents["neutral"] for seeds in (training, held)}

    def errors(timesteps: tuple[float, ...], seeds: tuple[int, ...]) -> list[float]:
        latents = bench.traverse(name, timesteps, {}, guidance, seeds).latents["neutral"]
        return errors_by_seed(latents, exact[seeds])

    def objective(timesteps: tuple[float, ...]) -> float:
        found = [math.log(error) for error in errors(timesteps, training)]  # so that no one seed decides
        return math.exp(sum(found) / len(found))

    with tqdm(total=len(candidates) + args.tries, desc="search", unit="run", mininterval=1) as bar:

        def tried(timesteps: tuple[float, ...]) -> float:
            bar.update()
            return objective(timesteps)

        trained, best = spacing_search.refine(tried, candidates, schedule, args.tries)
    verified = {
        spacing: errors(timesteps, held) for spacing, timesteps in {**candidates, "found": best.timesteps}.items()
    }
    fixed = min((spacing for spacing in trained if spacing != "known flow"), key=lambda s: mean_error(verified[s]))
    ratio, low, high = ratio_interval(verified["found"], verified[fixed])
    print(f"{'spacing':20}{'chosen by':>12}{'held to':>12}   {name}, {args.steps} steps, guidance {guidance:g}")
    for spacing, found in sorted(verified.items(), key=lambda item: mean_error(item[1])):
        print(f"{spacing:20}{trained.get(spacing, best.error):12.2e}{mean_error(found):12.2e}")
    told = "smaller than" if low > 1 else "(no gain) beside"
    print(f"on {len(held)} unseen seeds {ratio:.2f} x [{low:.2f}, {high:.2f}] {told} the best fixed one, {fixed}")
    return {
        "timesteps": list(best.timesteps),
        "guidance": guidance,
        "weights_sha256": bench.sd.weights_sha256(),
        "seeds": list(held),
        "errors": {spacing: mean_error(found) for spacing, found in verified.items()},
        "best_fixed": fixed,
        "times_smaller": {"value": ratio, "low": low, "high": high},
    }
