"""What classifiers see of a sampler: the rate at which a swapped prompt flips what they say.

Random samplers too, which follow no flow and have no error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ldm.bench.sampler_statistics import best_spacing
from ldm.bench.samplers import Bench, Comparison
from ldm.samplers import SAMPLERS
from ldm.schedule import SPACINGS
from ldm.study.evaluation.instruments import Instruments
from ldm.study.metrics.cfrt import cfrt


def flip_cases(comparison: Comparison, rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, int]]:
    """What CFRT is measured of: the published ddim, leading, 50 steps, and every sampler at the smallest budget."""
    budget, guidance = min(comparison.budgets), comparison.guidances[-1]
    best = [
        (name, best_spacing(rows, name, budget, guidance), SAMPLERS[name].steps_within(budget))
        for name in comparison.samplers
    ]
    return [("ddim", "leading", 50), *best]


def flip_rate(
    bench: Bench, instruments: Instruments, case: tuple[str, str, int], seeds: Sequence[int]
) -> dict[str, Any]:
    """CFRT of a sampler, spacing and number of steps; all styles swapped in after a fifth of the steps."""
    comparison, (sampler, spacing, steps) = bench.comparison, case
    styles = tuple(comparison.styles)
    heads = instruments.heads(styles, "melanoma")
    columns = [instruments.attributes.index(name) for name in heads]
    forks = {style: (style, steps // 5) for style in styles}
    timesteps = SPACINGS[spacing](steps, bench.sd.schedule)
    latents = bench.traverse(sampler, timesteps, forks, comparison.guidances[-1], seeds).latents
    probabilities = [instruments.probabilities(instruments.pixels(latents[name])) for name in ("neutral", *styles)]
    neutral, *swapped = (rates.numpy()[:, columns] for rates in probabilities)
    report = cfrt(neutral, np.stack(swapped, axis=1)[:, :, None], heads, styles)
    return {
        "evaluations": SAMPLERS[sampler].evaluations_of(steps),
        "seeds": len(seeds),
        "cfrt": {style: report[style]["cfrt"]["own_head_signed"]["value"] for style in styles},
        "target_change": {style: report[style]["target_change"]["value"] for style in styles},
    }
