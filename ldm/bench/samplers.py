"""Which sampler, which spacing, how many evaluations: errors against a converged reference, at equal evaluations.

The probability flow takes a noise to one image; samplers differ in how closely they follow it. So the same noises are
denoised by every sampler x spacing x guidance x number of evaluations, neutral and with the style's prompt swapped in
on the way, and compared with a run that is fine enough to stand for the flow itself:

    error           |x - x_ref| / |x_ref| of the neutral latent, the root mean square over seeds
    swap_error      the same of the swapped latent
    swap_cosine     between the swap directions (swapped - neutral): does a cheaper run find the same edit?
    swap_length     of the direction, as a share of the reference's
    ssim, lpips     of the neutral images, to the reference's

The swap is made at a noise level that the run visits, and the reference swaps at that level. Evaluations are those of
the neutral run; guidance doubles what each costs. Random samplers follow no flow: they are timed, checked and scored by
classifiers only. A spacing that begins elsewhere than at t = 999 pays for it in its error: the reference begins there.

Letters: B seeds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.bench.against import Eps, Peer, beside
from ldm.bench.rows import RowFile
from ldm.bench.sampler_statistics import SWAP_NEAR, directions, errors_by_seed, mean_error
from ldm.conditioning import constant
from ldm.files import complete
from ldm.images import from_uint8
from ldm.pipeline import StableDiffusion
from ldm.samplers import SAMPLERS, initial_noise
from ldm.schedule import EVEN_SPACINGS, SPACINGS, Schedule, log_snr
from ldm.study.evaluation.instruments import Instruments
from ldm.study.metrics import perceptual
from ldm.traversal.prompt_tree import Branch, TreeResult, traverse_tree

# What a default run has time for. Any other that is registered may be asked for.
COMPARED = ("ddim", "heun", "dpm_solver_pp_2m", "unipc")
COMPARED_SPACINGS = ("leading", "karras", "align_your_steps")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared, on which prompts."""

    neutral: str
    styles: Mapping[str, str]  # attribute -> prompt; the first is swapped in, all are for the CFRT
    seeds: tuple[int, ...] = (0, 1)
    guidances: tuple[float, ...] = (1.0, 3.0, 7.5)
    budgets: tuple[int, ...] = (10, 20)  # network evaluations of a run
    samplers: tuple[str, ...] = COMPARED
    spacings: tuple[str, ...] = COMPARED_SPACINGS
    reference_steps: int = 100

    def __post_init__(self) -> None:
        """Everything that can be wrong before a network is at hand."""
        if not self.styles or not self.seeds or not self.guidances:
            raise ValueError("styles, seeds, guidances: expected one or more of each")
        if not self.budgets or min(self.budgets) < 2:
            raise ValueError(f"evaluations: expected 2 or more, got {self.budgets}")
        for argument, names, known in (("samplers", self.samplers, SAMPLERS), ("spacings", self.spacings, SPACINGS)):
            if not names or set(names) - set(known):
                raise ValueError(f"{argument}: expected some of {', '.join(known)}, got {', '.join(names)}")
        if self.reference_steps < 2 * max(self.budgets):
            raise ValueError(
                f"reference steps: got {self.reference_steps}, expected at least {2 * max(self.budgets)}, twice the "
                "most evaluations"
            )

    def pairs(self) -> list[tuple[str, str]]:
        """Sampler and spacing, but for random samplers, and uneven timesteps where the sampler refuses them."""
        both = product([name for name in self.samplers if not SAMPLERS[name].random], self.spacings)
        return [(name, spacing) for name, spacing in both if not SAMPLERS[name].even or spacing in EVEN_SPACINGS]

    def runs(self) -> list[tuple[str, str, int]]:
        """Sampler, spacing and budget; few evaluations first, so that the first rows come soon."""
        return [(*pair, budget) for budget, pair in product(sorted(self.budgets), self.pairs())]


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

    def neutral_eps(self, guidance: float) -> Eps:
        """What the network says under the neutral prompt."""
        contexts = self.contexts["neutral"].expand(len(self.comparison.seeds), -1, -1)
        guided = self.sd.guided(constant(contexts, 1), guidance, self.empty)
        return lambda x_t, t: guided(x_t, t, 0)

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


