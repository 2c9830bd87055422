"""Another library's samplers beside ours, on the same network. What imports it is in ldm_tools/bench/peers.py."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ldm.bench.sampler_statistics import errors_by_seed, mean_error
from ldm.samplers.driver import final_level
from ldm.schedule import Schedule

Eps = Callable[[Tensor, float], Tensor]
"""eps = eps(x_t, t)"""


class PeerRun(NamedTuple):
    """Where a peer's run ends."""

    latents: Tensor  # as ours: variance preserving
    clean: bool  # without noise; else where ours do, at t = 0


class Peer(Protocol):
    """A library's samplers by our names; None where it has no such sampler or spacing."""

    name: str  # with its version

    def __call__(
        self, eps: Eps, x_T: Tensor, schedule: Schedule, sampler: str, spacing: str, timesteps: Sequence[float]
    ) -> PeerRun | None: ...


def beside(peer: Peer, eps: Eps, x_T: Tensor, schedule: Schedule, case: tuple[str, str, Sequence[float]],
           ours: Tensor, exact: Tensor) -> dict[str, Any]:  # fmt: skip
    """The peer's error, how far it is from ours, and its evaluations; {} where it has no such run.

    Where the peer ends without noise, ours and the exact latent are taken there by one step from t = 0.
    `peer_refused`: what it raised, or that its latents are not finite.
    """
    asked = [0]

    def counted(x_t: Tensor, t: float) -> Tensor:
        asked[0] += 1
        return eps(x_t, int(t) if t == int(t) else t)

    began = time.perf_counter()
    try:
        with torch.no_grad():
            run = peer(counted, x_T, schedule, *case)
    except Exception as error:
        return {"peer_refused": f"{type(error).__name__}: {error}".splitlines()[0]}
    if run is None:
        return {}
    if not run.latents.isfinite().all():
        return {"peer_refused": "its latents are not finite"}
    seconds, evaluations = time.perf_counter() - began, asked[0]
    if run.clean:
        with torch.no_grad():
            ours, exact = (_without_noise(eps, latents, schedule) for latents in (ours, exact))
    return {
        "peer_error": mean_error(errors_by_seed(run.latents, exact)),
        "peer_apart": mean_error(errors_by_seed(ours, run.latents)),
        "peer_evaluations": evaluations,
        "peer_seconds": round(seconds, 3),
    }


def _without_noise(eps: Eps, latents: Tensor, schedule: Schedule) -> Tensor:
    end = final_level(schedule)
    if end.std == 0:
        return latents
    return (latents - end.std * eps(latents, end.t)) / math.sqrt(end.alphas_cumprod)
