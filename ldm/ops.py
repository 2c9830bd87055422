"""The hot operations, each as plain torch says it: what a fused kernel has to compute.

Letters: B batch, N query positions, M key positions, h heads of width d, C channels.
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """Multi-head scaled dot-product attention.

    softmax(q k^T / sqrt(d)) v, for each head                                  [Vaswani et al. 2017, eq. 1]

    Args:    q: (B, N, h*d).  k, v: (B, M, h*d).  causal: position n sees keys 0..n only (N = M).
    Returns: (B, N, h*d), the heads side by side.
    """
    q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return rearrange(out, "b h n d -> b n (h d)")


def geglu(x: Tensor) -> Tensor:
    """Gated GELU: the first half of the channels times gelu(the second half), with the exact (erf) GELU.

    [Shazeer 2020, "GLU variants improve transformer"]

    Args:    x: (..., 2C).
    Returns: (..., C).
    """
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI CLIP's approximation of GELU: x * sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)
