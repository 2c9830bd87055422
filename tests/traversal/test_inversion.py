"""Inversion: DDIM's, with the paths that diffusers computed, and EDICT's; their identities."""

from collections.abc import Iterable

import pytest
import torch
from networks import small
from reference import golden, noise
from small_networks import ToyUNet, reference_run_inputs, toy_context
from torch import Tensor

from ldm.conditioning import constant, swap
from ldm.guidance import guided
from ldm.samplers import EpsFn, Step, ddim, initial_noise
from ldm.schedule import Schedule, leading
from ldm.traversal.inversion import ddim_inversion, edict, edict_inversion, fixed_point_inversion

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
        return float((back.x_prev - x_0).norm() / x_0.norm())

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


# ---- fixed points ----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [5, 50])
def test_every_step_is_settled_to_the_tolerance(steps):
    x_0 = initial_noise([0, 1], (4, 8, 8)).double()
    run = list(fixed_point_inversion(toy_eps, x_0, SCHEDULE, steps, tolerance=1e-12))
    assert [(step.index, step.t) for step in run] == list(enumerate(leading(steps)))[::-1]
    for step in run:
        # x_prev is DDIM's step down from x_t: what a fixed point is.
        (down, *_) = ddim(toy_eps, step.x_t, SCHEDULE, steps, start=step.index)
        torch.testing.assert_close(down.x_prev, step.x_prev, rtol=0, atol=1e-10)
        torch.testing.assert_close(down.eps, step.eps, rtol=0, atol=1e-9)
        torch.testing.assert_close(down.x0_pred, step.x0_pred, rtol=0, atol=1e-9)


def test_a_tolerance_costs_what_it_needs_and_no_more():
    x_0 = initial_noise([0], (4, 8, 8)).double()

    def evaluations(tolerance: float, iterations: int = 30) -> int:
        unet = ToyUNet()
        eps_fn = guided(unet, constant(toy_context(0.3).double(), 20), 1)
        last(fixed_point_inversion(eps_fn, x_0, SCHEDULE, 20, tolerance=tolerance, iterations=iterations))
        return eps_fn.rows

    assert evaluations(1e-2) < evaluations(1e-6) < evaluations(1e-12) < 20 * 30
    assert evaluations(1e-12, iterations=2) == 40
    assert evaluations(float("inf")) == 20


def test_one_iteration_is_the_naive_inversion():
    x_0 = initial_noise([0, 1], (4, 8, 8)).double()
    fixed = fixed_point_inversion(toy_eps, x_0, SCHEDULE, 20, iterations=1)
    for ours, naive in zip(fixed, ddim_inversion(toy_eps, x_0, SCHEDULE, 20), strict=True):
        torch.testing.assert_close(ours.x_t, naive.x_t)
        torch.testing.assert_close(ours.eps, naive.eps)


def test_where_eps_is_linear_the_secant_step_is_exact():
    # eps = z: g is affine with one slope. Two evaluations know it, a secant step hits its fixed point, a third sees it.
    calls = []

    def eps(x: Tensor, t: int, step: int) -> Tensor:
        calls.append(t)
        return x

    x_0 = initial_noise([0], (4, 8, 8)).double()
    run = list(fixed_point_inversion(eps, x_0, SCHEDULE, 4, tolerance=1e-9))
    assert len(calls) == 4 * 3
    for step in run:
        a_t, x = float(SCHEDULE.alphas_cumprod[step.t]), step.x_t
        torch.testing.assert_close(step.eps, x)
        torch.testing.assert_close(step.x0_pred, (x - (1 - a_t) ** 0.5 * x) / a_t**0.5)


def test_a_sample_is_settled_by_itself():
    # The second sample takes more iterations than the first, which must not notice.
    x_0 = torch.cat([0.01 * initial_noise([0], (4, 8, 8)), 3 * initial_noise([1], (4, 8, 8))])
    together = last(fixed_point_inversion(toy_eps, x_0, SCHEDULE, 10)).x_t
    for row in range(2):
        alone = last(fixed_point_inversion(toy_eps, x_0[row : row + 1], SCHEDULE, 10)).x_t
        assert torch.equal(alone[0], together[row])


def test_what_does_not_settle_is_left_early():
    calls = []

    def eps(x: Tensor, t: int, step: int) -> Tensor:
        calls.append(t)
        return 40 * torch.sin(9 * x)  # no contraction anywhere

    run = list(fixed_point_inversion(eps, initial_noise([0], (4, 8, 8)), SCHEDULE, 10))
    assert len(run) == 10
    assert all(step.x_t.isfinite().all() for step in run)
    assert len(calls) < 10 * 30


