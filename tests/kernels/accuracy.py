"""How wrong a kernel may be: at most twice as wrong as torch's own operation in its dtype, both against float64."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Op = Callable[..., Tensor | tuple[Tensor, ...]]

# Below this, relative to the result, an error is only the order of a float32 sum: torch can be lucky to have none.
ROUNDING = {torch.float32: 2e-7, torch.float16: 1e-4, torch.bfloat16: 1e-3}
# Twice, but 2.3 times for bfloat16: the interpreter cuts float32 off where a GPU rounds it, which alone doubles the
# error of a result that is rounded once.
FACTOR = {torch.float32: 2.0, torch.float16: 2.0, torch.bfloat16: 2.3}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Root mean square error over the root mean square of the exact result."""
    assert got.isfinite().all()
    return float((got.double() - exact).norm() / exact.norm().clamp(min=1e-30))


def results_and_gradients(op: Op, inputs: Sequence[Tensor | None]) -> list[Tensor]:
    """What an op returns, then the gradient of every floating-point input, for one fixed direction of change."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    results = op(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    directions = [randn(*r.shape, seed=100 + i).to(r.device, r.dtype) for i, r in enumerate(results)]
    torch.autograd.backward(results, directions)
    return [*(r.detach() for r in results), *(x.grad for x in leaves if x is not None)]


def assert_as_exact_as_torch(kernel: Op, reference: Op, inputs: Sequence[Tensor | None]) -> None:
    """Results and gradients of a kernel against `reference`, which is run in the inputs' dtype and in float64.

    inputs[0]'s dtype is the one that is judged.
    """
    dtype = inputs[0].dtype
    exact = results_and_gradients(reference, [None if x is None else x.double() for x in inputs])
    theirs, ours = results_and_gradients(reference, inputs), results_and_gradients(kernel, inputs)
    for i, (got, peer, true) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert got.shape == peer.shape
        assert got.dtype == peer.dtype
        error, bound = relative_error(got, true), FACTOR[dtype] * relative_error(peer, true) + ROUNDING[dtype]
        assert error <= bound, f"result {i}: relative error {error:.2e}, at most {bound:.2e} allowed"
