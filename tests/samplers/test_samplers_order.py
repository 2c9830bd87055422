"""How fast each sampler converges where the exact flow is known, and what all of them have in common."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from mixture import Mixture
from small_networks import ToyUNet, toy_context
from torch import Tensor

from ldm.conditioning import constant
from ldm.guidance import guided
from ldm.samplers import (
    SAMPLERS,
    Sampler,
    ddim,
    ddpm,
    deis,
    dpm_solver_2s,
    dpm_solver_3s,
    dpm_solver_pp_2m,
    dpm_solver_pp_3m,
    euler,
    euler_ancestral,
    heun,
    initial_noise,
    ipndm,
    lms,
    plms,
    step_noise,
    unipc,
)
from ldm.schedule import SPACINGS, Schedule, karras, linspace, log_snr

SCHEDULE = Schedule.sd15()
MIXTURE = Mixture(SCHEDULE)
X_T = torch.linspace(-2, 2, 64, dtype=torch.float64).view(1, 4, 4, 4)  # two standard deviations of noise either way
RANDOM = [name for name, sampler in SAMPLERS.items() if sampler.random]
DETERMINISTIC = [name for name in SAMPLERS if name not in RANDOM]


# ---- order -----------------------------------------------------------------------------------------


def order(errors: list[float]) -> float:
    """From the errors of a run and of one with twice as many steps."""
    return math.log2(errors[0] / errors[1])


def error(result: Tensor, exact: Tensor) -> float:
    return float((result - exact).norm() / exact.norm())


def whole_run_errors(sampler: Sampler, steps: tuple[int, int]) -> list[float]:
    exact = MIXTURE.flow(X_T, SCHEDULE.alphas_cumprod_at(999), SCHEDULE.final_alpha_cumprod)
    errors = []
    for n in steps:
        *_, last = sampler(MIXTURE.eps, X_T, SCHEDULE, n, timesteps=log_snr(n, SCHEDULE))
        errors.append(error(last.x_prev, exact))
    return errors


@pytest.mark.parametrize(
    ("sampler", "theory"),
    [(ddim, 1), (euler, 1), (heun, 2), (dpm_solver_2s, 2), (dpm_solver_3s, 3), (dpm_solver_pp_2m, 2), (unipc, 3)],
)
def test_the_order_of_convergence_is_the_theorys(sampler, theory):
    assert order(whole_run_errors(sampler, (80, 160))) == pytest.approx(theory, abs=0.2)


@pytest.mark.parametrize("sampler", [plms, ipndm])
def test_plms_and_ipndm_are_of_order_2_on_even_timesteps(sampler):
    # Down to t = 199: below, where lambda turns steep against t, even timesteps need thousands of steps to show it.
    schedule = replace(SCHEDULE, final_alpha_cumprod=float(SCHEDULE.alphas_cumprod[199]))
    exact = MIXTURE.flow(X_T, schedule.alphas_cumprod_at(999), schedule.final_alpha_cumprod)
    errors = []
    for n in (80, 160):
        *_, last = sampler(MIXTURE.eps, X_T, schedule, n, timesteps=[999 - 800 * i / n for i in range(n)])
        errors.append(error(last.x_prev, exact))
    assert order(errors) == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize(
    ("sampler", "spacing", "steps", "remembered", "theory"),
    [(lms, karras, (160, 320), 3, 4), (dpm_solver_pp_3m, log_snr, (80, 160), 2, 3), (deis, log_snr, (80, 160), 2, 3)],
)
def test_with_an_exact_past_the_long_multistep_methods_have_their_full_order(
    sampler, spacing, steps, remembered, theory
):
    # From scratch their first steps, which know less, are of order 2, and in the end that is what is left to see.
    errors = []
    a_T = SCHEDULE.alphas_cumprod_at(999)
    exact = MIXTURE.flow(X_T, a_T, SCHEDULE.final_alpha_cumprod)
    for n in steps:
        ts = spacing(n, SCHEDULE)
        x = [MIXTURE.flow(X_T, a_T, SCHEDULE.alphas_cumprod_at(t)) for t in ts[: remembered + 1]]
        eps = [MIXTURE.eps(x_t, t) for x_t, t in zip(x, ts, strict=False)]
        past = eps if sampler in (lms, deis) else [clean(*of) for of in zip(x, eps, ts, strict=False)]
        history = tuple(reversed(past[:remembered]))
        *_, last = sampler(MIXTURE.eps, x[-1], SCHEDULE, n, start=remembered, history=history, timesteps=ts)
        errors.append(error(last.x_prev, exact))
    assert order(errors) == pytest.approx(theory, abs=0.2)


def clean(x_t: Tensor, eps: Tensor, t: float) -> Tensor:
    a_t = SCHEDULE.alphas_cumprod_at(t)
    return (x_t - math.sqrt(1 - a_t) * eps) / math.sqrt(a_t)


def test_the_parabola_of_3m_beats_the_line_of_2m_and_unipc_beats_both_when_steps_are_many():
    line, parabola, corrected = (
        whole_run_errors(sampler, (40, 80))[1] for sampler in (dpm_solver_pp_2m, dpm_solver_pp_3m, unipc)
    )
    assert corrected < line / 10
    assert parabola < line / 10


def test_the_mixtures_flow_is_what_ddim_converges_to():
    # By 1000 steps of order 1, so that the flow's own derivation is not taken on trust.
    *_, last = ddim(MIXTURE.eps, X_T, SCHEDULE, 1000, timesteps=log_snr(1000, SCHEDULE))
    exact = MIXTURE.flow(X_T, SCHEDULE.alphas_cumprod_at(999), SCHEDULE.final_alpha_cumprod)
    assert error(last.x_prev, exact) < 2e-3


# ---- identities ------------------------------------------------------------------------------------


class Always:
    """The same eps, whatever x_t is; `row`: for methods that step each latent by itself."""

    def __init__(self, eps: Tensor) -> None:
        self.eps = eps

    def __call__(self, x_t: Tensor, t: float, step: int) -> Tensor:
        return self.eps

    def row(self, i: int) -> "Always":
        return Always(self.eps[i : i + 1])


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_with_the_exact_eps_every_sampler_recovers_x_0(name, steps):
    x_0, eps = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    to_zero = replace(SCHEDULE, final_alpha_cumprod=1.0)
    for schedule, expected in ((SCHEDULE, SCHEDULE.add_noise(x_0, eps, 0)), (to_zero, x_0)):
        x_T = SCHEDULE.add_noise(x_0, eps, 999)
        run = list(SAMPLERS[name](Always(eps), x_T, schedule, steps, timesteps=linspace(steps)))
        torch.testing.assert_close(run[-1].x_prev, expected)
        for step in run:
            torch.testing.assert_close(step.x0_pred, x_0)


@pytest.mark.parametrize("name", RANDOM)
def test_with_the_exact_x_0_the_random_samplers_recover_it(name):
    x_0 = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = step_noise([0], (4, 8, 8))

    def eps_fn(x_t: Tensor, t: float, step: int) -> Tensor:
        a_t = SCHEDULE.alphas_cumprod_at(t)
        return (x_t - math.sqrt(a_t) * x_0) / math.sqrt(1 - a_t)

    to_zero = replace(SCHEDULE, final_alpha_cumprod=1.0)
    *_, last = SAMPLERS[name](eps_fn, initial_noise([1], (4, 8, 8)).double(), to_zero, 10, noise=noise)
    torch.testing.assert_close(last.x_prev, x_0)


def toy_run(sampler: Sampler, steps: int = 10, **options) -> list:
    x_T = initial_noise([0, 1], (4, 8, 8)).double()
    eps_fn = guided(ToyUNet(), constant(toy_context(0.3).double(), steps), 1)
    options = {"noise": step_noise([0, 1], (4, 8, 8)), "timesteps": linspace(steps), **options}
    return list(sampler(eps_fn, options.pop("x_T", x_T), SCHEDULE, steps, **options))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_step_holds_what_happened_and_all_that_the_rest_depends_on(name):
    run = toy_run(SAMPLERS[name])
    assert [step.index for step in run] == list(range(10))
    for step, following in pairwise(run):
        assert following.x_t is step.x_prev
    for step in run:
        a_t = SCHEDULE.alphas_cumprod_at(step.t)
        torch.testing.assert_close(step.x_t, math.sqrt(a_t) * step.x0_pred + math.sqrt(1 - a_t) * step.eps)
    assert len(run[-1].history) == SAMPLERS[name].memory
    for step in run[:-1]:
        rest = toy_run(SAMPLERS[name], x_T=step.x_prev, start=step.index + 1, history=step.history)
        assert torch.equal(rest[-1].x_prev, run[-1].x_prev)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_evaluation_of_a_step_asks_for_that_steps_context(name):
    asked: list[tuple[int, float]] = []

    def eps_fn(x_t: Tensor, t: float, step: int) -> Tensor:
        asked.append((step, t))
        return 0.1 * x_t

    x_T, ts = torch.ones(1, 4, 8, 8), linspace(6)
    run = list(SAMPLERS[name](eps_fn, x_T, SCHEDULE, 6, noise=step_noise([0], (4, 8, 8)), timesteps=ts))
    counts = [sum(step == index for step, _ in asked) for index in range(6)]
    assert counts == [step.evaluations for step in run]
    every, starting = SAMPLERS[name].evaluations, SAMPLERS[name].starting
    if SAMPLERS[name].varies:
        assert all(count >= every for count in counts)
        assert SAMPLERS[name].evaluations_of(6) < sum(counts)
    else:
        assert counts == [every + starting] + [every] * 5
        assert [SAMPLERS[name].evaluations_of(steps) for steps in (0, 1, 6)] == [0, counts[0], sum(counts)]
    for index in range(6):  # the first at the step's own timestep, others later
        first, *others = [t for step, t in asked if step == index]
        assert first == ts[index]
        assert all(t < first for t in others) or name == "restart"


def test_the_facts_of_the_samplers():
    assert len(SAMPLERS) >= 24
    assert [name for name, s in SAMPLERS.items() if s.varies] == ["dpm_adaptive", "restart"]
    assert [name for name, s in SAMPLERS.items() if s.uncond] == ["ddim_cfgpp"]
    facts = {name: (s.order, s.evaluations, s.starting, s.memory, s.random, s.even) for name, s in SAMPLERS.items()}
    assert facts == {
        "ddim": (1, 1, 0, 0, False, False),
        "plms": (2, 1, 1, 3, False, True),
        "euler": (1, 1, 0, 0, False, False),
        "heun": (2, 2, 0, 0, False, False),
        "lms": (4, 1, 0, 3, False, False),
        "dpm_solver_2s": (2, 2, 0, 0, False, False),
        "dpm_solver_pp_2m": (2, 1, 0, 1, False, False),
        "dpm_solver_pp_3m": (3, 1, 0, 2, False, False),
        "unipc": (3, 1, 0, 3, False, False),
        "deis": (3, 1, 0, 2, False, False),
        "ipndm": (2, 1, 0, 3, False, True),
        "dpm_solver_3s": (3, 3, 0, 0, False, False),
        "dpm_adaptive": (3, 3, 0, 0, False, False),
        "ddim_cfgpp": (1, 1, 0, 0, False, False),
        "euler_ancestral": (None, 1, 0, 0, True, False),
        "ddpm": (None, 1, 0, 0, True, False),
        "dpm2_ancestral": (None, 2, 0, 0, True, False),
        "dpm_solver_pp_2s_ancestral": (None, 2, 0, 0, True, False),
        "dpm_solver_pp_sde": (None, 2, 0, 0, True, False),
        "dpm_solver_pp_2m_sde": (None, 1, 0, 1, True, False),
        "dpm_solver_pp_3m_sde": (None, 1, 0, 2, True, False),
        "er_sde": (None, 1, 0, 2, True, False),
        "restart": (None, 2, 0, 0, True, False),
        "lcm": (None, 1, 0, 0, True, False),
    }


@pytest.mark.parametrize("name", [name for name, sampler in SAMPLERS.items() if not sampler.varies])
def test_as_many_steps_are_taken_as_evaluations_are_good_for(name):
    sampler = SAMPLERS[name]
    for evaluations in range(sampler.evaluations_of(1), 42):
        steps = sampler.steps_within(evaluations)
        assert sampler.evaluations_of(steps) <= evaluations < sampler.evaluations_of(steps + 1)
    assert sampler.steps_within(1) == 1


def midpoint(now, then, x_t, eps, run):
    """A method of one's own: the slope halfway in sigma."""
    halfway = run.level_at(-math.log((now.sigma + then.sigma) / 2))
    y = x_t / now.alpha + (halfway.sigma - now.sigma) * eps
    return then.alpha * (x_t / now.alpha + (then.sigma - now.sigma) * run.eps(halfway.alpha * y, halfway))


