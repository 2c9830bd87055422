"""Which sampler, which spacing, how many evaluations: errors against a converged reference, at equal evaluations.

The probability flow takes a noise to one image; samplers differ in how closely they follow it. So the same noises are
denoised by every sampler x spacing x guidance x number of evaluations, neutral and with the style's prompt swapped in
on the way, and compared with a run that is fine enough to stand for the flow itself:

    error           |x - x_ref| / |x_ref| of the neutral latent, the root mean square over seeds
    swap_error      the same of the swapped latent
    swap_cosine     between the swap directions (swapped - neutral): does a cheaper run find the same edit?
    swap_length     of the direction, as a share of the reference's

For every spacing the swap is made at a noise level that all of its runs visit, and the reference swaps at that level.
Evaluations are the neutral run's; guidance doubles what each costs. Random samplers follow no flow: they are timed,
checked and scored by classifiers only.

Letters: B seeds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ldm.bench.harness import Timing, time_in_turn
from ldm.pipeline import StableDiffusion
from ldm.samplers import SAMPLERS, initial_noise
from ldm.schedule import EVEN_SPACINGS, SPACINGS, Schedule, log_snr
from ldm.study.evaluation.instruments import Instruments
from ldm.study.metrics.cfrt import cfrt
from ldm.traversal.prompt_tree import Branch, TreeResult, traverse_tree

# euler is left out: it is ddim in other letters, which `check` verifies on the network at hand.
RANDOM = tuple(name for name, sampler in SAMPLERS.items() if sampler.random)
COMPARED = tuple(name for name in SAMPLERS if name not in (*RANDOM, "euler"))
COMPARED_SPACINGS = ("leading", "trailing", "karras", "align_your_steps")  # others on request: five minutes must do
SWAP_NEAR = 600  # the timestep that swaps are made near to


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared, on which prompts."""

    neutral: str
    styles: Mapping[str, str]  # attribute -> prompt; the first is swapped in, all are for the CFRT
    seeds: tuple[int, ...] = (0,)
    guidances: tuple[float, ...] = (1.0, 3.0)
    budgets: tuple[int, ...] = (10, 20, 40)  # network evaluations of a run
    samplers: tuple[str, ...] = COMPARED
    spacings: tuple[str, ...] = COMPARED_SPACINGS
    reference_steps: int = 150

    def __post_init__(self) -> None:
        """Everything that can be wrong before a network is at hand."""
        if not self.styles or not self.seeds or not self.guidances:
            raise ValueError("styles, seeds, guidances: expected one or more of each")
        if not self.budgets or any(budget < 10 or budget % 10 for budget in self.budgets):
            raise ValueError(f"evaluations: expected multiples of 10, so that all visit the swap, got {self.budgets}")
        for argument, names, known in (
            ("samplers", self.samplers, [name for name in SAMPLERS if name not in RANDOM]),
            ("spacings", self.spacings, list(SPACINGS)),
        ):
            if not names or set(names) - set(known):
                raise ValueError(f"{argument}: expected some of {', '.join(known)}, got {', '.join(names)}")
        if self.reference_steps < 2 * max(self.budgets):
            raise ValueError(
                f"reference steps: got {self.reference_steps}, expected at least {2 * max(self.budgets)}, twice the "
                "most evaluations"
            )

    def pairs(self) -> list[tuple[str, str]]:
        """Sampler and spacing, but for uneven timesteps where the sampler refuses them."""
        both = product(self.samplers, self.spacings)
        return [(name, spacing) for name, spacing in both if not SAMPLERS[name].even or spacing in EVEN_SPACINGS]


