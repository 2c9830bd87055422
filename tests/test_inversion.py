"""DDIM inversion: its identities, and the paths that diffusers computed."""

import pytest
import torch
from networks import small
from reference import golden, noise
from small_networks import ToyUNet, reference_run_inputs, toy_context
from torch import Tensor

from ldm.conditioning import constant
from ldm.guidance import guided
from ldm.inversion import ddim_inversion
from ldm.samplers import ddim, initial_noise
from ldm.schedule import Schedule, leading

SCHEDULE = Schedule.sd15()


def toy_eps(x_t: Tensor, t: int, step: int) -> Tensor:
    return ToyUNet()(x_t, t, toy_context(0.3, len(x_t)).to(x_t.dtype))


def test_with_the_exact_eps_it_finds_the_noise_that_ddim_started_from():
    x_0, eps = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    run = list(ddim_inversion(lambda x, t, step: eps, SCHEDULE.add_noise(x_0, eps, 0), SCHEDULE, 50))
    assert [step.index for step in run] == list(range(49, -1, -1))
    assert [step.t for step in run] == list(leading(50))[::-1]
    for step in run:
        torch.testing.assert_close(step.x_t, SCHEDULE.add_noise(x_0, eps, step.t))
        torch.testing.assert_close(step.x0_pred, x_0)


@pytest.mark.parametrize("steps", [5, 50])
def test_iterations_converge_to_the_path_that_ddim_takes_back(steps):
    x_0 = initial_noise([0, 1], (4, 8, 8)).double()

    def round_trip_error(iterations: int) -> float:
        *_, last = ddim_inversion(toy_eps, x_0, SCHEDULE, steps, iterations=iterations)
        *_, back = ddim(toy_eps, last.x_t, SCHEDULE, steps)
        return float((back.x_t - x_0).norm() / x_0.norm())

    errors = [round_trip_error(iterations) for iterations in (1, 2, 4, 32)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-9  # float64: a contraction by about 0.3 an iteration at 5 steps, faster at 50


def test_every_step_is_diffusers_at_guidance_1():
    stored = golden("inversion50_g1")
    _, (prompt, *_), _ = reference_run_inputs()
    eps_fn = guided(small("unet"), constant(prompt, 50), 1)
    run = list(ddim_inversion(eps_fn, noise("sampler.x0", (1, 4, 16, 16)), SCHEDULE, 50))
    assert [step.t for step in run] == stored["timesteps"].tolist()
    for step, reference, disagreement in zip(run, torch.from_numpy(stored["x"]), stored["noise.l2_rel"], strict=True):
        error = (step.x_t[0] - reference).norm() / reference.norm()
        # On random weights two references drift apart along the way: ten times what they do, and 2e-4 at most.
        assert error < min(max(10 * float(disagreement), 3e-6), 2e-4), step.index


def test_the_first_steps_are_diffusers_at_guidance_7_5():
    # On random weights the path is chaotic at this guidance after about 15 steps: two references part.
    stored = golden("inversion50_g7.5")
    _, (prompt, *_), uncond = reference_run_inputs()
    eps_fn = guided(small("unet"), constant(prompt, 50), 7.5, uncond)
    run = ddim_inversion(eps_fn, noise("sampler.x0", (1, 4, 16, 16)), SCHEDULE, 50)
    for step, reference in zip(run, torch.from_numpy(stored["x"])[:10], strict=False):
        assert (step.x_t[0] - reference).norm() / reference.norm() < 1e-4, step.index  # as for sampling at 7.5


def test_bad_numbers_are_refused_before_the_first_call():
    unet = ToyUNet()
    eps_fn = guided(unet, constant(toy_context(0.3), 50), 1)
    with pytest.raises(ValueError, match="iterations: expected 1 or more, got 0"):
        next(ddim_inversion(eps_fn, torch.zeros(1, 4, 8, 8), SCHEDULE, 50, iterations=0))
    with pytest.raises(ValueError, match="steps: got 20, expected 50"):
        next(ddim_inversion(eps_fn, torch.zeros(1, 4, 8, 8), SCHEDULE, 20))
    assert unet.calls == []