def churned(now, then, x_t, eps, run):
    """Draws twice a step."""
    return SAMPLERS["euler"].step(now, then, x_t, eps, run) + 0.1 * (run.noise_like(x_t) - run.noise_like(x_t))


def test_a_sampler_of_ones_own_is_one_function():
    mine = Sampler("midpoint", midpoint, order=2, evaluations=2)
    assert order(whole_run_errors(mine, (80, 160))) == pytest.approx(2, abs=0.2)
    assert [step.evaluations for step in toy_run(mine)] == [2] * 10


def test_several_draws_of_a_step_differ_and_belong_to_the_seed():
    noise = step_noise([0, 1], (4, 8, 8))
    (step,), (calm,) = toy_run(Sampler("churned", churned, order=None, random=True), 1), toy_run(euler, 1)
    torch.testing.assert_close((step.x_prev - calm.x_prev) / 0.1, (noise(0) - noise(0, 1)).double())
    assert torch.equal(noise(3, 1)[1:], step_noise([1], (4, 8, 8))(3, 1))
    assert not torch.equal(noise(3, 1), noise(3))


def test_without_a_past_plms_and_heun_take_the_same_first_step_up_to_the_transfer():
    # Both average the slope at the two ends; in EDM's coordinates DDIM's transfer is a straight line.
    torch.testing.assert_close(toy_run(plms)[0].x_prev, toy_run(heun)[0].x_prev)