def swap_timestep(spacing: str, schedule: Schedule, timesteps: Sequence[float] | None = None) -> float:
    """The timestep nearest to `SWAP_NEAR` that a spacing's runs of 5 steps, and so of most multiples of 5, visit.

    Where the given timesteps do not visit it, the nearest that they do.
    """
    common = min(SPACINGS[spacing](5, schedule), key=lambda t: abs(t - SWAP_NEAR))
    if timesteps is None or any(abs(t - common) <= 0.5 for t in timesteps):
        return common
    return min(timesteps, key=lambda t: abs(t - SWAP_NEAR))


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


def swaps(comparison: Comparison, schedule: Schedule) -> dict[str, float]:
    """Every level that a run swaps at, by name."""
    levels = {spacing: swap_timestep(spacing, schedule) for spacing in comparison.spacings}
    for sampler, spacing, budget in comparison.runs():
        t = swap_timestep(spacing, schedule, SPACINGS[spacing](SAMPLERS[sampler].steps_within(budget), schedule))
        levels |= {_level_name(t): t} if t != levels[spacing] else {}
    return levels


def _level_name(t: float) -> str:
    return f"t{t:.3f}"


def reference(bench: Bench, guidance: float, steps: int) -> dict[str, Tensor]:
    """Where the flow takes the seeds: "neutral" and, swapped at its level, every spacing -> (B, C, H, W).

    A run that does not visit its spacing's level has one of its own, named t and the timestep.
    """
    levels = swaps(bench.comparison, bench.sd.schedule)
    timesteps = reference_timesteps(steps, bench.sd.schedule, sorted(set(levels.values())))
    style = next(iter(bench.comparison.styles))
    forks = {name: (style, fork_step(timesteps, t)) for name, t in levels.items()}
    return bench.traverse("unipc", timesteps, forks, guidance, bench.comparison.seeds).latents


def convergence(exact: Mapping[str, Tensor], coarse: Mapping[str, Tensor]) -> dict[str, float]:
    """How far a reference is from one of half as many steps: the floor, below which errors say nothing."""
    distances = {name: relative_error(coarse[name], exact[name]) for name in exact}
    swapped = max(error for name, error in distances.items() if name != "neutral")
    return {"half_steps_error": distances["neutral"], "half_steps_swap_error": swapped}


def relative_error(x: Tensor, exact: Tensor) -> float:
    """|x - exact| / |exact|, the root mean square over seeds."""
    return mean_error(errors_by_seed(x, exact))


# ---- errors ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Yardstick:
    """What runs are measured by: where the flow ends, and how its images look."""

    bench: Bench
    guidance: float
    exact: Mapping[str, Tensor]  # see `reference`
    lpips: perceptual.Lpips | perceptual.Unavailable
    images: bool = True
    peer: Peer | None = None  # another library, whose run is measured beside each

    @cached_property
    def instruments(self) -> Instruments:
        """What decodes."""
        return Instruments(self.bench.sd, None, None, self.lpips)

    @cached_property
    def pictures(self) -> Tensor:
        """The reference's neutral images, (B, 3, H, W)."""
        return from_uint8(self.instruments.pixels(self.exact["neutral"]))

    def similarity(self, latents: Tensor) -> dict[str, list[float]]:
        """SSIM and, where its weights are, LPIPS of every seed's image to the reference's."""
        if not self.images:
            return {}
        pictures = from_uint8(self.instruments.pixels(latents))
        found = {"ssim": perceptual.ssim(pictures, self.pictures).tolist()}
        if isinstance(self.lpips, perceptual.Lpips):
            found["lpips"] = self.lpips(pictures, self.pictures).tolist()
        return found


def measure(yardstick: Yardstick, sampler: str, spacing: str, budget: int) -> dict[str, Any]:
    """One run against the reference; see the head of this file. `refused` says why where the two do not fit."""
    bench = yardstick.bench
    schedule, steps = bench.sd.schedule, SAMPLERS[sampler].steps_within(budget)
    style = next(iter(bench.comparison.styles))
    began = time.perf_counter()
    try:
        timesteps = SPACINGS[spacing](steps, schedule)
        at = swap_timestep(spacing, schedule, timesteps)
        forks = {"swapped": (style, fork_step(timesteps, at))}
        latents = bench.traverse(sampler, timesteps, forks, yardstick.guidance, bench.comparison.seeds).latents
    except ValueError as error:
        return {"steps": steps, "refused": str(error)}
    seconds = time.perf_counter() - began
    neutral, exact = latents["neutral"], yardstick.exact
    true = exact[spacing if at == swap_timestep(spacing, schedule) else _level_name(at)]
    cosines, lengths = directions(latents["swapped"], neutral, true - exact["neutral"])
    by_seed = {
        "error": errors_by_seed(neutral, exact["neutral"]),
        "swap_error": errors_by_seed(latents["swapped"], true),
        "swap_cosine": cosines,
        **yardstick.similarity(neutral),
    }
    return {
        "steps": steps,
        "evaluations": SAMPLERS[sampler].evaluations_of(steps),
        "error": mean_error(by_seed["error"]),
        "swap_error": mean_error(by_seed["swap_error"]),
        "swap_cosine": _mean(cosines),
        "swap_length": _mean(lengths),
        **{name: _mean(by_seed[name]) for name in ("ssim", "lpips") if name in by_seed},
        **_beside(yardstick, (sampler, spacing, timesteps), neutral),
        "seconds": round(seconds, 3),
        "by_seed": by_seed,
    }