@dataclass(frozen=True, eq=False)
class Bench:
    """A model with the prompts of a comparison."""

    sd: StableDiffusion
    comparison: Comparison

    @cached_property
    def contexts(self) -> dict[str, Tensor]:
        """ "neutral" and every style -> (1, L, D)."""
        prompts = {"neutral": self.comparison.neutral, **self.comparison.styles}
        return dict(zip(prompts, self.sd.encode_prompts(list(prompts.values()))[:, None], strict=True))

    @cached_property
    def empty(self) -> Tensor:
        """The context that guidance pushes away from."""
        return self.sd.encode_prompts([""])

    def traverse(
        self,
        sampler: str,
        timesteps: Sequence[float],
        forks: Mapping[str, tuple[str, int]],
        guidance: float,
        seeds: Sequence[int],
    ) -> TreeResult:
        """The neutral path, and branches that leave it: name -> style and step."""
        children = tuple(Branch(name, self.contexts[style], at) for name, (style, at) in forks.items())
        sample = partial(
            self.sd.sample, guidance_scale=guidance, negative=self.empty, sampler=sampler, spacing=timesteps
        )
        tree = Branch("neutral", self.contexts["neutral"], children=children)
        return traverse_tree(sample, initial_noise(seeds, self.sd.latent_shape), tree, seeds, len(timesteps))


# ---- the reference ---------------------------------------------------------------------------------


def swap_timestep(spacing: str, schedule: Schedule) -> float:
    """The timestep nearest to `SWAP_NEAR` that a spacing's runs of 5 steps, and so of all multiples of 5, visit."""
    return min(SPACINGS[spacing](5, schedule), key=lambda t: abs(t - SWAP_NEAR))


def fork_step(timesteps: Sequence[float], t: float) -> int:
    """How many steps are taken before the level of t is met."""
    at = min(range(len(timesteps)), key=lambda i: abs(timesteps[i] - t))
    if abs(timesteps[at] - t) > 0.5:
        raise ValueError(f"timesteps: none of {len(timesteps)} is the swap's {t:g}; expected a multiple of 5 of them")
    return at


def reference_timesteps(steps: int, schedule: Schedule, through: Sequence[float]) -> tuple[float, ...]:
    """Even strides in lambda that also visit some timesteps exactly, instead of what lies within half a stride."""
    stride = (log_snr_at(schedule, 0) - log_snr_at(schedule, 999)) / steps

    def far(t: float) -> bool:
        return all(abs(log_snr_at(schedule, t) - log_snr_at(schedule, other)) > stride / 2 for other in through)

    return tuple(sorted({*through, *filter(far, log_snr(steps, schedule))}, reverse=True))


def log_snr_at(schedule: Schedule, t: float) -> float:
    """lambda of any timestep."""
    a_t = schedule.alphas_cumprod_at(t)
    return 0.5 * math.log(a_t / (1 - a_t))


def reference(bench: Bench, guidance: float, steps: int) -> dict[str, Tensor]:
    """Where the flow takes the seeds: "neutral" and, swapped at its level, every spacing -> (B, C, H, W)."""
    comparison, schedule = bench.comparison, bench.sd.schedule
    swaps = {spacing: swap_timestep(spacing, schedule) for spacing in comparison.spacings}
    timesteps = reference_timesteps(steps, schedule, sorted(set(swaps.values())))
    style = next(iter(comparison.styles))
    forks = {spacing: (style, fork_step(timesteps, t)) for spacing, t in swaps.items()}
    return bench.traverse("unipc", timesteps, forks, guidance, comparison.seeds).latents


