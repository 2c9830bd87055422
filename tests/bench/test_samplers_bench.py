"""The samplers' bench on a network whose flow is known: what it reports is what is so."""

import csv
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mixture import Mixture
from torch import Tensor

from ldm.bench import samplers_report
from ldm.bench.against import PeerRun
from ldm.bench.rows import RowFile
from ldm.bench.sampler_checks import check, timings
from ldm.bench.sampler_flips import flip_cases
from ldm.bench.sampler_statistics import best_spacing, paired, slopes
from ldm.bench.samplers import (
    COMPARED_SPACINGS,
    Bench,
    Comparison,
    compare,
    fork_step,
    reference,
    reference_timesteps,
    swap_timestep,
    swaps,
)
from ldm.pipeline import StableDiffusion
from ldm.samplers import SAMPLERS
from ldm.schedule import SPACINGS, Schedule
from ldm.study.metrics.perceptual import Unavailable

SCHEDULE = Schedule.sd15()
MIXTURE = Mixture(SCHEDULE)
COMPARISON = Comparison(
    neutral="0",
    styles={"more": "0.5", "less": "-0.5"},
    guidances=(1.0,),
    budgets=(20, 40),
    samplers=("ddim", "heun", "unipc"),
    spacings=("karras", "log_snr"),
)


@dataclass
class MixtureModel:
    """What the bench asks of a model. A prompt is a number, by which the mixture is moved."""

    schedule: Schedule = SCHEDULE
    latent_shape: tuple[int, int, int] = (4, 4, 4)
    device: torch.device = torch.device("cpu")  # noqa: RUF009
    dtype: torch.dtype = torch.float32
    max_batch: int | None = None

    guided = StableDiffusion.guided
    sample = StableDiffusion.sample

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        return torch.tensor([float(prompt or 0) for prompt in prompts]).view(-1, 1, 1)

    def unet(self, x_t: Tensor, t: float, context: Tensor) -> Tensor:
        moved = SCHEDULE.alphas_cumprod_at(t) ** 0.5 * context.double()[..., None]
        return MIXTURE.eps(x_t.double() - moved, t).float()


def bench_of(**changes: Any) -> Bench:
    return Bench(MixtureModel(), replace(COMPARISON, **changes))


NAMES = ("part", "guidance", "sampler", "spacing", "budget")


