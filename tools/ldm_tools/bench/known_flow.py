"""`ldm bench samplers --known-flow`: every sampler and spacing on a flow that is known exactly, without a network."""

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.bench import known_flow, samplers_page, samplers_report
from ldm.bench.against import Peer
from ldm.bench.rows import RowFile
from ldm.bench.sampler_statistics import cheapest, pareto
from ldm.files import write_json, write_text
from ldm.samplers import SAMPLERS
from ldm.schedule import SPACINGS
from ldm.study.report.plot_style import save_figure
from ldm.traversal.plan import parse_integers

SECONDS_A_PAIR = 0.2  # sampler x spacing at 150 evaluations in all, the mean of all; those that draw take longer


def run(args: argparse.Namespace, own_code: Mapping[str, Any], peer: Peer | None = None) -> None:
    """Raises ValueError for options that do not fit."""
    question = known_flow.Question(
        samplers=tuple(args.samplers.split(",")) if args.samplers else (),
        spacings=tuple(args.spacings.split(",")) if args.spacings else (),
        budgets=parse_integers(args.evaluations, "--evaluations") if args.evaluations else known_flow.BUDGETS,
        seeds=parse_integers(args.seeds, "--seeds") if args.seeds else known_flow.Question().seeds,
    )
    pairs = question.pairs()
    print(
        f"{len(pairs)} pairs of sampler and spacing, {len(question.seeds)} seeds: about "
        f"{SECONDS_A_PAIR * len(pairs) * sum(question.budgets) / 150:.0f} s on one quiet core"
    )
    settings = {"seeds": question.seeds, "facts": facts(question), "own_code": own_code}
    settings |= {"against": peer.name} if peer else {}
    file = RowFile(args.out / "known_flow.jsonl", settings, ("sampler", "spacing", "budget"))
    began, rows = time.perf_counter(), []
    print(heading(question.budgets), flush=True)
    for of_pair in known_flow.compare(question, file, peer):
        rows += of_pair
        print(line(of_pair), flush=True)
    write(args.out, question, rows, own_code)
    print(summary(rows))
    print(f"{time.perf_counter() - began:.0f} s; see {args.out / 'known_flow.html'}, known_flow.png, .csv, .json")


def facts(question: known_flow.Question) -> dict[str, list[Any]]:
    """What rows depend on of the tables: the levels of every spacing, the facts of every sampler."""
    flow = known_flow.KnownFlow(question.seeds)
    names, spacings = question.samplers or tuple(SAMPLERS), question.spacings or tuple(SPACINGS)
    levels = {name: list(SPACINGS[name](7, flow.schedule)) for name in spacings}
    return levels | {name: [SAMPLERS[name].order, SAMPLERS[name].evaluations] for name in names}


def write(out: Path, question: known_flow.Question, rows: list[dict[str, Any]], own_code: Mapping[str, Any]) -> None:
    """JSON, CSV, figure and page."""
    orders = known_flow.orders(rows)
    best = cheapest(rows)
    result = {"rows": rows, "orders": orders, "pareto": pareto(rows), "cheapest_within_1_percent": best}
    write_json(out / "known_flow.json", result | {"seeds": list(question.seeds), "own_code": dict(own_code)})
    write_text(out / "known_flow.csv", samplers_report.as_csv(rows))
    if any(row.get("error") for row in rows):
        save_figure(samplers_report.figure(rows), out / "known_flow")
    what = (
        f"Mixtures of Gaussians, whose probability flow is known exactly; {len(question.seeds)} seeds. Errors are "
        "relative, to where the flow takes the noise from t = 999."
    )
    paths = samplers_page.plane(question, min(question.budgets))
    write_text(out / "known_flow.html", samplers_page.page(what, rows, paths))


def heading(budgets: Sequence[int]) -> str:
    """Over the lines."""
    errors = "".join(f"{f'error@{budget}':>10}" for budget in budgets)
    return f"{'sampler':26}{'spacing':18}{errors}  {'order, 95 %':>18}{'swap':>10}{'cosine':>8}{'distance':>10}"


def line(rows: Sequence[Mapping[str, Any]]) -> str:
    """One sampler and spacing: errors at all budgets; of the swap and the distribution, at the second."""
    first, second = rows[0], rows[min(1, len(rows) - 1)]
    begin = f"{first['sampler']:26}{first['spacing']:18}"
    notes = [f"levels of {first['same_as']}"] if all("same_as" in row for row in rows) else []
    if refused := [row["refused"] for row in rows if "refused" in row]:
        return f"{begin}  refused: {refused[0]}"
    if refused := [row["peer_refused"] for row in rows if "peer_refused" in row]:
        notes.append(f"peer: {refused[0]}")
    if "peer_error" in second:
        notes.append(f"peer {second['peer_error']:.2e}, apart {second['peer_apart']:.1e}")
    if any(row["evaluations"] > row["budget"] for row in rows):
        notes.append("evaluations " + ", ".join(f"{row['evaluations']:.0f}" for row in rows))
    errors = "".join(f"{row['error']:10.2e}" if row.get("error") is not None else f"{'-':>10}" for row in rows)
    orders = known_flow.orders(rows)
    fit = "{order:.2f} [{order_low:.2f}, {order_high:.2f}]".format(**orders[0]) if orders else "-"
    if not all(row["finite"] for row in rows):
        return f"{begin}{errors}  not finite at {[row['budget'] for row in rows if not row['finite']]} evaluations"
    swap = (
        f"{second['swap_error']:10.2e}{second['swap_cosine']:8.4f}" if "swap_error" in second else f"{'-':>10}{'-':>8}"
    )
    return f"{begin}{errors}  {fit:>18}{swap}{second['distance']:10.4f}  {'; '.join(notes)}".rstrip()


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """The front, and the cheapest within 1 %."""
    lines = ["", "No run with fewer evaluations has a smaller error (the Pareto front):"]
    lines += [
        f"  {r['evaluations']:4} evaluations  {r['error']:.2e}  {r['sampler']}, {r['spacing']}" for r in pareto(rows)
    ]
    best = cheapest(rows)
    lines.append(
        "the cheapest within 1 %: none"
        if best is None
        else f"the cheapest within 1 %: {best['sampler']}, {best['spacing']}, {best['evaluations']} evaluations"
    )
    return "\n".join(lines)
