"""The samplers' bench on a network whose flow is known: what it reports is what is so."""

import csv
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from mixture import Mixture
from torch import Tensor

from ldm.bench import samplers_report
from ldm.bench.samplers import (
    COMPARED,
    COMPARED_SPACINGS,
    Bench,
    Comparison,
    best_spacing,
    check,
    compare,
    fork_step,
    reference,
    reference_timesteps,
    slopes,
    steps_for,
    swap_timestep,
    timings,
)
from ldm.pipeline import StableDiffusion
from ldm.samplers import SAMPLERS
from ldm.schedule import SPACINGS, Schedule

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


def test_errors_fall_with_the_order_of_the_method_also_after_a_swap():
    rows, convergence = compare(bench_of())
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
    for sampler in COMPARED:
        timesteps = SPACINGS[spacing](steps_for(sampler, budget), SCHEDULE)
        assert timesteps[fork_step(timesteps, swap)] == pytest.approx(swap, abs=0.5)
    with pytest.raises(ValueError, match="timesteps: none of 7 is the swap's"):
        fork_step(SPACINGS["trailing"](7, SCHEDULE), 599)


def test_the_reference_visits_the_swaps_and_no_neighbour_too_close():
    through = sorted({swap_timestep(spacing, SCHEDULE) for spacing in COMPARED_SPACINGS})
    timesteps = reference_timesteps(150, SCHEDULE, through)
    assert set(through) < set(timesteps)
    assert list(timesteps) == sorted(set(timesteps), reverse=True)
    assert 145 <= len(timesteps) <= 150 + len(through)


def test_checks_and_timings_cover_every_sampler():
    found = check(bench_of())
    assert [row["sampler"] for row in found] == list(SAMPLERS)
    assert all(row["repeatable"] and row["batch_invariant"] for row in found)
    timed = timings(bench_of(), rounds=1)
    assert timed.keys() == SAMPLERS.keys()
    assert [timed[name]["latents_remembered"] for name in ("ddim", "plms", "dpm_solver_pp_2m", "unipc")] == [0, 3, 1, 3]


def test_a_network_that_is_not_the_same_twice_is_refused():
    class Unsteady(MixtureModel):
        def unet(self, x_t: Tensor, t: float, context: Tensor) -> Tensor:
            return x_t * 0.1 + 1e-5 * torch.rand(1)

    with pytest.raises(ValueError, match="samplers: not the same twice"):
        check(Bench(Unsteady(), COMPARISON))


def test_tables_and_figure_show_every_sampler(tmp_path):
    rows, _ = compare(
        bench_of(samplers=("ddim", "plms", "unipc"), spacings=("leading", "log_snr"), guidances=(1.0, 3.0))
    )
    orders = slopes(rows)
    timed = {name: {"ms_per_evaluation": 1.0} for name in SAMPLERS}
    table = samplers_report.table(rows, orders, timed)
    assert table.count("plms") == 2  # once a guidance
    assert best_spacing(rows, "plms", 40, 1.0) == "leading"  # the only one that it takes
    read = list(csv.DictReader(samplers_report.as_csv(rows).splitlines()))
    assert len(read) == len(rows) == 2 * (2 + 1 + 2) * 2
    assert float(read[0]["error"]) == rows[0]["error"]
    figure = samplers_report.figure(rows, orders)
    assert len(figure.axes) == 4
    figure.savefig(tmp_path / "figure.png")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budgets": (10, 25)}, "evaluations: expected multiples of 10"),
        ({"samplers": ("ddpm",)}, "samplers: expected some of ddim"),
        ({"spacings": ("even",)}, "spacings: expected some of leading"),
        ({"reference_steps": 50}, "reference steps: got 50, expected at least 80"),
        ({"seeds": ()}, "styles, seeds, guidances: expected one or more"),
    ],
)
def test_what_cannot_be_compared_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(COMPARISON, **changes)
