"""One HTML page of a comparison of samplers, without anything from outside: paths, chart, every run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.bench import known_flow
from ldm.bench.known_flow import KnownFlow, Mixture, Question

COLUMNS = (
    *("guidance", "sampler", "spacing", "evaluations", "steps", "error", "step_error", "start_error", "swap_error"),
    *("swap_cosine", "swap_length", "ssim", "lpips", "distance", "peer_error", "peer_apart", "peer_evaluations"),
    *("peer_refused", "seconds", "refused"),
)


def page(
    what: str,
    rows: Sequence[Mapping[str, Any]],
    paths: Mapping[str, Any] | None = None,
    floor: Mapping[float, float] | None = None,
) -> str:
    """The page.

    Args:    what: a sentence on what was compared.  rows: one a run.  paths: see `plane`.
             floor: guidance -> the reference's own error.
    """
    shown = [{name: value for name, value in row.items() if name != "by_seed"} for row in rows]
    columns = [name for name in COLUMNS if any(row.get(name) is not None for row in shown)]
    lines = {f"{guidance:g}": error for guidance, error in (floor or {}).items()}
    data = {"what": what, "rows": shown, "columns": columns, "paths": paths, "floor": lines}
    template = Path(__file__).with_name("samplers_page.html").read_text(encoding="utf-8")
    return template.replace("{{data}}", json.dumps(data).replace("<", "\\u003c"))


def plane(question: Question, budget: int) -> dict[str, Any]:
    """Paths of ten points of the known flow: every pair's, and the flow's."""
    flow = KnownFlow(question.seeds[:1])
    runs = {f"{name}|{spacing}": path for name, spacing, path in known_flow.paths(flow, question, budget)}
    mixture = [
        [list(component) for component in zip(*tables, strict=True)]
        for tables in zip(Mixture.SHARES, Mixture.MEANS, Mixture.DEVIATIONS, strict=True)
    ]
    return {"runs": runs, "exact": known_flow.exact_paths(flow), "mixture": mixture, "budget": budget}
