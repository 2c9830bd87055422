"""Bezier curves of any degree through latents.

A curve of degree n has control points P_0 .. P_n; it starts in P_0, ends in P_n and is drawn towards
the others without passing through them. Points are tensors of any shape: latents (n+1, C, H, W), or
(n+1, B, C, H, W) for B curves at once.

    B(u) = sum_i b_i(u) P_i,   b_i(u) = C(n, i) u^i (1 - u)^(n - i)          (Bernstein form)

Source: Farin 2002, "Curves and Surfaces for CAGD", chapters 4 and 5. Letters: n degree, m parameter values.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor


def evaluate(control_points: Tensor, u: Tensor) -> Tensor:
    """Points on the curve.

    B(0) and B(1) are the end points exactly. The other values are within n + 2 roundings of the
    control points' dtype.

    Args:    control_points: (n+1, ...) float32 or float64 (lower precisions work, and stay low).
             u: (m,) parameters in [0, 1].
    Returns: (m, ...), dtype and device of control_points.
    Raises:  ValueError: no control points, integers, or u not a vector in [0, 1].
    """
    _check_control_points(control_points)
    weights = bernstein(len(control_points) - 1, u).to(control_points)
    column = (-1, *[1] * (control_points.ndim - 1))
    # A sum of scaled points rather than a matrix product: a one in the weights then returns its point
    # exactly on every device, TF32 or not, and float32 stays float32.
    terms = (weights[:, i].view(column) * point for i, point in enumerate(control_points))
    return reduce(torch.add, terms)


def bernstein(n: int, u: Tensor) -> Tensor:
    """The n+1 Bernstein polynomials: each point's share at u. They are >= 0 and sum to 1.

    b_{i,k}(u) = (1 - u) b_{i,k-1}(u) + u b_{i-1,k-1}(u)                     [Farin, sec. 5.1]

    Raising the degree one by one adds only numbers of one sign, so nothing cancels or overflows at
    any degree; C(n, i) u^i would at n = 1030.

    Args:    n: degree, 0 or more.  u: (m,) in [0, 1].
    Returns: (m, n+1) float64, device of u.
    Raises:  ValueError: a negative degree, or u not a vector in [0, 1].
    """
    if n < 0:
        raise ValueError(f"n: expected a degree of 0 or more, got {n}")
    _check_parameters(u)
    u = u.double()[:, None]
    basis = torch.ones_like(u)
    for _ in range(n):
        edge = torch.zeros_like(u)
        basis = (1 - u) * torch.cat([basis, edge], dim=1) + u * torch.cat([edge, basis], dim=1)
    return basis


def _check_control_points(control_points: Tensor) -> None:
    if control_points.ndim == 0 or len(control_points) == 0 or not control_points.is_floating_point():
        raise ValueError(
            f"control_points: expected floating-point (n+1, ...) with at least one point, "
            f"got {tuple(control_points.shape)} {control_points.dtype}"
        )


def _check_parameters(u: Tensor) -> None:
    if u.ndim != 1 or not bool(((u >= 0) & (u <= 1)).all()):
        raise ValueError(f"u: expected a vector of values in [0, 1], got shape {tuple(u.shape)}: {u}")
