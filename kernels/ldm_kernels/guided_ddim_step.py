"""Classifier-free guidance and the DDIM step behind it, in one pass over the latents.

    eps     = eps_uncond + g (eps_cond - eps_uncond)                            [Ho and Salimans 2022]
    x0_pred = (x_t - sqrt(1 - a_t) eps) / sqrt(a_t)                             [Song et al. 2020, eq. 9]
    x_prev  = sqrt(a_prev) x0_pred + sqrt(1 - a_prev) eps                       [eq. 12, eta = 0]

Letters: P numbers in a batch of latents. A program takes BLOCK of them in a row from each of the three inputs and
writes the three results: one launch for what plain torch takes nine for. Latents are small (64 KiB each in float32), so
this saves launches, not bandwidth. `ldm.samplers.ddim` takes it under guidance.

Forward only: sampling needs no gradient. A gradient that is asked for all the same is an error.
"""

from collections.abc import Iterator
from math import sqrt

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldm_kernels.checks import MOST_ELEMENTS, require_alike, require_shape
from ldm_kernels.specs import Spec

# ---- kernel ----------------------------------------------------------------------------------------


@triton.jit
def step_kernel(
    x_t, eps_uncond, eps_cond, x_prev, x0_pred, eps, P,
    guidance, noise_now, one_over_signal_now, signal_next, noise_next, BLOCK: tl.constexpr,
):  # fmt: skip
    """noise = sqrt(1 - a), signal = sqrt(a), of the timestep now and of the next."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < P
    x = tl.load(x_t + at, mask=there).to(tl.float32)
    uncond = tl.load(eps_uncond + at, mask=there).to(tl.float32)
    cond = tl.load(eps_cond + at, mask=there).to(tl.float32)
    guided = uncond + guidance * (cond - uncond)
    clean = (x - noise_now * guided) * one_over_signal_now
    tl.store(eps + at, guided, mask=there)
    tl.store(x0_pred + at, clean, mask=there)
    tl.store(x_prev + at, signal_next * clean + noise_next * guided, mask=there)


# ---- launcher --------------------------------------------------------------------------------------

BLOCK, WARPS = 512, 4


def launch(
    x_t: Tensor, eps_uncond: Tensor, eps_cond: Tensor, guidance_scale: float, a_t: float, a_prev: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x_prev, x0_pred, eps, in x_t's dtype."""
    require_alike(x_t=x_t, eps_uncond=eps_uncond, eps_cond=eps_cond)
    require_shape("eps_uncond", eps_uncond, tuple(x_t.shape), "x_t's shape")
    require_shape("eps_cond", eps_cond, tuple(x_t.shape), "x_t's shape")
    if not (0 < a_t <= 1 and 0 < a_prev <= 1) or x_t.numel() >= MOST_ELEMENTS:
        raise ValueError(f"a_t, a_prev: {a_t}, {a_prev}, expected in (0, 1], and fewer than 2^31 latents")
    x_prev, x0_pred, eps = (x_t.new_empty(x_t.shape) for _ in range(3))
    step_kernel[(triton.cdiv(x_t.numel(), BLOCK),)](
        *(x_t.contiguous(), eps_uncond.contiguous(), eps_cond.contiguous(), x_prev, x0_pred, eps, x_t.numel()),
        *(guidance_scale, sqrt(1 - a_t), 1 / sqrt(a_t), sqrt(a_prev), sqrt(1 - a_prev)),
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return x_prev, x0_pred, eps


# ---- registration ----------------------------------------------------------------------------------


@torch.library.custom_op("ldm::guided_ddim_step", mutates_args=())
def guided_ddim_step_op(
    x_t: Tensor, eps_uncond: Tensor, eps_cond: Tensor, guidance_scale: float, a_t: float, a_prev: float
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(x_t):
        return launch(x_t, eps_uncond, eps_cond, guidance_scale, a_t, a_prev)


@guided_ddim_step_op.register_fake
def _(
    x_t: Tensor, eps_uncond: Tensor, eps_cond: Tensor, guidance_scale: float, a_t: float, a_prev: float
) -> tuple[Tensor, Tensor, Tensor]:
    return x_t.new_empty(x_t.shape), x_t.new_empty(x_t.shape), x_t.new_empty(x_t.shape)


def guided_ddim_step(
    x_t: Tensor, eps_uncond: Tensor, eps_cond: Tensor, guidance_scale: float, a_t: float, a_prev: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One guided, deterministic DDIM step; not differentiable.

    Args:    x_t: (B, ...) latents, float32 for sampling.  eps_uncond, eps_cond: like x_t, any supported dtype.
             a_t, a_prev: alphas_cumprod at this step's timestep and the next one's.
    Returns: x_prev, x0_pred, eps: like x_t, contiguous.
    Raises:  ValueError: other shapes or dtypes, different devices, nothing in them, or a gradient asked for.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in (x_t, eps_uncond, eps_cond)):
        raise ValueError("guided_ddim_step: asked for a gradient, but has no backward; call it under torch.no_grad()")
    return guided_ddim_step_op(x_t, eps_uncond, eps_cond, guidance_scale, a_t, a_prev)


# ---- for the compiler ------------------------------------------------------------------------------


def compile_specs() -> Iterator[Spec]:
    """What to compile: float32 latents, float16 predictions."""
    pointers = {"x_t": "*fp32", "eps_uncond": "*fp16", "eps_cond": "*fp16"}
    pointers |= dict.fromkeys(("x_prev", "x0_pred", "eps"), "*fp32")
    scalars = ("guidance", "noise_now", "one_over_signal_now", "signal_next", "noise_next")
    yield Spec(
        name=f"guided_ddim_step {BLOCK} w{WARPS}",
        fn=step_kernel,
        signature={**pointers, "P": "i32", **dict.fromkeys(scalars, "fp32"), "BLOCK": "constexpr"},
        constexprs={"BLOCK": BLOCK},
        divisible=(*pointers, "P"),
        num_warps=WARPS,
        num_stages=1,
        capabilities=(80, 86, 89, 90),
    )
