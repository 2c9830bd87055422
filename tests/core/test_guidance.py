"""Classifier-free guidance: what it computes, what it costs, and what it refuses."""

import pytest
import torch
from small_networks import ToyUNet, toy_context
from torch.autograd import forward_ad

from ldm.conditioning import constant, swap
from ldm.guidance import guided

X = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
COND, UNCOND = toy_context(0.7), toy_context(-0.2)


def test_scale_1_is_the_conditional_prediction_for_half_the_price():
    unet = ToyUNet()
    eps_fn = guided(unet, constant(COND, 10), guidance_scale=1, uncond=UNCOND)
    assert torch.equal(eps_fn(X, 500, 0), ToyUNet()(X, 500, COND.expand(3, -1, -1)))
    assert len(unet.calls) == 1
    assert eps_fn.rows == 3


@pytest.mark.parametrize("scale", [0.0, 2.0, 7.5, -1.0])
def test_guidance_extrapolates_from_uncond_through_cond(scale):
    eps_fn = guided(ToyUNet(), constant(COND, 10), scale, UNCOND)
    cond, uncond = (ToyUNet()(X, 500, context.expand(3, -1, -1)) for context in (COND, UNCOND))
    assert torch.equal(eps_fn(X, 500, 0), uncond + scale * (cond - uncond))


def test_equal_contexts_make_guidance_vanish():
    eps = guided(ToyUNet(), constant(COND, 10), 7.5, COND.clone())(X, 500, 0)
    assert torch.equal(eps, guided(ToyUNet(), constant(COND, 10), 1)(X, 500, 0))


def test_both_halves_go_in_one_call_unconditional_first():
    unet = ToyUNet()
    eps_fn = guided(unet, constant(COND, 10), 7.5, UNCOND)
    for step in range(4):
        eps_fn(X, 500 - step, step)
    assert [(rows, t) for rows, t, _ in unet.calls] == [(6, 500), (6, 499), (6, 498), (6, 497)]
    assert torch.equal(unet.calls[0][2], UNCOND[0])
    assert eps_fn.rows == 24


def test_the_prompt_follows_its_schedule_and_so_may_the_negative_prompt():
    contexts, negative = swap(COND, toy_context(2.0), at=3, steps=10), swap(UNCOND, toy_context(0.1), at=6, steps=10)
    eps_fn = guided(ToyUNet(), contexts, 7.5, negative)
    for step, (prompt, other) in {2: (0.7, -0.2), 3: (2.0, -0.2), 6: (2.0, 0.1)}.items():
        expected = guided(ToyUNet(), constant(toy_context(prompt), 10), 7.5, toy_context(other))(X, 500, 0)
        assert torch.equal(eps_fn(X, 500, step), expected)


@pytest.mark.parametrize("scale", [1.0, 7.5])
@pytest.mark.parametrize("max_batch", [1, 2, 3, 99])
def test_max_batch_bounds_the_calls_and_nothing_else(scale, max_batch):
    unet = ToyUNet()
    eps_fn = guided(unet, constant(COND, 10), scale, UNCOND, max_batch=max_batch)
    assert torch.equal(eps_fn(X, 500, 0), guided(ToyUNet(), constant(COND, 10), scale, UNCOND)(X, 500, 0))
    largest = {1.0: {1: 1, 2: 2, 3: 3, 99: 3}, 7.5: {1: 2, 2: 2, 3: 2, 99: 6}}  # the two rows of a latent together
    assert max(rows for rows, *_ in unet.calls) == largest[scale][max_batch]
    assert eps_fn.rows == (3 if scale == 1 else 6)


@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_a_half_precision_network_works_under_float32_latents(scale):
    seen = set()

    def unet(x_t, t, context):
        seen.update({x_t.dtype, context.dtype})
        return ToyUNet()(x_t, t, context)

    eps = guided(unet, constant(COND.bfloat16(), 10), scale, UNCOND.bfloat16())(X, 500, 0)
    assert seen == {torch.bfloat16}
    assert eps.dtype == torch.float32
    exact = guided(ToyUNet(), constant(COND, 10), scale, UNCOND)(X, 500, 0)
    assert (eps - exact).norm() / exact.norm() < 2**-5  # bfloat16 keeps 8 bits; guidance multiplies what they lack
    assert torch.equal(eps, eps.bfloat16().float()) == (scale == 1)  # guidance combines its halves in float32


def test_uncond_comes_with_or_without_a_batch():
    plain = guided(ToyUNet(), constant(COND, 10), 7.5, UNCOND)(X, 500, 0)
    assert torch.equal(guided(ToyUNet(), constant(COND, 10), 7.5, UNCOND[0])(X, 500, 0), plain)
    assert torch.equal(guided(ToyUNet(), constant(COND, 10), 7.5, UNCOND.repeat(3, 1, 1))(X, 500, 0), plain)


@pytest.mark.parametrize(
    ("uncond", "message"),
    [
        (None, "uncond: expected the empty prompt's context for guidance_scale 7.5, got None"),
        (constant(UNCOND, 9), "uncond: expected 10 steps, .* got 9"),
        (UNCOND[:, :2], r"uncond: expected \(L, D\).* \(3, 8\).* got \(2, 8\)"),
        (UNCOND.double(), "uncond: .*float32.* got .*float64"),
        (UNCOND[None], r"uncond: expected \(L, D\) or \(B, L, D\), got \(1, 1, 3, 8\)"),
    ],
)
def test_contexts_that_cannot_run_are_refused_before_the_first_call(uncond, message):
    with pytest.raises(ValueError, match=message):
        guided(ToyUNet(), constant(COND, 10), 7.5, uncond)


def test_batches_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="context: expected a batch of 1 or 3, as x_t's, got 2"):
        guided(ToyUNet(), constant(COND.repeat(2, 1, 1), 10), 1)(X, 500, 0)
    with pytest.raises(ValueError, match="uncond: expected a batch of 1 or 3, as x_t's, got 2"):
        guided(ToyUNet(), constant(COND, 10), 7.5, UNCOND.repeat(2, 1, 1))(X, 500, 0)
    with pytest.raises(ValueError, match="max_batch: expected 1 or more, or None, got 0"):
        guided(ToyUNet(), constant(COND, 10), 1, max_batch=0)
    with pytest.raises(ValueError, match=r"step: expected 0\.\.9"):
        guided(ToyUNet(), constant(COND, 10), 1)(X, 500, 10)


def eps_of(context, uncond):
    return guided(ToyUNet(), constant(context, 10), 7.5, uncond)(X, 500, 0)


def test_gradients_reach_both_prompts():
    context, uncond = COND.clone().requires_grad_(), UNCOND.clone().requires_grad_()
    for _ in range(2):
        eps_of(context, uncond).sum().backward()
    assert context.grad.any()
    assert uncond.grad.any()


def test_forward_derivatives_reach_the_prompts():
    given, along = (COND, UNCOND), (torch.ones_like(COND), torch.zeros_like(UNCOND))
    _, expected = torch.autograd.functional.jvp(eps_of, given, along)  # by gradients of gradients
    _, found = torch.func.jvp(eps_of, given, along)
    torch.testing.assert_close(found, expected)
    with forward_ad.dual_level():
        dual = eps_of(*(forward_ad.make_dual(x, d) for x, d in zip(given, along, strict=True)))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, expected)
