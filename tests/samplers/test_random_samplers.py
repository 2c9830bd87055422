"""Samplers that draw: the Brownian path of a seed, the distribution that they end in, and one image for more steps."""

import math
from itertools import pairwise

import pytest
import torch
from mixture import DEVIATIONS, MEANS, WEIGHTS, Mixture

from ldm.samplers import SAMPLERS, initial_noise, lcm, restart, step_noise
from ldm.schedule import Schedule, log_snr

SCHEDULE = Schedule.sd15()
MIXTURE = Mixture(SCHEDULE)
RANDOM = [name for name, sampler in SAMPLERS.items() if sampler.random]
SDE = ["dpm_solver_pp_sde", "dpm_solver_pp_2s_ancestral", "dpm_solver_pp_2m_sde", "dpm_solver_pp_3m_sde"]


def variance(noisier: float, cleaner: float) -> float:
    """Of the path between two log_snr."""
    return math.exp(2 * cleaner) - math.exp(2 * noisier)


# ---- the path ----------------------------------------------------------------------------------------


def test_the_path_of_a_whole_is_that_of_its_parts_in_any_order():
    marks = (-2.7, -1.5, -1.499, 0.3, 2, 3.5)
    noise = step_noise([3, 4], (4, 4, 4))
    parts = [noise.between(*part).double() * math.sqrt(variance(*part)) for part in pairwise(marks)]
    whole = step_noise([3, 4], (4, 4, 4)).between(marks[0], marks[-1]).double()
    torch.testing.assert_close(whole * math.sqrt(variance(marks[0], marks[-1])), sum(parts), rtol=0, atol=1e-4)
    assert torch.equal(noise.between(0.3, 2), step_noise([3, 4], (4, 4, 4)).between(0.3, 2))
    assert not noise.between(2, 2).any()


def test_the_path_belongs_to_the_seed():
    three = step_noise([7, 9, 7], (4, 4, 4)).between(-1, 0)
    assert torch.equal(three[0], three[2])
    assert torch.equal(three[1:2], step_noise([9], (4, 4, 4)).between(-1, 0))
    assert not torch.equal(three[0], three[1])


def test_what_it_does_is_standard_normal_and_independent_of_what_it_did():
    noise = step_noise([0], (4, 128, 128))
    parts = [noise.between(*part).flatten() for part in pairwise((-2, -1.9, -0.3, 1, 1.001))]
    for part in parts:
        assert float(part.mean()) == pytest.approx(0, abs=0.015)  # 65,536 draws: 4 standard errors are 0.016
        assert float(part.std()) == pytest.approx(1, abs=0.011)
    correlations = torch.corrcoef(torch.stack([*parts, noise(0).flatten(), noise(3).flatten()]))
    assert float((correlations - torch.eye(6)).abs().max()) < 0.016


# ---- where they end ----------------------------------------------------------------------------------


def run(name: str, steps: int, seeds=(0, 1, 2, 3), shape=(4, 32, 32)):
    x_T, noise = initial_noise(seeds, shape).double(), step_noise(seeds, shape)
    timesteps = log_snr(steps, SCHEDULE)
    *_, last = SAMPLERS[name](MIXTURE.eps, x_T, SCHEDULE, steps, noise=noise, timesteps=timesteps)
    return last.x_prev


@pytest.mark.parametrize("name", sorted(set(RANDOM) - {"lcm"}))
def test_they_end_in_the_mixture(name):
    """16,384 pixels: a standard error is 0.009 of the mean, 0.011 of the variance."""
    x, a = run(name, 100), SCHEDULE.final_alpha_cumprod
    mean = float(WEIGHTS @ MEANS) * math.sqrt(a)
    spread = float(WEIGHTS @ (DEVIATIONS**2 + MEANS**2)) * a + 1 - a - mean**2
    assert float(x.mean()) == pytest.approx(mean, abs=0.04)
    assert float(x.var()) == pytest.approx(spread, rel=0.05)
    centres = (-1.2, 0, 1.5)  # and its shape: how much lies below some places
    below = [float((x < centre).double().mean()) for centre in centres]
    expected = [float(MIXTURE._cdf(torch.tensor(float(centre), dtype=torch.float64), a)) for centre in centres]
    assert below == pytest.approx(expected, abs=0.025)


@pytest.mark.parametrize("name", SDE)
def test_more_steps_lead_to_the_same_image(name):
    fine = run(name, 320, (0,), (4, 8, 8))
    errors = [float((run(name, steps, (0,), (4, 8, 8)) - fine).norm() / fine.norm()) for steps in (10, 40)]
    assert errors[1] < errors[0] / 1.8


def test_lcm_goes_straight_to_x_0_and_back():
    noise = step_noise([0], (4, 4, 4))
    x_T = initial_noise([0], (4, 4, 4)).double()
    first, second = lcm(MIXTURE.eps, x_T, SCHEDULE, 2, noise=noise, timesteps=(999, 499))
    a = SCHEDULE.alphas_cumprod_at(499)
    torch.testing.assert_close(first.x_prev, math.sqrt(a) * first.x0_pred + math.sqrt(1 - a) * noise(0).double())
    to_zero = SCHEDULE.ending_at("zero")
    *_, last = lcm(MIXTURE.eps, x_T, to_zero, 2, noise=noise, timesteps=(999, 499))
    assert torch.equal(last.x_prev, last.x0_pred)
    torch.testing.assert_close(last.x0_pred, second.x0_pred)


def test_restart_takes_its_middle_again_once():
    noise = step_noise([0], (4, 4, 4))
    timesteps = log_snr(20, SCHEDULE)
    steps = list(
        restart(MIXTURE.eps, initial_noise([0], (4, 4, 4)).double(), SCHEDULE, 20, noise=noise, timesteps=timesteps)
    )
    inside = [t for t in timesteps if 0.1 < (1 / SCHEDULE.alphas_cumprod_at(t) - 1) ** 0.5 <= 2]
    again = [step for step in steps if step.evaluations > 2]
    assert [step.t for step in again] == [inside[-1]]
    assert again[0].evaluations == 2 + 2 * len(inside)