def _beside(yardstick: Yardstick, case: tuple[str, str, Sequence[float]], ours: Tensor) -> dict[str, Any]:
    """The peer's run, if one is asked for."""
    if yardstick.peer is None:
        return {}
    bench = yardstick.bench
    x_T = initial_noise(bench.comparison.seeds, bench.sd.latent_shape).to(bench.sd.device)
    eps = bench.neutral_eps(yardstick.guidance)
    return beside(yardstick.peer, eps, x_T, bench.sd.schedule, case, ours, yardstick.exact["neutral"])


def compare(
    bench: Bench,
    file: RowFile,
    lpips: perceptual.Lpips | perceptual.Unavailable,
    images: bool = True,
    peer: Peer | None = None,
) -> Iterator[dict[str, Any]]:
    """The row of every guidance x run as it comes, and last of each guidance that of its reference.

    What the file holds is not run again. The reference's latents are kept beside it, and deleted with the last row.
    """
    comparison = bench.comparison
    for guidance in comparison.guidances:
        kept = file.path.with_name(f"reference_{guidance:g}.safetensors")
        yardstick = None
        for sampler, spacing, budget in comparison.runs():
            name = {"part": "run", "guidance": guidance, "sampler": sampler, "spacing": spacing, "budget": budget}
            if name not in file:
                yardstick = yardstick or Yardstick(
                    bench, guidance, kept_reference(bench, guidance, kept), lpips, images, peer
                )
                file.add({**name, **measure(yardstick, sampler, spacing, budget)})
            yield file[name]
        name = {"part": "reference", "guidance": guidance}
        if name not in file:
            coarse = reference(bench, guidance, comparison.reference_steps // 2)
            distances = convergence(kept_reference(bench, guidance, kept), coarse)
            file.add({**name, "steps": comparison.reference_steps, **distances})
        yield file[name]
        kept.unlink(missing_ok=True)


def kept_reference(bench: Bench, guidance: float, path: Path) -> dict[str, Tensor]:
    """The reference, computed where its file is not there."""
    if not path.exists():
        exact = reference(bench, guidance, bench.comparison.reference_steps)
        with complete(path) as partial_file:
            save_file({name: latents.contiguous().clone() for name, latents in exact.items()}, partial_file)
    return {name: latents.to(bench.sd.device) for name, latents in load_file(path).items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# ---- what it will cost -----------------------------------------------------------------------------


def rows_of(comparison: Comparison, schedule: Schedule, runs: Sequence[tuple[float, str, str, int]]) -> float:
    """U-Net rows of some runs (guidance, sampler, spacing, budget), and of the references that they need.

    A reference is run again with half the steps; a branch that leaves near `SWAP_NEAR` takes about 0.6 of them.
    """
    each, forks = len(comparison.seeds), len(swaps(comparison, schedule))
    sides = {guidance: 1 if guidance == 1 else 2 for guidance in comparison.guidances}
    references = sum(1.5 * comparison.reference_steps * (1 + 0.6 * forks) * sides[g] for g in {run[0] for run in runs})
    return each * (references + sum(1.6 * budget * sides[g] for g, _, _, budget in runs))


def seconds_a_row(bench: Bench) -> float:
    """How long a U-Net row takes now, by two short calls of this machine as it is."""
    x = initial_noise([0] * 4, bench.sd.latent_shape).to(bench.sd.device)
    context = bench.contexts["neutral"].expand(4, -1, -1)
    with torch.no_grad():
        bench.sd.unet(x.to(bench.sd.dtype), 500, context)
        began = time.perf_counter()
        bench.sd.unet(x.to(bench.sd.dtype), 500, context)
    return (time.perf_counter() - began) / 4
