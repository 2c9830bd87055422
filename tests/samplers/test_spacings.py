"""Spacings and the names that users know: each against its definition, written in another way."""

import copy
import math

import numpy as np
import pytest
from scipy import stats

from ldm.prediction import Predicted
from ldm.samplers import SAMPLERS, initial_noise, step_noise
from ldm.samplers.driver import noise_levels
from ldm.samplers.names import SAMPLER_NAMES, SPACING_NAMES, meaning, understood
from ldm.samplers.own import GeneratorSampler
from ldm.schedule import (
    ENDS,
    SPACINGS,
    Schedule,
    ToldTime,
    beta,
    kl_optimal,
    laplace,
    log_snr,
    polyexponential,
    quadratic,
)

SCHEDULE = Schedule.sd15()
HIGH, LOW = (math.exp(-float(lambda_t)) for lambda_t in SCHEDULE.lambdas[[-1, 0]])


def sigmas(timesteps) -> np.ndarray:
    return np.array([math.sqrt((1 - a) / a) for a in map(SCHEDULE.alphas_cumprod_at, timesteps)])


def test_there_are_ten_that_differ():
    levels = {tuple(np.round(spacing(7, SCHEDULE), 3)) for spacing in SPACINGS.values()}
    assert len(levels) >= 10
    assert SPACINGS["exponential"](9, SCHEDULE) == SPACINGS["log_snr"](9, SCHEDULE)  # one thing by two names


def test_beta_has_the_quantiles_of_beta_in_t():
    expected = 999 * stats.beta.ppf(1 - np.arange(10) / 10, 0.6, 0.6)
    np.testing.assert_allclose(beta(10), expected, atol=1e-8)
    assert beta(3, endpoint=True) == pytest.approx((999, 499.5, 0))
    assert beta(4, a=1, b=1) == pytest.approx((999, 749.25, 499.5, 249.75))  # the even distribution: linspace


def test_kl_optimal_is_even_in_arctan_sigma():
    angles = np.arctan(sigmas(kl_optimal(12, SCHEDULE, endpoint=True)))
    np.testing.assert_allclose(np.diff(angles), np.diff(angles)[0], rtol=1e-6)
    np.testing.assert_allclose(np.tan(angles[[0, -1]]), (HIGH, LOW), rtol=1e-9)


def test_polyexponential_is_a_power_in_log_sigma():
    found = np.log(sigmas(polyexponential(9, SCHEDULE, rho=2, endpoint=True)))
    ramp = np.linspace(1, 0, 9) ** 2
    np.testing.assert_allclose(found, ramp * (math.log(HIGH) - math.log(LOW)) + math.log(LOW), rtol=1e-6, atol=1e-9)
    assert polyexponential(9, SCHEDULE) == pytest.approx(log_snr(9, SCHEDULE))


def test_laplace_is_even_in_its_distribution_function():
    shares = stats.laplace.cdf(np.log(sigmas(laplace(20, SCHEDULE, endpoint=True))), scale=0.5)
    np.testing.assert_allclose(np.diff(shares), np.diff(shares)[0], rtol=1e-4)


def test_quadratic_is_even_in_the_root_of_t():
    assert quadratic(4) == pytest.approx((999, 999 * 9 / 16, 999 / 4, 999 / 16))


@pytest.mark.parametrize("name", SPACINGS)
def test_under_a_zero_end_what_is_spread_to_the_clean_end_visits_it(name):
    to_zero, to_sigma_min = (SCHEDULE.ending_at(end) for end in reversed(ENDS))
    assert (to_zero.final_alpha_cumprod, to_sigma_min.final_alpha_cumprod) == (1.0, SCHEDULE.final_alpha_cumprod)
    assert SPACINGS[name](20, to_sigma_min) == SPACINGS[name](20, SCHEDULE)
    for steps in (1, 2, 20, 1000):
        visited = SPACINGS[name](steps, to_zero)
        assert len(visited) == steps
        assert list(visited) == sorted(set(visited), reverse=True)
    last = SPACINGS[name](20, to_zero)[-1]
    assert last == {"leading": 1, "trailing": 49}.get(name, 0)


def test_an_unknown_end_is_refused():
    with pytest.raises(ValueError, match="end: expected one of sigma_min, zero, got 'nought'"):
        SCHEDULE.ending_at("nought")


