"""The noise schedule and the timestep spacing, against identities and the tables of CompVis and diffusers."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from reference import golden

from ldm.schedule import (
    AYS_SD15_SIGMAS,
    SPACINGS,
    Schedule,
    align_your_steps,
    karras,
    leading,
    linspace,
    log_snr,
    trailing,
)

DIVISORS_OF_1000 = (1, 2, 5, 10, 20, 25, 50, 100, 200, 250)


def test_betas_and_alphas_match_the_float64_table():
    schedule, table = Schedule.sd15(), golden("schedules")
    # Elementwise. The references' own float32 tables are off by up to 9.3e-7; float64 leaves only roundings.
    np.testing.assert_allclose(schedule.betas.numpy(), table["betas.f64"], rtol=1e-13)
    np.testing.assert_allclose(schedule.alphas_cumprod.numpy(), table["alphas_cumprod.f64"], rtol=1e-12)
    for reference in ("compvis_f32", "diffusers_f32"):
        np.testing.assert_allclose(schedule.alphas_cumprod.numpy(), table[f"alphas_cumprod.{reference}"], rtol=1e-6)


def test_the_last_step_lands_on_the_first_alpha_not_on_1():
    schedule = Schedule.sd15()
    assert schedule.final_alpha_cumprod == float(schedule.alphas_cumprod[0]) == pytest.approx(0.99915)
    assert len(schedule) == 1000


@pytest.mark.parametrize("steps", DIVISORS_OF_1000)
def test_leading_is_what_compvis_and_diffusers_run_where_steps_divide_1000(steps):
    table = golden("schedules")
    assert list(leading(steps)) == table[f"compvis.n{steps}.timesteps_asc"][::-1].tolist()
    assert list(leading(steps)) == table[f"diffusers.leading1.n{steps}.timesteps"].tolist()
    assert list(leading(steps, offset=0)) == table[f"diffusers.leading0.n{steps}.timesteps"].tolist()


@pytest.mark.parametrize("offset", [0, 1, 5])
def test_leading_gives_exactly_n_falling_timesteps_in_range_for_every_n(offset):
    for steps in range(1, 1001):
        timesteps = leading(steps, offset)
        assert len(timesteps) == steps
        assert all(a > b for a, b in pairwise(timesteps))
        assert timesteps[-1] >= 0
        assert timesteps[0] <= 999


def test_leading_reaches_the_noisy_end_where_others_stop_short():
    # diffusers steps by floor(1000 / 501) = 1 and begins at t = 501; CompVis fails for 3 and 1000.
    assert leading(501)[0] > 990
    assert leading(3) == (667, 334, 1)
    assert leading(1000) == tuple(range(999, -1, -1))


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_leading_names_the_range(steps):
    with pytest.raises(ValueError, match=rf"^steps: expected 1\.\.1000, got {steps}$"):
        leading(steps)
    with pytest.raises(ValueError, match="offset: expected 0 or more, got -1"):
        leading(50, offset=-1)


def test_add_noise_keeps_the_variance_and_takes_a_timestep_for_each_sample():
    schedule = Schedule.sd15()
    x_0, eps = torch.randn(2, 3, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 500, 999])
    x_t = schedule.add_noise(x_0, eps, t)
    for row in range(3):
        torch.testing.assert_close(x_t[row], schedule.add_noise(x_0, eps, int(t[row]))[row], rtol=0, atol=0)
    assert x_t.dtype == torch.float32
    assert x_t.std() == pytest.approx(1, abs=0.02)
    torch.testing.assert_close(x_t[2], eps[2], rtol=0, atol=0.4)  # sqrt(alphas_cumprod[999]) = 0.068 of x_0 is left


@pytest.mark.parametrize("t", [-1, 1000, torch.tensor([0, 1])])
def test_add_noise_refuses_timesteps_it_has_no_alpha_for(t):
    with pytest.raises(ValueError, match=r"^t: expected"):
        Schedule.sd15().add_noise(torch.zeros(3, 4, 8, 8), torch.zeros(3, 4, 8, 8), t)


@pytest.mark.parametrize("betas", [[0.0, 0.1], [0.5, 1.0], [[0.1]], [float("nan")]])
def test_from_betas_refuses_what_is_no_variance(betas):
    with pytest.raises(ValueError, match=r"^betas: expected"):
        Schedule.from_betas(torch.tensor(betas))


# ---- spacings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50, 999, 1000])
def test_every_spacing_gives_n_falling_timesteps_in_range(name, steps):
    schedule = Schedule.sd15()
    timesteps = SPACINGS[name](steps, schedule)
    assert len(timesteps) == steps
    assert all(a > b for a, b in pairwise(timesteps))
    assert 0 <= timesteps[-1] <= timesteps[0] <= 999
    with pytest.raises(ValueError, match=r"^steps: expected 1\.\.1000, got 1001$"):
        SPACINGS[name](1001, schedule)


def test_trailing_and_linspace_by_hand():
    assert trailing(5) == (999, 799, 599, 399, 199)
    assert trailing(3) == (999, 666, 332)
    assert linspace(4) == (999, 749.25, 499.5, 249.75)
    assert linspace(4, endpoint=True) == pytest.approx((999, 666, 333, 0))


def sigmas(timesteps) -> list[float]:
    schedule = Schedule.sd15()
    return [((1 - a) / a) ** 0.5 for a in map(schedule.alphas_cumprod_at, timesteps)]


def test_karras_log_snr_and_align_your_steps_are_even_in_what_they_say():
    schedule = Schedule.sd15()
    roots = np.array(sigmas(karras(10, schedule, endpoint=True))) ** (1 / 7)
    np.testing.assert_allclose(np.diff(roots), np.diff(roots)[0], rtol=1e-6)
    logs = np.log(sigmas(log_snr(10, schedule, endpoint=True)))
    np.testing.assert_allclose(np.diff(logs), np.diff(logs)[0], rtol=1e-6)
    # The first of the 11 published levels is 14.615 for 14.61465 at t = 999, the last is 0.029 for 0.02917 at t = 0.
    np.testing.assert_allclose(sigmas(align_your_steps(11, schedule, endpoint=True)), AYS_SD15_SIGMAS, rtol=6e-3)
    np.testing.assert_allclose(sigmas(align_your_steps(10, schedule)), AYS_SD15_SIGMAS[:-1], rtol=1e-4)
    for spacing in (karras, log_snr):
        assert (spacing(10, schedule, endpoint=True)[0], spacing(10, schedule, endpoint=True)[-1]) == (999, 0)


def test_without_the_endpoint_the_n_plus_first_level_is_the_end_of_the_run():
    schedule = Schedule.sd15()
    for spacing in (karras, log_snr, align_your_steps):
        assert spacing(10, schedule) == pytest.approx(spacing(11, schedule, endpoint=True)[:10])


def test_levels_between_timesteps_lie_on_lambdas_line():
    schedule = Schedule.sd15()
    assert schedule.alphas_cumprod_at(500) == float(schedule.alphas_cumprod[500])
    for t in (0.25, 333.5, 998.75):
        assert schedule.timestep_at(float(half_log_snr(schedule.alphas_cumprod_at(t)))) == pytest.approx(t)
        below, above = schedule.lambdas[int(t)], schedule.lambdas[int(t) + 1]
        share = t - int(t)
        assert half_log_snr(schedule.alphas_cumprod_at(t)) == pytest.approx(float(below + share * (above - below)))
    assert (schedule.timestep_at(-100.0), schedule.timestep_at(100.0)) == (999, 0)


def half_log_snr(a: float) -> float:
    return 0.5 * np.log(a / (1 - a))
