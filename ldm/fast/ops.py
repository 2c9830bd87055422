"""The hot operations, each as plain torch says it, and the switch to the fused kernel that computes the same.

    ops.use("triton")               for the whole process, like torch's own backend flags
    with ops.using("torch"): ...    while it is open

"auto": the kernels of `kernels/` on CUDA GPUs of compute capability 8.0 and newer, wherever dtype and shape are what
they were made for; plain torch everywhere else. "torch": never a kernel. "triton": always, and a ValueError that says
why where it cannot be; in Triton's interpreter (TRITON_INTERPRET=1) on the CPU too, slowly. Kernels hold no parameters.

Letters: B batch, N query positions, M key positions, h heads of width d, C channels.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

Backend = Literal["auto", "torch", "triton"]

HALF = (torch.float16, torch.bfloat16)
WIDEST_HEAD = 160
PROMPT_TOKENS = range(64, 81)  # that one block of the cross-attention kernel holds

_backend: Backend = "auto"
_TRITON = find_spec("triton") is not None  # asked, not imported: the CPU has no need of it


# ---- the switch ------------------------------------------------------------------------------------


def use(backend: Backend) -> None:
    """Choose what every network of this process computes with, from now on. Raises ValueError for another name."""
    global _backend
    if backend not in get_args(Backend):
        raise ValueError(f"backend: got {backend!r}, expected one of {', '.join(get_args(Backend))}")
    _backend = backend


@contextmanager
def using(backend: Backend) -> Iterator[None]:
    """`use`, until the `with` closes."""
    before = _backend
    use(backend)
    try:
        yield
    finally:
        use(before)


def resolved(device: torch.device) -> Backend:
    """What is computed with on a device, for the record: "triton" or "torch".

    Raises:  ValueError: "triton" was chosen, and cannot be there.
    """
    why_not = _why_not(device)
    if _backend == "triton" and why_not:
        raise ValueError(f"backend: triton was asked for, but {why_not}")
    if _backend == "auto" and device.type == "cuda" and not why_not:
        return "triton"
    return "triton" if _backend == "triton" else "torch"


def _why_not(device: torch.device) -> str | None:
    """Why no kernel can run on a device; None where they can. torch.compile reads it as a constant."""
    if not _TRITON:
        return "triton is not installed here"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda":
        return f"the tensors are on {device}; expected a CUDA GPU, or TRITON_INTERPRET=1 and patience"
    gpu = torch.cuda.get_device_properties(device)
    if gpu.major < 8:
        return f"{gpu.name} has compute capability {gpu.major}.{gpu.minor}, expected 8.0 or newer"
    return None


def fused(x: Tensor, made_for: bool = True) -> bool:
    """Whether to run a kernel on x. made_for: whether "auto" should; forced, the kernel itself says what it cannot."""
    if _backend == "auto":
        return x.is_cuda and made_for and x.numel() > 0 and not _why_not(x.device)
    return _backend == "triton" and resolved(x.device) == "triton"


# ---- the operations --------------------------------------------------------------------------------


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """Multi-head scaled dot-product attention.

    softmax(q k^T / sqrt(d)) v, for each head                                  [Vaswani et al. 2017, eq. 1]

    Args:    q: (B, N, h*d).  k, v: (B, M, h*d).  causal: position n sees keys 0..n only (N = M).
    Returns: (B, N, h*d), the heads side by side.
    """
    width = q.shape[-1] // heads
    if fused(q, made_for=q.dtype in HALF and q.shape[-1] % 16 == 0 and width % 8 == 0 and width <= WIDEST_HEAD):
        from ldm_kernels.attention import attention as self_attention
        from ldm_kernels.cross_attention import cross_attention

        q, k, v = (x.unflatten(-1, (heads, width)) for x in (q, k, v))
        if k.shape[1] in PROMPT_TOKENS and not causal:
            return cross_attention(q, k, v).flatten(2)
        return self_attention(q, k, v, causal).flatten(2)
    return plain_attention(q, k, v, heads, causal)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """`attention` without a kernel: for heads wider than any kernel takes, such as the autoencoder's."""
    q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return rearrange(out, "b h n d -> b n (h d)")


def geglu(x: Tensor) -> Tensor:
    """Gated GELU: the first half of the channels times gelu(the second half), with the exact (erf) GELU.

    [Shazeer 2020, "GLU variants improve transformer"]

    Args:    x: (..., 2C).
    Returns: (..., C).
    """
    if fused(x):
        from ldm_kernels.geglu import geglu as kernel

        return kernel(x)
    value, gate = x.chunk(2, dim=-1)
    gate = F.gelu(gate)
    return value * gate if torch.is_grad_enabled() else gate.mul_(value)  # nobody else holds the gate: memory saved


def group_norm(x: Tensor, norm: nn.GroupNorm, time: Tensor | None = None, silu: bool = False) -> Tensor:
    """GroupNorm with the parameters of a module, what is added before it and the SiLU behind it as one step.

    Args:    x: (B, C, H, W).  time: (B, C), added at every position; None: nothing.  silu: apply SiLU to the result.
    Returns: (B, C, H, W); channels_last where a kernel computes it, which is also the layout that "auto" asks of x.
    """
    if fused(x, made_for=x.shape[1] % 8 == 0 and x.is_contiguous(memory_format=torch.channels_last)):
        from ldm_kernels.group_norm_silu import group_norm_silu

        return group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps, time, silu)
    if time is not None:
        x = x + time[:, :, None, None]
    x = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return F.silu(x, inplace=not torch.is_grad_enabled()) if silu else x


def add_layer_norm(x: Tensor, branch: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """A branch added to the residual stream, and the LayerNorm that reads the sum.

    A norm that is watched (ldm/probe/taps.py) or is none of torch's is called as the module it is.

    Args:    x, branch: (..., C).  norm: of C channels.
    Returns: x + branch, norm(x + branch).
    """
    if type(norm) is nn.LayerNorm and not norm._forward_hooks and fused(x, made_for=x.dtype == branch.dtype):
        from ldm_kernels.add_layer_norm import add_layer_norm as kernel

        return kernel(x, branch, norm.weight, norm.bias, norm.eps)
    x = x + branch
    return x, norm(x)


def guided_ddim_step(
    x_t: Tensor, eps_uncond: Tensor, eps_cond: Tensor, guidance_scale: float, a_t: float, a_prev: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Guidance and the DDIM step behind it, where x_t is `fused`; plain torch says it in `ldm.samplers.ddim`.

    Args:    x_t, eps_uncond, eps_cond: (B, ...).  a_t, a_prev: alphas_cumprod of this timestep and of the next one.
    Returns: x_prev, x0_pred, eps: like x_t.
    """
    from ldm_kernels.guided_ddim_step import guided_ddim_step as kernel

    return kernel(x_t, eps_uncond, eps_cond, guidance_scale, a_t, a_prev)


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI CLIP's approximation of GELU: x * sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)