# ---- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sampler", "spacing"),
    [
        ("ddim", "ddim", None),
        ("euler_a", "euler_ancestral", None),
        ("Euler a", "euler_ancestral", None),
        ("k_euler_ancestral", "euler_ancestral", None),
        ("dpmpp_2m", "dpm_solver_pp_2m", None),
        ("dpmpp_2m_karras", "dpm_solver_pp_2m", "karras"),
        ("DPM++ 2M Karras", "dpm_solver_pp_2m", "karras"),
        ("lms_karras", "lms", "karras"),
        ("uni_pc_beta", "unipc", "beta"),
        ("heun_ays", "heun", "align_your_steps"),
        ("euler_polyexponential", "euler", "polyexponential"),
        ("euler_exponential", "euler", "exponential"),
        ("pndm", "plms", None),
    ],
)
def test_names_that_users_know(name, sampler, spacing):
    assert understood(name, SAMPLERS) == (sampler, spacing)


@pytest.mark.parametrize("name", ["", "karras", "_karras", "eulerr", "mine.py:my_step", "dpmpp_9m"])
def test_what_means_nothing(name):
    assert understood(name, SAMPLERS) is None


def test_spacings_that_names_mean_are_there():
    assert set(SPACING_NAMES.values()) <= set(SPACINGS)
    assert not set(SAMPLER_NAMES) & set(SAMPLERS)  # no name hides a sampler's own


def test_a_name_and_a_spacing_must_not_say_two_things():
    assert meaning("euler_a", "beta", SAMPLERS) == ("euler_ancestral", "beta")
    assert meaning("dpmpp_2m_karras", "karras", SAMPLERS) == ("dpm_solver_pp_2m", "karras")
    with pytest.raises(ValueError, match="got 'beta' beside sampler 'dpmpp_2m_karras', whose name says karras"):
        meaning("dpmpp_2m_karras", "beta", SAMPLERS)
    with pytest.raises(ValueError, match=r"sampler: expected one of ddim, .* got 'dmi'"):
        meaning("dmi", None, SAMPLERS)


TOLD = (ToldTime(999, 990), ToldTime(700, 720.5), ToldTime(300, 310), ToldTime(20, 40))
NOISE = initial_noise((0, 1), (4, 4, 4)).double()


@pytest.mark.parametrize("name", [name for name in SAMPLERS if not SAMPLERS[name].even])
def test_every_sampler_tells_the_network_what_a_level_says_and_steps_by_the_level(name):
    asked = []

    def run(timesteps, said):
        def eps_fn(x_t, t, step):
            asked.append(t)
            return 0.3 * x_t + said.get(t, t) / 1000

        noise = step_noise((0, 1), (4, 4, 4))
        return list(SAMPLERS[name](eps_fn, NOISE, SCHEDULE, 4, timesteps=timesteps, noise=noise))

    told = run(TOLD, {})
    assert [step.t for step in told] == [990, 720.5, 310, 40]
    assert {990, 720.5, 310, 40} <= set(asked)
    asked.clear()
    plain = run(tuple(map(float, TOLD)), {float(t): t.told for t in TOLD})  # an eps that makes the same of other times
    assert set(map(float, TOLD)) <= set(asked)
    assert (told[-1].x_prev == plain[-1].x_prev).all()


def test_told_times_are_refused_where_they_would_mean_something_else():
    def eps_fn(x_t, t, step):
        return x_t

    with pytest.raises(ValueError, match=r"told times in 0\.\.999, got"):
        noise_levels(eps_fn, NOISE, SCHEDULE, 1, timesteps=(ToldTime(500, 999.5),))
    guided = type("Guided", (), {"steps": 1, "guidance_scale": 1.0})()
    predicted = Predicted(guided, "v", SCHEDULE)
    with pytest.raises(ValueError, match="networks that predict eps"):
        noise_levels(predicted, NOISE, SCHEDULE, 1, timesteps=(ToldTime(500, 501),))
    assert noise_levels(predicted, NOISE, SCHEDULE, 1, timesteps=(ToldTime(500, 500),))[0].t == 500
    own = GeneratorSampler("mine", None, order=None, generator=lambda *_, **__: iter(()))
    with pytest.raises(ValueError, match="mine is a generator of its own"):
        next(own(eps_fn, NOISE, SCHEDULE, 1, timesteps=(ToldTime(500, 501),)))


def test_a_told_time_survives_copies():
    for again in (copy.deepcopy(TOLD), [copy.copy(t) for t in TOLD]):
        assert [(t, t.told) for t in again] == [(t, t.told) for t in TOLD]


def test_what_needs_even_levels_goes_by_the_levels_not_by_what_is_told():
    def eps_fn(x_t, t, step):
        return 0 * x_t

    even, uneven = (900, 600, 300), (900, 800, 300)
    assert len(list(SAMPLERS["plms"](eps_fn, NOISE, SCHEDULE, 3, timesteps=tuple(map(ToldTime, even, uneven))))) == 3
    with pytest.raises(ValueError, match="plms expects evenly spaced ones"):
        next(iter(SAMPLERS["plms"](eps_fn, NOISE, SCHEDULE, 3, timesteps=tuple(map(ToldTime, uneven, even)))))
