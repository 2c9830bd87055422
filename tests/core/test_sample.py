"""`StableDiffusion.sample` is the lines that it stands for, with every option handed on."""

import pytest
import torch
from small_networks import ToyUNet, sampling_model, toy_context

from ldm.conditioning import constant, swap
from ldm.guidance import guided
from ldm.samplers import SAMPLERS, Sampler, ddim, initial_noise, step_noise
from ldm.schedule import SPACINGS, Schedule

SCHEDULE, SHAPE, SEEDS = Schedule.sd15(), (4, 64, 64), [3, 5]
PROMPT, OTHER, EMPTY = (toy_context(value) for value in (0.3, 0.8, 0.0))


def sampled(contexts=PROMPT, seeds=SEEDS, *, max_batch=None, **options):
    options = {"steps": 5, "negative": EMPTY, **options}
    return list(sampling_model(ToyUNet(), max_batch).sample(contexts, seeds, **options))


@torch.no_grad()
def by_hand(contexts, sampler=ddim, scale=7.5, **options):
    eps_fn = guided(ToyUNet(), contexts, scale, EMPTY)
    return list(sampler(eps_fn, initial_noise(SEEDS, SHAPE), SCHEDULE, len(contexts), **options))


def assert_same(run, expected):
    assert [step.index for step in run] == [step.index for step in expected]
    for ours, theirs in zip(run, expected, strict=True):
        assert torch.equal(ours.x_prev, theirs.x_prev)


def test_it_is_guidance_and_ddim():
    assert_same(sampled(), by_hand(constant(PROMPT, 5)))
    assert_same(sampled(swap(PROMPT, OTHER, 2, 5), steps=None), by_hand(swap(PROMPT, OTHER, 2, 5)))
    assert_same(sampled(guidance_scale=1, negative=None), by_hand(constant(PROMPT, 5), scale=1))
    assert len(sampled(steps=None)) == 50


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_goes_by_its_name(name):
    noise = step_noise(SEEDS, SHAPE)
    timesteps = SPACINGS["trailing"](5, SCHEDULE)
    scale = 0.6 if SAMPLERS[name].uncond else 7.5
    expected = by_hand(constant(PROMPT, 5), SAMPLERS[name], scale, noise=noise, timesteps=timesteps)
    assert_same(sampled(sampler=name, spacing="trailing", guidance_scale=scale), expected)
    assert_same(sampled(sampler=name, spacing=timesteps, guidance_scale=scale), expected)


def test_names_that_users_know_and_ends():
    assert_same(sampled(sampler="k_lms_karras"), sampled(sampler="lms", spacing="karras"))
    to_zero = SCHEDULE.ending_at("zero")
    timesteps = SPACINGS["karras"](5, to_zero)
    found = sampled(sampler="dpmpp_2m_karras", end="zero")
    assert [step.t for step in found] == [*timesteps]
    assert found[-1].t == 0
    assert torch.equal(found[-1].x_prev, found[-1].x0_pred)


def test_a_sampler_of_ones_own_goes_as_itself():
    mine = Sampler("mine", lambda now, then, x_t, eps, run: x_t - 0.1 * eps, order=None)
    assert_same(sampled(sampler=mine), by_hand(constant(PROMPT, 5), mine))


def test_eta_draws_the_seeds_noise():
    expected = by_hand(constant(PROMPT, 5), eta=0.5, noise=step_noise(SEEDS, SHAPE))
    assert_same(sampled(eta=0.5), expected)


def test_a_run_goes_on_from_any_step():
    whole = sampled(sampler="unipc")
    rest = sampled(sampler="unipc", x_T=whole[1].x_prev, start=2, history=whole[1].history)
    assert_same(rest, whole[2:])


def test_size_and_the_batch_limit():
    assert sampled(size=(8, 16))[-1].x_prev.shape == (2, 4, 8, 16)
    unet = ToyUNet()
    list(sampling_model(unet, max_batch=2).sample(PROMPT, SEEDS, steps=1, negative=EMPTY))
    assert [rows for rows, *_ in unet.calls] == [2, 2]


def test_no_gradients_are_recorded_and_the_callers_mode_is_left_alone():
    prompt = PROMPT.clone().requires_grad_()
    for step in sampling_model(ToyUNet()).sample(prompt, [0], steps=2, negative=EMPTY):
        assert not step.x_prev.requires_grad
        assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "dim"}, "sampler: expected one of ddim, .*, got 'dim'"),
        ({"sampler": "lms_karras", "spacing": "beta"}, "spacing: got 'beta' beside sampler 'lms_karras'"),
        ({"end": "nought"}, "end: expected one of sigma_min, zero, got 'nought'"),
        ({"spacing": "even"}, "spacing: expected one of leading, .*, got 'even'"),
        ({"contexts": constant(PROMPT, 4)}, "steps: expected 4, as many as there are contexts for, got 5"),
        ({"x_T": torch.zeros(3, *SHAPE)}, "x_T: expected 2 rows, one a seed, got 3"),
        ({"contexts": PROMPT.expand(3, -1, -1)}, "context: expected a batch of 1 or 2, as x_t's, got 3"),
        ({"eta": 0.5, "sampler": "euler"}, r"eta: euler has none, expected 0, got 0\.5"),
        ({"spacing": (900, 500)}, "timesteps: expected 5 falling values"),
        ({"seeds": []}, "seeds: expected at least one"),
    ],
)
def test_errors_name_the_argument(options, message):
    with pytest.raises(ValueError, match=message):
        sampled(**options)