def test_bad_tolerances_are_refused():
    with pytest.raises(ValueError, match="tolerance: expected 0 or more, got nan"):
        next(fixed_point_inversion(toy_eps, torch.zeros(1, 4, 8, 8), SCHEDULE, 50, tolerance=float("nan")))
    with pytest.raises(ValueError, match="iterations: expected 1 or more, got 0"):
        next(fixed_point_inversion(toy_eps, torch.zeros(1, 4, 8, 8), SCHEDULE, 50, iterations=0))


# ---- EDICT -----------------------------------------------------------------------------------------


def wild_eps(x_t: Tensor, t: int, step: int) -> Tensor:
    """A nonlinear function that mixes all values by random numbers: no structure that an inversion could lean on."""
    generator = torch.Generator().manual_seed(step)
    weights = torch.randn(256, 256, generator=generator, dtype=torch.float64) / 4
    return torch.tanh(x_t.flatten(1).double() @ weights + t / 1000).unflatten(1, x_t.shape[1:]).to(x_t.dtype)


def last(steps: Iterable[Step]) -> Step:
    *_, step = steps
    return step


@pytest.mark.parametrize("steps", [1, 5, 50])
def test_edict_inverts_any_function_from_the_image_to_the_noise_and_back(steps):
    x_0, y_0 = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    up = last(edict_inversion(wild_eps, x_0, SCHEDULE, steps, history=(y_0,)))
    down = last(edict(wild_eps, up.x_t, SCHEDULE, steps, history=up.history))
    # Rounding of float64, 1e-16 a step, which the wild function amplifies.
    torch.testing.assert_close(down.x_prev, x_0, rtol=0, atol=1e-9)
    torch.testing.assert_close(down.history[0], y_0, rtol=0, atol=1e-9)


def test_edict_inverts_from_the_noise_to_the_image_and_back():
    x_T, y_T = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    down = last(edict(wild_eps, x_T, SCHEDULE, 20, history=(y_T,)))
    up = last(edict_inversion(wild_eps, down.x_prev, SCHEDULE, 20, history=down.history))
    torch.testing.assert_close(up.x_t, x_T, rtol=0, atol=1e-7)  # undoing 20 mixings multiplies rounding by 18
    torch.testing.assert_close(up.history[0], y_T, rtol=0, atol=1e-7)


def test_edict_inverts_in_float32_too():
    x_0 = initial_noise([0, 1], (4, 8, 8))
    up = last(edict_inversion(toy_eps, x_0, SCHEDULE, 50))
    down = last(edict(toy_eps, up.x_t, SCHEDULE, 50, history=up.history))
    assert (down.x_prev - x_0).norm() / x_0.norm() < 1e-5  # a hundred roundings of 6e-8


def test_edict_meets_every_latent_of_its_inversion_again():
    x_0 = initial_noise([3], (4, 8, 8)).double()
    up = list(edict_inversion(wild_eps, x_0, SCHEDULE, 10))
    down = list(edict(wild_eps, up[-1].x_t, SCHEDULE, 10, history=up[-1].history))
    assert [step.index for step in up] == list(range(9, -1, -1))
    assert [step.t for step in down] == [step.t for step in up[::-1]] == list(leading(10))
    for back, there in zip(down, up[::-1], strict=True):
        torch.testing.assert_close(back.x_prev, there.x_prev, rtol=0, atol=1e-9)
        torch.testing.assert_close(back.x_t, there.x_t, rtol=0, atol=1e-9)
        torch.testing.assert_close(back.eps, there.eps, rtol=0, atol=1e-9)
        a_t = float(SCHEDULE.alphas_cumprod[back.t])
        torch.testing.assert_close(back.x_t, a_t**0.5 * back.x0_pred + (1 - a_t) ** 0.5 * back.eps)


def test_edict_by_hand_for_one_step():
    # One step goes from t = 1 to alphas_cumprod[0]; eps(z) = z^2, p = 0.9, x = 1, y = 2.
    a_t, a_prev = (float(SCHEDULE.alphas_cumprod[t]) for t in (1, 0))
    c = (a_prev / a_t) ** 0.5
    d = (1 - a_prev) ** 0.5 - c * (1 - a_t) ** 0.5
    x_inter = c * 1 + d * 4
    y_inter = c * 2 + d * x_inter**2
    x = 0.9 * x_inter + 0.1 * y_inter
    y = 0.9 * y_inter + 0.1 * x
    ones = torch.ones(1, 4, 1, 1, dtype=torch.float64)
    (step,) = edict(lambda z, t, step: z * z, ones, SCHEDULE, 1, history=(2 * ones,), mixing=0.9)
    torch.testing.assert_close(step.x_prev, x * ones)
    torch.testing.assert_close(step.history[0], y * ones)


