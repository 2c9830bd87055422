"""DDIM with CFG++: by hand, against DDIM, and back."""

import pytest
import torch
from small_networks import ToyUNet, toy_context

from ldm.conditioning import constant
from ldm.guidance import guided
from ldm.samplers import ddim, ddim_cfgpp, initial_noise
from ldm.schedule import Schedule, leading
from ldm.traversal.inversion import cfgpp_inversion

SCHEDULE = Schedule.sd15()
X_T = initial_noise([0, 1], (4, 8, 8)).double()


def eps_of(scale: float, steps: int = 10):
    contexts = constant(toy_context(0.3).double(), steps)
    return guided(ToyUNet(), contexts, scale, toy_context(0.0).double())


def test_a_step_is_guided_x_0_and_unguided_noise():
    step = next(ddim_cfgpp(eps_of(0.6), X_T, SCHEDULE, 10))
    t, then = leading(10)[:2]
    x_in, context = X_T, toy_context(0.3).double()
    uncond = eps_of(0)(x_in, t, 0)
    cond = ToyUNet()(x_in, t, context.expand(2, -1, -1))
    a, b = SCHEDULE.alphas_cumprod_at(t), SCHEDULE.alphas_cumprod_at(then)
    x_0 = (x_in - (1 - a) ** 0.5 * (uncond + 0.6 * (cond - uncond))) / a**0.5
    torch.testing.assert_close(step.x_prev, b**0.5 * x_0 + (1 - b) ** 0.5 * uncond)
    assert step.evaluations == 1


def test_without_guidance_it_is_ddim():
    for scale in (0, 1):
        *_, ours = ddim_cfgpp(eps_of(scale), X_T, SCHEDULE, 10)
        *_, plain = ddim(eps_of(scale), X_T, SCHEDULE, 10)
        torch.testing.assert_close(ours.x_prev, plain.x_prev)


def test_the_inversion_is_retraced():
    x_0 = list(ddim_cfgpp(eps_of(0.6), X_T, SCHEDULE, 10))[-1].x_prev
    *_, up = cfgpp_inversion(eps_of(0.6), x_0, SCHEDULE, 10, iterations=60)
    *_, down = ddim_cfgpp(eps_of(0.6), up.x_t, SCHEDULE, 10)
    assert float((down.x_prev - x_0).norm() / x_0.norm()) < 1e-5


def test_a_scale_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"guidance_scale: ddim_cfgpp expects 0\.\.1, such as 0\.6, got 7\.5"):
        next(ddim_cfgpp(eps_of(7.5), X_T, SCHEDULE, 10))
    with pytest.raises(ValueError, match=r"guidance_scale: cfgpp_inversion expects 0\.\.1"):
        next(cfgpp_inversion(eps_of(7.5), X_T, SCHEDULE, 10))
