"""The hot operations, each by a kernel of `kernels/` where it serves, and as the networks say it in torch elsewhere.

Letters: B batch, N query positions, M key positions, h heads of width d, C channels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.blocks import attend
from ldm.fast import first_use
from ldm.fast.backend import Backend, resolved
from ldm.fast.first_use import low, short

HALF = (torch.float16, torch.bfloat16)
WIDEST_HEAD = 160
PROMPT_TOKENS = range(64, 81)  # that one block of the cross-attention kernel holds


def on_gpu(x: Tensor) -> bool:
    """Where kernels run by themselves."""
    return x.is_cuda


def _rows(x: Tensor) -> int:
    """Rows of the small case, for an operation on each row of x."""
    return short(x.numel() // max(1, x.shape[-1]))


@dataclass(frozen=True)
class Ops:
    """Kernels "auto": on CUDA, wherever dtype and shape are what they were made for, and the first use was right there
    (`ldm.fast.first_use`); "triton": always; "torch": never.

    Torch works in place where that loses nothing: while no gradients are asked for, on what nobody else holds.
    """

    kernels: Backend

    def served(self, x: Tensor, made_for: bool, op: str, sizes: Callable[[], tuple[float, ...]]) -> bool:
        """Whether to run a kernel on x; forced, the kernel itself says what it cannot.

        sizes: gives those of the small case that it is proven on, see `ldm.fast.first_use`; asked where kernels run.
        """
        if self.kernels == "auto":
            return made_for and on_gpu(x) and x.numel() > 0 and self._right(x, op, sizes())
        return self.kernels == "triton" and resolved("triton", x.device) == "triton"

    def _right(self, x: Tensor, op: str, sizes: tuple[float, ...]) -> bool:
        use = first_use.Use(op, sizes, x.dtype, x.device, torch.is_grad_enabled())
        return first_use.trusted(use, Ops("triton"), Ops("torch"))

    def attention(self, q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
        """See `ldm.blocks.attend`: q (B, N, h*d), k and v (B, M, h*d) -> (B, N, h*d)."""
        width = q.shape[-1] // heads
        made_for = q.dtype in HALF and q.shape[-1] % 16 == 0 and width % 8 == 0 and width <= WIDEST_HEAD
        if not self.served(q, made_for, "attention", lambda: (short(q.shape[1]), short(k.shape[1]), width, causal)):
            return attend(q, k, v, heads, causal)
        from ldm_kernels.attention import attention as self_attention
        from ldm_kernels.cross_attention import cross_attention

        q, k, v = (x.unflatten(-1, (heads, width)) for x in (q, k, v))
        if k.shape[1] in PROMPT_TOKENS and not causal:
            return cross_attention(q, k, v).flatten(2)
        return self_attention(q, k, v, causal).flatten(2)

    def geglu(self, x: Tensor) -> Tensor:
        """(..., 2C) -> (..., C): the first half times gelu(the second), with the exact (erf) GELU."""
        if not self.served(x, True, "geglu", lambda: (_rows(x), x.shape[-1])):
            value, gate = x.chunk(2, dim=-1)
            gate = F.gelu(gate)
            return value * gate if torch.is_grad_enabled() else gate.mul_(value)
        from ldm_kernels.geglu import geglu as kernel

        return kernel(x)

    def group_norm(self, x: Tensor, norm: nn.GroupNorm, time: Tensor | None = None, silu: bool = False) -> Tensor:
        """GroupNorm with the parameters of a module, what is added before it and the SiLU behind it as one step.

        Args:    x: (B, C, H, W).  time: (B, C), added at every position; None: nothing.  silu: apply it to the result.
        Returns: (B, C, H, W); channels_last from a kernel, which is also the layout that "auto" asks of x.
        """
        made_for = x.shape[1] % 8 == 0 and x.is_contiguous(memory_format=torch.channels_last)

        def sizes() -> tuple[float, ...]:
            height, options = low(x.shape[2], x.shape[3], x.shape[1]), (time is not None, silu)
            return x.shape[1], height, x.shape[3], norm.num_groups, norm.eps, *options

        if self.served(x, made_for, "group_norm", sizes):
            from ldm_kernels.group_norm_silu import group_norm_silu

            return group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps, time, silu)
        if time is not None:
            x = x + time[:, :, None, None]
        x = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
        return F.silu(x, inplace=not torch.is_grad_enabled()) if silu else x

    def add_layer_norm(self, x: Tensor, branch: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        """A branch added to the residual stream, and the LayerNorm that reads the sum.

        Args:    x, branch: (..., C).  norm: of C channels.
        Returns: x + branch, norm(x + branch).
        """
        made_for = x.dtype == branch.dtype
        if self.served(x, made_for, "add_layer_norm", lambda: (_rows(x), x.shape[-1], norm.eps)):
            from ldm_kernels.add_layer_norm import add_layer_norm as kernel

            return kernel(x, branch, norm.weight, norm.bias, norm.eps)
        x = x + branch
        return x, F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