def rows_of(bench: Bench, folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of all runs and of all references."""
    file = RowFile(folder / "rows.jsonl", {}, NAMES)
    rows = list(compare(bench, file, Unavailable("", ""), images=False))
    return [r for r in rows if r["part"] == "run"], [r for r in rows if r["part"] == "reference"]


def test_the_reference_is_the_flow_swapped_at_the_level_that_it_says():
    bench = bench_of(seeds=(0, 1))
    found = reference(bench, 1.0, 150)
    x_T = bench.traverse("ddim", (999,), {}, 1.0, (0, 1)).x_T.double()
    a_T, a_0 = SCHEDULE.alphas_cumprod_at(999), SCHEDULE.final_alpha_cumprod
    torch.testing.assert_close(found["neutral"].double(), MIXTURE.flow(x_T, a_T, a_0), rtol=0, atol=2e-4)
    for spacing in COMPARISON.spacings:
        a_swap = SCHEDULE.alphas_cumprod_at(swap_timestep(spacing, SCHEDULE))
        middle = MIXTURE.flow(x_T, a_T, a_swap)
        exact = MIXTURE.flow(middle - 0.5 * a_swap**0.5, a_swap, a_0) + 0.5 * a_0**0.5
        torch.testing.assert_close(found[spacing].double(), exact, rtol=0, atol=2e-4)


def test_errors_fall_with_the_order_of_the_method_also_after_a_swap(tmp_path):
    rows, convergence = rows_of(bench_of(), tmp_path)
    assert len(rows) == 3 * 2 * 2
    assert {row["evaluations"] for row in rows} == {20, 40}
    orders = {(row["sampler"], row["spacing"]): (row["order"], row["swap_order"]) for row in slopes(rows)}
    for sampler, theory in (("ddim", 1), ("heun", 2), ("unipc", 3)):
        # 20 and 40 evaluations of float32: not yet where the slope has settled.
        assert orders[sampler, "karras"] == pytest.approx((theory, theory), abs=0.5)
    assert all(row["swap_cosine"] > 0.98 for row in rows)
    assert convergence[0]["half_steps_error"] < 1e-3


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("budget", [10, 20, 40, 100])
def test_all_runs_of_a_spacing_visit_the_level_of_its_swap(spacing, budget):
    swap = swap_timestep(spacing, SCHEDULE)
    assert 450 < swap < 800  # log_snr has no level closer than 757, laplace none than 491
    for sampler in (of for of in SAMPLERS.values() if of.evaluations <= 2 and not of.starting):
        timesteps = SPACINGS[spacing](sampler.steps_within(budget), SCHEDULE)
        assert timesteps[fork_step(timesteps, swap)] == pytest.approx(swap, abs=0.5)
    odd = SPACINGS[spacing](7, SCHEDULE)  # these have a level of their own, which the reference swaps at, too
    assert min(abs(t - swap_timestep(spacing, SCHEDULE, odd)) for t in odd) <= 0.5
    with pytest.raises(ValueError, match="timesteps: none of 7 is the swap's"):
        fork_step(SPACINGS["trailing"](7, SCHEDULE), 599)


def test_a_sampler_that_begins_with_more_evaluations_takes_fewer_steps(tmp_path):
    bench = bench_of(samplers=("ddim", "plms"), spacings=("leading",), guidances=(1.0,), budgets=(10,))
    rows, _ = rows_of(bench, tmp_path)
    assert {row["sampler"]: (row["steps"], row["evaluations"]) for row in rows} == {"ddim": (10, 10), "plms": (9, 10)}
    assert all(row["swap_cosine"] > 0 for row in rows)


def test_the_reference_visits_the_swaps_and_no_neighbour_too_close():
    through = sorted({swap_timestep(spacing, SCHEDULE) for spacing in COMPARED_SPACINGS})
    timesteps = reference_timesteps(150, SCHEDULE, through)
    assert set(through) < set(timesteps)
    assert list(timesteps) == sorted(set(timesteps), reverse=True)
    assert 145 <= len(timesteps) <= 150 + len(through)


def test_the_reference_swaps_wherever_a_run_does(tmp_path):
    bench = bench_of(samplers=("ddim",), spacings=("trailing",), budgets=(7, 10), reference_steps=80)
    assert len(swaps(bench.comparison, SCHEDULE)) == 2
    rows, _ = rows_of(bench, tmp_path)
    assert all(row["swap_cosine"] > 0.9 and row["swap_error"] < 0.2 for row in rows)


def test_checks_and_timings_cover_the_samplers_that_are_compared():
    bench = bench_of(samplers=("ddim", "euler", "unipc", "ddpm"))
    found = check(bench)
    assert [row["sampler"] for row in found] == ["ddim", "euler", "unipc", "ddpm"]
    assert all(row["repeatable"] and row["batch_invariant"] for row in found)
    timed = timings(bench, rounds=1)
    assert list(timed) == ["ddim", "euler", "unipc", "ddpm"]
    assert [timed[name]["latents_remembered"] for name in ("ddim", "unipc")] == [0, 3]


def test_a_killed_comparison_goes_on_with_the_same_result(tmp_path):
    whole = rows_of(bench_of(), tmp_path)
    text = (tmp_path / "rows.jsonl").read_text()
    timeless = [[{**row, "seconds": 0} for row in part] for part in whole]
    lines = text.splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(lines[:5]) + lines[5][:40])
    again = rows_of(bench_of(), tmp_path)
    assert [[{**row, "seconds": 0} for row in part] for part in again] == timeless
    assert not list(tmp_path.glob("reference_*"))  # it was needed on the way only
    assert (tmp_path / "rows.jsonl").read_text().splitlines()[:5] == text.splitlines()[:5]


def test_margins_are_paired_by_seed(tmp_path):
    rows, _ = rows_of(bench_of(seeds=(0, 1, 2), budgets=(20,)), tmp_path)
    found = paired(rows)
    best = min(rows, key=lambda row: row["error"])
    for row, margin in zip(rows, found, strict=True):
        assert margin["best_sampler"] == best["sampler"]
        assert margin["ratio"] == pytest.approx(row["error"] / best["error"])
        assert margin["low"] <= margin["ratio"] <= margin["high"]


def test_a_run_without_a_finite_error_is_nobodys_best():
    def row(sampler: str, error: float) -> dict[str, Any]:
        name = {"guidance": 1.0, "budget": 20, "sampler": sampler, "spacing": "karras" if error < 1 else "trailing"}
        return {**name, "error": error, "by_seed": {"error": [error]}, "evaluations": 20}

    rows = [row("heun", math.nan), row("heun", 0.1), row("unipc", 0.05)]
    assert [(found["sampler"], found["best_sampler"]) for found in paired(rows)] == [("heun", "unipc"), ("unipc",) * 2]
    assert best_spacing(rows, "heun", 20, 1.0) == "karras"


def test_random_samplers_are_let_in_and_have_no_row(tmp_path):
    bench = bench_of(samplers=("ddpm", "unipc"), budgets=(20,))
    rows, _ = rows_of(bench, tmp_path)
    assert {row["sampler"] for row in rows} == {"unipc"}
    assert [case[0] for case in flip_cases(bench.comparison, rows)] == ["ddim", "ddpm", "unipc"]


class Ours:
    """A peer that is ourselves."""

    name = "ours"

    def __call__(self, eps, x_T, schedule, sampler, spacing, timesteps):
        run = SAMPLERS[sampler](lambda x, t, _: eps(x, t), x_T, schedule, len(timesteps), timesteps=timesteps)
        return None if sampler == "heun" else PeerRun(list(run)[-1].x_prev, clean=False)


def test_a_peer_runs_on_the_same_network_and_noise(tmp_path):
    bench, file = bench_of(budgets=(20,), guidances=(3.0,), spacings=("karras",)), RowFile(tmp_path / "r", {}, NAMES)
    rows = [row for row in compare(bench, file, Unavailable("", ""), False, Ours()) if row["part"] == "run"]
    by_name = {row["sampler"]: row for row in rows}
    assert "peer_error" not in by_name["heun"]
    for row in (by_name["ddim"], by_name["unipc"]):
        assert row["peer_apart"] < 1e-6
        assert (row["peer_error"], row["peer_evaluations"]) == (pytest.approx(row["error"], rel=1e-3), 20)
    lines = [samplers_report.line(row) for row in rows]
    assert len(lines[0]) == len(samplers_report.heading("ours")) - len("   ours")


def test_a_network_that_is_not_the_same_twice_is_refused():
    class Unsteady(MixtureModel):
        def unet(self, x_t: Tensor, t: float, context: Tensor) -> Tensor:
            return x_t * 0.1 + 1e-5 * torch.rand(1)

    with pytest.raises(ValueError, match="samplers: not the same twice"):
        check(Bench(Unsteady(), COMPARISON))


def test_lines_and_figure_show_every_run(tmp_path):
    bench = bench_of(samplers=("ddim", "plms", "unipc"), spacings=("leading", "log_snr"), guidances=(1.0, 3.0))
    rows, references = rows_of(bench, tmp_path)
    assert best_spacing(rows, "plms", 40, 1.0) == "leading"  # the only one that it takes
    lines = [samplers_report.line(row) for row in rows]
    assert len(lines) == len(rows) == 2 * (2 + 1 + 2) * 2
    assert sum("plms" in line for line in lines) == 4
    timed = {name: {"ms_per_evaluation": 1.0, "ratio_to_ddim": 1.0} for name in bench.comparison.samplers}
    summary = samplers_report.summary(rows, references, timed)
    assert summary.count("the cheapest within 1 %") == summary.count("the reference: 100 steps") == 2
    read = list(csv.DictReader(samplers_report.as_csv(rows).splitlines()))
    assert len(read) == len(rows)
    assert float(read[0]["error"]) == rows[0]["error"]
    figure = samplers_report.figure(rows, {1.0: 1e-4, 3.0: 1e-4})
    assert sum(axes.get_visible() for axes in figure.axes) == 4
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["ddim", "plms", "unipc", "reference's own error"]
    figure.savefig(tmp_path / "figure.png")


def test_a_pair_that_does_not_run_says_why(tmp_path, monkeypatch):
    monkeypatch.setitem(SPACINGS, "flat", lambda steps, schedule: tuple(600 - i // 2 for i in range(steps)))
    rows, _ = rows_of(bench_of(samplers=("ddim",), spacings=("flat",), budgets=(20,)), tmp_path)
    assert "falling values" in rows[0]["refused"]
    assert "refused: timesteps" in samplers_report.line(rows[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budgets": (1, 20)}, "evaluations: expected 2 or more"),
        ({"samplers": ("dmi",)}, "samplers: expected some of ddim"),
        ({"spacings": ("even",)}, "spacings: expected some of leading"),
        ({"reference_steps": 50}, "reference steps: got 50, expected at least 80"),
        ({"seeds": ()}, "styles, seeds, guidances: expected one or more"),
    ],
)
def test_what_cannot_be_compared_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(COMPARISON, **changes)
