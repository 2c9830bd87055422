"""Which swap steps are scored: the authors', or of trajectories of other steps those that are as early."""

from collections.abc import Sequence

from ldm.study.metrics.predictions import AVERAGED_SWAP_STEPS as AVERAGED
from ldm.traversal.plan import SWAP_STEPS

TRUTH = (5, 10, 15, 25, 35)  # of rendered patients
STEPS = 50  # of which these are   [authors' code]


def shares(swap_steps: Sequence[int], steps: int) -> tuple[int, ...]:
    """Swap steps of 50 for a run of fewer: 5, 10, 15 of 50 are 2, 4, 6 of 20. Where all fit: as they are."""
    if max(SWAP_STEPS) <= steps:
        return tuple(swap_steps)
    return tuple(sorted({max(1, round(s * steps / STEPS)) for s in swap_steps}))


def early(swap_steps: Sequence[int], steps: int) -> tuple[int, ...]:
    """What CFRT averages: the authors' where they are among the swap steps, else those up to 15 of 50, or the first."""
    if set(AVERAGED) <= set(swap_steps):
        return AVERAGED
    latest = max(AVERAGED) / STEPS * steps
    return tuple(sorted(s for s in swap_steps if s <= latest)) or (min(swap_steps),)
