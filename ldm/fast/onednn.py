"""Large matrix products in float32 on a CPU by oneDNN, which comes with torch; torch itself takes MKL for them.

Letters: C channels, K channels of the result.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn

from ldm.fast.watching import intercepted, parametrized, plain, readable

WEIGHTS = 1 << 16  # C K: no smaller layer is replaced
WORK = 1 << 28  # multiplications, an image: from here on


def may_serve(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a layer is one that oneDNN is faster at with many rows."""
    return isinstance(layer, nn.Linear) and layer.in_features * layer.out_features >= WEIGHTS and there()


def there() -> bool:
    """Whether this torch has it."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def on() -> bool:
    """Whether this torch has it, and nobody has switched it off."""
    return there() and bool(torch.backends.mkldnn.enabled)


def serves(layer: nn.Linear, x: Tensor) -> bool:
    """Whether rows x are such; by one image's, so that it does not depend on the batch."""
    if not readable(x, 3) or x.shape[1] * layer.in_features * layer.out_features < WORK:  # first, as in winograd
        return False
    if intercepted() or parametrized(layer) or not on():
        return False
    weight, bias = layer.weight, layer.bias
    mine = x.device.type == "cpu" and x.shape[2:] == weight.shape[1:] and len(x) > 0
    return mine and plain(x, weight, bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., C) times weight (K, C), plus bias (K,) -> (..., K)."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out