def relative_error(x: Tensor, exact: Tensor) -> float:
    """|x - exact| / |exact|, the root mean square over seeds."""
    ratio = (x - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    return float(ratio.square().mean().sqrt())


# ---- errors ----------------------------------------------------------------------------------------


def compare(bench: Bench) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Every sampler x spacing x guidance x budget.

    Returns: the rows, and for each guidance how far the reference is from one of half as many steps.
    """
    comparison = bench.comparison
    rows, convergence = [], []
    runs = list(product(comparison.guidances, comparison.pairs(), comparison.budgets))
    with tqdm(total=len(runs), desc="samplers", unit="run", mininterval=1) as bar:
        for guidance in comparison.guidances:
            bar.set_postfix_str(f"guidance {guidance:g}: reference")
            exact, coarse = (reference(bench, guidance, comparison.reference_steps // k) for k in (1, 2))
            distances = {name: relative_error(coarse[name], exact[name]) for name in exact}
            convergence.append(
                {
                    "guidance": guidance,
                    "steps": comparison.reference_steps,
                    "half_steps_error": distances["neutral"],
                    "half_steps_swap_error": max(error for name, error in distances.items() if name != "neutral"),
                }
            )
            for (sampler, spacing), budget in product(comparison.pairs(), comparison.budgets):
                bar.set_postfix_str(f"guidance {guidance:g}: {sampler}, {spacing}")
                rows.append(measure(bench, sampler, spacing, budget, guidance, exact))
                bar.update()
    return rows, convergence


def measure(
    bench: Bench, sampler: str, spacing: str, budget: int, guidance: float, exact: Mapping[str, Tensor]
) -> dict[str, Any]:
    """One run against the reference; see the head of this file."""
    comparison, schedule = bench.comparison, bench.sd.schedule
    steps = steps_for(sampler, budget)
    timesteps = SPACINGS[spacing](steps, schedule)
    style = next(iter(comparison.styles))
    forks = {"swapped": (style, fork_step(timesteps, swap_timestep(spacing, schedule)))}
    began = time.perf_counter()
    latents = bench.traverse(sampler, timesteps, forks, guidance, comparison.seeds).latents
    seconds = time.perf_counter() - began
    direction = (latents["swapped"] - latents["neutral"]).flatten(1)
    true = (exact[spacing] - exact["neutral"]).flatten(1)
    return {
        "guidance": guidance,
        "sampler": sampler,
        "spacing": spacing,
        "budget": budget,
        "steps": steps,
        "evaluations": SAMPLERS[sampler].evaluations_of(steps),
        "error": relative_error(latents["neutral"], exact["neutral"]),
        "swap_error": relative_error(latents["swapped"], exact[spacing]),
        "swap_cosine": float(F.cosine_similarity(direction, true, dim=1).mean()),
        "swap_length": float((direction.norm(dim=1) / true.norm(dim=1)).mean()),
        "seconds": round(seconds, 3),
    }


def steps_for(sampler: str, budget: int) -> int:
    """How many steps a number of evaluations is good for; plms takes one evaluation more than it has steps."""
    return budget // SAMPLERS[sampler].evaluations


def slopes(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The observed order of every guidance x sampler x spacing: least squares of log error on log evaluations."""
    orders = []
    for guidance, sampler, spacing in dict.fromkeys((row["guidance"], row["sampler"], row["spacing"]) for row in rows):
        runs = [r for r in rows if (r["guidance"], r["sampler"], r["spacing"]) == (guidance, sampler, spacing)]
        if len(runs) > 1:
            logs = [[math.log(row[name]) for row in runs] for name in ("evaluations", "error", "swap_error")]
            order, swap_order = (-float(np.polyfit(logs[0], logs[k], 1)[0]) for k in (1, 2))
            orders.append(
                {"guidance": guidance, "sampler": sampler, "spacing": spacing, "order": order, "swap_order": swap_order}
            )
    return orders


def best_spacing(rows: Sequence[Mapping[str, Any]], sampler: str, budget: int, guidance: float) -> str:
    """The spacing with the smallest error; "trailing" for a sampler that has none."""
    runs = [r for r in rows if (r["sampler"], r["budget"], r["guidance"]) == (sampler, budget, guidance)]
    return min(runs, key=lambda row: row["error"])["spacing"] if runs else "trailing"


# ---- what the classifiers see ----------------------------------------------------------------------


def flip_rates(
    bench: Bench, instruments: Instruments, rows: Sequence[Mapping[str, Any]], budget: int, seeds: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """CFRT of every sampler at one budget, each at its best spacing, all styles swapped in after a fifth of the steps.

    Beside them what the traversal is published with: ddim, leading, 50 steps.
    """
    comparison = bench.comparison
    guidance, styles = comparison.guidances[-1], tuple(comparison.styles)
    heads = instruments.heads(styles, "melanoma")
    columns = [instruments.attributes.index(name) for name in heads]
    cases = [("ddim", "leading", 50)]
    cases += [
        (name, best_spacing(rows, name, budget, guidance), steps_for(name, budget))
        for name in (*comparison.samplers, *RANDOM)
    ]
    for sampler, spacing, steps in tqdm(cases, desc="CFRT", unit="sampler", mininterval=1):
        forks = {style: (style, steps // 5) for style in styles}
        timesteps = SPACINGS[spacing](steps, bench.sd.schedule)
        latents = bench.traverse(sampler, timesteps, forks, guidance, seeds).latents
        probabilities = [instruments.probabilities(instruments.pixels(latents[name])) for name in ("neutral", *styles)]
        neutral, *swapped = (rates.numpy()[:, columns] for rates in probabilities)
        report = cfrt(neutral, np.stack(swapped, axis=1)[:, :, None], heads, styles)
        yield {
            "sampler": sampler,
            "spacing": spacing,
            "evaluations": SAMPLERS[sampler].evaluations_of(steps),
            "seeds": len(seeds),
            "cfrt": {style: report[style]["cfrt"]["own_head_signed"]["value"] for style in styles},
            "target_change": {style: report[style]["target_change"]["value"] for style in styles},
        }


# ---- checks and timing -----------------------------------------------------------------------------

CHECKED_STEPS = 3


def run_alone(bench: Bench, sampler: str, seeds: Sequence[int]) -> Tensor:
    """A short neutral run at the last guidance -> (B, C, H, W)."""
    *_, last = bench.sd.sample(
        bench.contexts["neutral"],
        seeds,
        steps=CHECKED_STEPS,
        guidance_scale=bench.comparison.guidances[-1],
        negative=bench.empty,
        sampler=sampler,
        spacing="trailing",
    )
    return last.x_prev


def check(bench: Bench) -> list[dict[str, Any]]:
    """Is a run the same when it is run again, and whatever is in the batch? Every sampler, on the network at hand.

    batch_error: how far a seed's latent moves with the batch; 0 with one latent a call of the network, which
    `batch_invariant` says, and the last bits of the network's precision otherwise.
    """
    rows = []
    seeds = (0, 1)
    singly = Bench(replace(bench.sd, max_batch=1), bench.comparison)
    for name in tqdm(SAMPLERS, desc="checks", unit="sampler", mininterval=1):
        together, again = (run_alone(bench, name, seeds) for _ in range(2))
        one_a_call, alone = run_alone(singly, name, seeds), run_alone(singly, name, seeds[1:2])
        rows.append(
            {
                "sampler": name,
                "repeatable": torch.equal(together, again),
                "batch_invariant": torch.equal(one_a_call[1:2], alone),
                "batch_error": relative_error(together[1:2], alone),
            }
        )
    ddim, euler = (run_alone(bench, name, seeds) for name in ("ddim", "euler"))
    if (apart := relative_error(euler, ddim)) > (1e-3 if bench.sd.dtype == torch.float32 else 0.1):
        raise ValueError(f"euler: {apart:.2g} away from ddim, whose step it takes; expected roundings only")
    if not all(row["repeatable"] for row in rows):
        raise ValueError(f"samplers: not the same twice: {[r['sampler'] for r in rows if not r['repeatable']]}")
    return rows


def timings(bench: Bench, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds an evaluation of every sampler, as a ratio to ddim in the same rounds, and what it remembers."""
    calls = {name: partial(run_alone, bench, name, bench.comparison.seeds) for name in SAMPLERS}
    timed: dict[str, Timing] = time_in_turn(calls, rounds, label="timing")
    table = {}
    for name, timing in timed.items():
        asked = SAMPLERS[name].evaluations_of(CHECKED_STEPS)
        base = asdict(timing)
        table[name] = {
            "ms_per_evaluation": timing.median_ms / asked,
            "p20_ms": base["p20_ms"] / asked,
            "p80_ms": base["p80_ms"] / asked,
            "ratio_to_ddim": timing.ratio * asked / CHECKED_STEPS,
            "latents_remembered": SAMPLERS[name].memory,
        }
    return table