def test_euler_is_ddim_and_ddpm_is_ddim_at_eta_1():
    for step, ddim_step in zip(toy_run(euler), toy_run(ddim), strict=True):
        torch.testing.assert_close(step.x_prev, ddim_step.x_prev)
    for step, ddim_step in zip(toy_run(ddpm), toy_run(ddim, eta=1.0), strict=True):
        torch.testing.assert_close(step.x_prev, ddim_step.x_prev)


def test_ancestral_euler_is_ddpm():
    # The same posterior in other coordinates: y = x_t / alpha.
    for step, other in zip(toy_run(euler_ancestral), toy_run(ddpm), strict=True):
        torch.testing.assert_close(step.x_prev, other.x_prev)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_run_that_ends_where_it_is_takes_no_step(name):
    # leading(1000) visits t = 0, whose level is also the one that SD1's runs end at.
    run = list(SAMPLERS[name](MIXTURE.eps, X_T, SCHEDULE, 2, timesteps=(20, 0)))
    if name == "unipc":  # takes none either, from where it has corrected the step before
        assert torch.equal(run[-1].x_prev, run[-1].history[0])
    else:
        torch.testing.assert_close(run[-1].x_prev, run[0].x_prev)


# ---- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RANDOM)
def test_random_samplers_ask_for_noise(name):
    with pytest.raises(ValueError, match=f"noise: expected a callable because {name} is random, got None"):
        toy_run(SAMPLERS[name], noise=None)


@pytest.mark.parametrize("spacing", ["karras", "log_snr", "align_your_steps"])
def test_plms_refuses_uneven_timesteps(spacing):
    with pytest.raises(ValueError, match="timesteps: plms expects evenly spaced ones"):
        toy_run(plms, timesteps=SPACINGS[spacing](10, SCHEDULE))


def test_an_eta_that_a_sampler_does_not_have_is_refused():
    with pytest.raises(ValueError, match=r"eta: euler has none, expected 0, got 0\.5"):
        toy_run(euler, eta=0.5)
    assert len(toy_run(euler, eta=0)) == 10


def test_a_past_that_cannot_be_one_is_refused():
    past = torch.zeros(2, 4, 8, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"history: expected \(\) at the first step, got 1 entries"):
        toy_run(dpm_solver_pp_2m, history=(past,))
    with pytest.raises(ValueError, match=r"history: expected latents like x_T, \(2, 4, 8, 8\), got \[\(1, 4, 8, 8\)\]"):
        toy_run(dpm_solver_pp_2m, start=3, history=(past[:1],))
