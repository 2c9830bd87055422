"""Guidance and the DDIM step in one, against the sampler's own step and against the formulas in float64."""

from math import sqrt

import pytest
import torch
from accuracy import randn, relative_error
from ldm_kernels.guided_ddim_step import guided_ddim_step, guided_ddim_step_op

from ldm.samplers import ddim
from ldm.schedule import Schedule


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 4, 3, 5), (18, 4, 6, 6)])
def test_a_step_is_the_formulas(dtype, shape):
    x, uncond, cond = randn(*shape), randn(*shape, seed=1, dtype=dtype), randn(*shape, seed=2, dtype=dtype)
    got = guided_ddim_step(x, uncond, cond, 7.5, 0.3, 0.4)
    eps = uncond.double() + 7.5 * (cond.double() - uncond.double())
    x0_pred = (x.double() - sqrt(0.7) * eps) / sqrt(0.3)
    exact = (sqrt(0.4) * x0_pred + sqrt(0.6) * eps, x0_pred, eps)
    for ours, true in zip(got, exact, strict=True):
        assert ours.dtype == torch.float32
        assert relative_error(ours, true) < 5e-7  # eight roundings of 6e-8 each, some of which cancel


def test_it_is_the_samplers_step():
    schedule, x_T = Schedule.sd15(), randn(2, 4, 4, 4)
    uncond, cond = randn(2, 4, 4, 4, seed=1), randn(2, 4, 4, 4, seed=2)
    step = next(ddim(lambda x, t, i: uncond + 3 * (cond - uncond), x_T, schedule, steps=10))
    a_t, a_prev = float(schedule.alphas_cumprod[901]), float(schedule.alphas_cumprod[801])
    x_prev, x0_pred, eps = guided_ddim_step(x_T, uncond, cond, 3.0, a_t, a_prev)
    for ours, theirs in ((x_prev, step.x_prev), (x0_pred, step.x0_pred), (eps, step.eps)):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)  # another order of the same float32 operations


def test_any_strides():
    x, uncond, cond = (randn(4, 4, 6, 4, seed=i).transpose(1, 3)[::2] for i in range(3))
    got = guided_ddim_step(x, uncond, cond, 2.0, 0.5, 0.6)
    expected = guided_ddim_step(x.contiguous(), uncond.contiguous(), cond.contiguous(), 2.0, 0.5, 0.6)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_the_op_keeps_torchs_rules():
    torch.library.opcheck(guided_ddim_step_op, (randn(2, 4), randn(2, 4, seed=1), randn(2, 4, seed=2), 7.5, 0.3, 0.4))


def test_a_gradient_is_refused_before_anything_is_computed():
    x = randn(2, 4).requires_grad_()
    with pytest.raises(ValueError, match="has no backward; call it under"):
        guided_ddim_step(x, x, x, 7.5, 0.3, 0.4)
    with torch.no_grad():
        guided_ddim_step(x, x, x, 7.5, 0.3, 0.4)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"eps_cond": torch.zeros(3, 4)}, r"eps_cond: shape \(3, 4\), expected x_t's shape = \(2, 4\)"),
        ({"x_t": torch.zeros(2, 4, dtype=torch.int32)}, "x_t: dtype torch.int32"),
        ({"x_t": torch.zeros(0, 4)}, "holds nothing"),
        ({"a_t": 0.0}, r"a_t, a_prev: 0.0, 0.4, expected in \(0, 1\]"),
    ],
)
def test_what_it_cannot_take_is_said_in_one_line(change, complaint):
    given = {name: torch.zeros(2, 4) for name in ("x_t", "eps_uncond", "eps_cond")}
    with pytest.raises(ValueError, match=complaint):
        guided_ddim_step(**(given | {"guidance_scale": 7.5, "a_t": 0.3, "a_prev": 0.4} | change))