def test_where_eps_does_not_depend_on_the_latent_edict_is_ddim():
    x_T = initial_noise([0], (4, 8, 8)).double()
    eps = initial_noise([1], (4, 8, 8)).double()
    for ours, theirs in zip(
        edict(lambda x, t, step: eps, x_T, SCHEDULE, 10),
        ddim(lambda x, t, step: eps, x_T, SCHEDULE, 10),
        strict=True,
    ):
        for name in ("x_t", "x_prev", "eps", "x0_pred"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
        torch.testing.assert_close(ours.history[0], ours.x_prev)


def test_edict_approaches_ddim_as_steps_grow():
    x_T = initial_noise([0, 1], (4, 8, 8)).double()

    def distance(steps: int) -> float:
        ours = last(edict(toy_eps, x_T, SCHEDULE, steps)).x_prev
        return float((ours - last(ddim(toy_eps, x_T, SCHEDULE, steps)).x_prev).norm() / x_T.norm())

    assert distance(200) < distance(50) < distance(20)
    assert distance(200) < distance(20) / 5  # first order: a tenth


def test_edict_goes_on_from_a_pair_and_changes_prompts_by_the_step():
    prompts = swap(toy_context(0.3).double(), toy_context(-0.6).double(), at=4, steps=10)
    eps_fn = guided(ToyUNet(), prompts, 1)
    x_T = initial_noise([0], (4, 8, 8)).double()
    whole = list(edict(eps_fn, x_T, SCHEDULE, 10))
    rest = list(edict(eps_fn, whole[3].x_prev, SCHEDULE, 10, history=whole[3].history, start=4))
    assert [step.index for step in rest] == list(range(4, 10))
    assert torch.equal(rest[-1].x_prev, whole[-1].x_prev)
    up = last(edict_inversion(eps_fn, whole[-1].x_prev, SCHEDULE, 10, history=whole[-1].history))
    torch.testing.assert_close(up.x_t, x_T, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixing": 0.0}, "mixing: expected above 0"),
        ({"mixing": 1.1}, "mixing: expected above 0"),
        ({"start": 51}, r"start: expected 0\.\.50"),
        ({"history": (torch.zeros(1, 4, 8, 9),)}, r"history: expected one partner like x, \(1, 4, 8, 8\)"),
        ({"history": (torch.zeros(1, 4, 8, 8),) * 2}, "history: expected one partner"),
        ({"steps": 20}, "steps: got 20, expected 50"),
    ],
)
def test_bad_arguments_of_edict_are_refused_before_the_first_call(options, message):
    unet = ToyUNet()
    eps_fn = guided(unet, constant(toy_context(0.3), 50), 1)
    with pytest.raises(ValueError, match=message):
        next(edict(eps_fn, torch.zeros(1, 4, 8, 8), SCHEDULE, **{"steps": 50, **options}))
    assert unet.calls == []


# ---- guidance --------------------------------------------------------------------------------------


def test_with_the_prompt_as_the_negative_one_any_guidance_retraces():
    x_0 = initial_noise([0], (4, 8, 8)).double()
    prompt = toy_context(0.3).double()
    eps_fn = guided(ToyUNet(), constant(prompt, 20), 1)
    up = last(fixed_point_inversion(eps_fn, x_0, SCHEDULE, 20, tolerance=1e-12))
    for scale in (1, 3, 7.5, -2):
        eps_fn = guided(ToyUNet(), constant(prompt, 20), scale, prompt)
        torch.testing.assert_close(last(ddim(eps_fn, up.x_t, SCHEDULE, 20)).x_prev, x_0, rtol=0, atol=1e-9)


def test_where_guidance_is_strong_the_fixed_point_is_lost_and_edict_is_not():
    # eps = tanh(z) against -tanh(z): guidance multiplies its slope by 2 g - 1, until a step no longer contracts.
    def eps(scale: float) -> EpsFn:
        return lambda x, t, step: (2 * scale - 1) * torch.tanh(3 * x)

    x_0 = initial_noise([0], (4, 8, 8)).double()

    def fixed_point_error(scale: float) -> float:
        up = last(fixed_point_inversion(eps(scale), x_0, SCHEDULE, 20))
        return float((last(ddim(eps(scale), up.x_t, SCHEDULE, 20)).x_prev - x_0).norm() / x_0.norm())

    assert fixed_point_error(1) < 20 * 1e-5  # 20 steps, each settled to the tolerance
    assert fixed_point_error(7.5) > 0.02
    up = last(edict_inversion(eps(7.5), x_0, SCHEDULE, 20))
    down = last(edict(eps(7.5), up.x_t, SCHEDULE, 20, history=up.history))
    torch.testing.assert_close(down.x_prev, x_0, rtol=0, atol=1e-6)
