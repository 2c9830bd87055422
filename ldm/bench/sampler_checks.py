"""Is a sampler's run the same twice and in any batch, and how long does an evaluation take beside ddim's?

On the network that is compared on, by short runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.bench.harness import Timing, time_in_turn
from ldm.bench.samplers import Bench, relative_error
from ldm.samplers import SAMPLERS

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
    """Is a run the same when it is run again, and whatever is in the batch? The samplers that are compared.

    batch_error: how far a seed's latent moves with the batch; 0 with one latent a call of the network, which
    `batch_invariant` says, and the last bits of the network's precision otherwise.
    """
    rows = []
    seeds = (0, 1)
    singly = Bench(replace(bench.sd, max_batch=1), bench.comparison)
    for name in tqdm(bench.comparison.samplers, desc="checks", unit="sampler", mininterval=1):
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
    if {"ddim", "euler"} <= set(bench.comparison.samplers):
        apart = relative_error(*(run_alone(bench, name, seeds) for name in ("euler", "ddim")))
        if apart > (1e-3 if bench.sd.dtype == torch.float32 else 0.1):
            raise ValueError(f"euler: {apart:.2g} away from ddim, whose step it takes; expected roundings only")
    if not all(row["repeatable"] for row in rows):
        raise ValueError(f"samplers: not the same twice: {[r['sampler'] for r in rows if not r['repeatable']]}")
    return rows


def timings(bench: Bench, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds an evaluation of the samplers compared, as a ratio to ddim in the same rounds, and their memory."""
    names = dict.fromkeys(("ddim", *bench.comparison.samplers))
    calls = {name: partial(run_alone, bench, name, bench.comparison.seeds) for name in names}
    timed: dict[str, Timing] = time_in_turn(calls, rounds, label="timing")
    table = {}
    for name, timing in timed.items():
        asked = SAMPLERS[name].evaluations_of(CHECKED_STEPS)
        table[name] = {
            "ms_per_evaluation": timing.median_ms / asked,
            "p20_ms": timing.p20_ms / asked,
            "p80_ms": timing.p80_ms / asked,
            "ratio_to_ddim": timing.ratio * asked / CHECKED_STEPS,
            "latents_remembered": SAMPLERS[name].memory,
        }
    return table
