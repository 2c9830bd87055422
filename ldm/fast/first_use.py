"""Trust in a kernel, gained on the device itself: its result on a small case is held against torch's before it is used.

Once a process and configuration. A kernel that is wrong or raises is not used again: torch computes that operation, and
one line says which and why. So backend "auto" is never worse than torch; "triton" asks nothing.

    error of the kernel <= 4 x error of torch in the same dtype + 2 eps        both against float64, l2 over l2

A check runs in a thread of its own, as autocast, inference mode and recorders of operations are a thread's; nothing is
checked while a CUDA graph is recorded: torch computes then what is not known yet.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

FACTOR = 4.0  # of torch's own error; a kernel's is 1 to 2 times that
LARGEST = 2**22  # numbers of an image that a check goes through

Op = Callable[..., "Tensor | tuple[Tensor, ...]"]


class Operations(Protocol):
    """`ldm.fast.ops.Ops`, by kernels or by torch."""

    @property
    def attention(self) -> Op: ...
    @property
    def geglu(self) -> Op: ...
    @property
    def group_norm(self) -> Op: ...
    @property
    def add_layer_norm(self) -> Op: ...


@dataclass(frozen=True)
class Use:
    """One configuration of one operation on one device. sizes: see the cases below."""

    op: str
    sizes: tuple[float, ...]
    dtype: torch.dtype
    device: torch.device
    gradients: bool

    def __str__(self) -> str:
        """ "attention (512, 512, 40, 0) with gradients, float16 on cuda:0 (NVIDIA H100, sm_90)"."""
        where = str(self.device)
        if self.device.type == "cuda":
            gpu = torch.cuda.get_device_properties(self.device)
            where += f" ({gpu.name}, sm_{gpu.major}{gpu.minor})"
        backward = " with gradients" if self.gradients else ""
        return f"{self.op} {self.sizes}{backward}, {str(self.dtype).removeprefix('torch.')} on {where}"


_trusted: set[Use] = set()
_refused: dict[Use, str] = {}  # why
_checking = threading.Lock()


def refused() -> dict[Use, str]:
    """Which kernels were found wrong in this process, and why."""
    return dict(_refused)


def trusted(use: Use, kernels: Operations, plain: Operations) -> bool:
    """Whether a kernel may compute; checked at the first use.

    Raises:  torch.OutOfMemoryError. ValueError: a kernel left the GPU unusable, for torch too.
    """
    if torch.compiler.is_compiling():  # what is traced has no numbers yet
        return not _refused
    if use in _trusted:
        return True
    if use in _refused or (use.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return False
    with _checking:
        if use not in _trusted and use not in _refused:
            with ThreadPoolExecutor(1) as thread:
                _note(use, thread.submit(_why_not, use, kernels, plain).result())
    return use in _trusted


def _note(use: Use, why_not: str | None) -> None:
    """Keep what a check has found; say what is new of it: a missing compiler has the same reason at every size."""
    if why_not is None:
        _trusted.add(use)
        return
    known = any(earlier.op == use.op and why == why_not for earlier, why in _refused.items())
    _refused[use] = why_not
    if not known:
        logger.warning(
            "kernel not used: %s: %s; torch computes it instead. Please report this line with `ldm doctor --json`",
            use,
            why_not,
        )


def _why_not(use: Use, kernels: Operations, plain: Operations) -> str | None:
    """What is wrong with a kernel, in one line; None: nothing."""
    try:
        ours, theirs = errors(use, kernels, plain)
    except torch.OutOfMemoryError:
        raise  # says nothing about the kernel
    except Exception as error:  # compilers, drivers, launches: whatever it is, torch goes on
        why = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
        if use.device.type == "cuda":
            try:
                torch.zeros(1, device=use.device).cpu()
            except RuntimeError:
                raise ValueError(
                    f"{use}: the kernel left the GPU unusable ({why}); run it again with --backend torch"
                ) from error
        return why
    bound = FACTOR * theirs + 2 * torch.finfo(use.dtype).eps
    return None if ours <= bound else f"error {ours:.1e}, torch's own {theirs:.1e}"  # NaN is not <=


def errors(use: Use, kernels: Operations, plain: Operations) -> tuple[float, float]:
    """The largest relative error of the kernels' results and gradients on a small case, and of torch's."""
    call, inputs = CASES[use.op](use)
    exact = _results(call, plain, [x.double() for x in inputs], use.gradients)
    ours, theirs = (_results(call, ops, inputs, use.gradients) for ops in (kernels, plain))
    sizes = [x.norm().clamp(min=1e-30) for x in exact]
    return tuple(  # type: ignore[return-value]
        float(torch.stack([(a - b).norm() / size for a, b, size in zip(got, exact, sizes, strict=True)]).max())
        for got in (ours, theirs)
    )


def _results(call: Op, ops: Operations, inputs: Sequence[Tensor], gradients: bool) -> list[Tensor]:
    """Results, and the gradient of every input, in float64 but computed in the inputs' dtype."""
    leaves = [x.detach().requires_grad_(gradients) for x in inputs]
    with torch.set_grad_enabled(gradients):
        out = call(ops, *leaves)
    out = out if isinstance(out, tuple) else (out,)
    back: Sequence[Tensor] = ()
    if gradients:
        directions = [
            torch.linspace(-1, 1, x.numel(), device=x.device, dtype=torch.float64).view(x.shape).to(x.dtype)
            for x in out
        ]
        back = torch.autograd.grad(out, leaves, directions)
    return [x.detach().double() for x in (*out, *back)]


# ---- the small cases -------------------------------------------------------------------------------


def short(length: int) -> int:
    """A length of at most 640 that tiles divide as they divide this one: all have a power of two up to 128 rows. A loop
    with four tiles under way goes round in it."""
    return length if length <= 640 else 512 + length % 128


def low(height: int, width: int, channels: int) -> int:
    """The height of an image of at most so many numbers, halved as often as it takes."""
    while height > 1 and height * width * channels > LARGEST:
        height //= 2
    return height


def _attention(use: Use) -> tuple[Op, list[Tensor]]:
    """sizes: N, M, d, causal; two heads."""
    n, m, width, causal = map(int, use.sizes)
    inputs = [_randn(use, seed, 1, length, 2 * width) for seed, length in enumerate((n, m, m))]
    return lambda ops, q, k, v: ops.attention(q, k, v, 2, bool(causal)), inputs


def _geglu(use: Use) -> tuple[Op, list[Tensor]]:
    """sizes: M rows, 2C."""
    rows, width = map(int, use.sizes)
    return lambda ops, x: ops.geglu(x), [_randn(use, 0, rows, width)]


def _group_norm(use: Use) -> tuple[Op, list[Tensor]]:
    """sizes: C, H, W, groups, eps, whether a time is added, whether SiLU follows."""
    channels, height, width, groups = map(int, use.sizes[:4])
    eps, timed, silu = use.sizes[4:]

    def call(ops: Operations, x: Tensor, weight: Tensor, bias: Tensor, *time: Tensor) -> Any:
        norm = _holding(nn.GroupNorm(groups, channels, eps, device="meta"), weight, bias)
        return ops.group_norm(x, norm, time[0] if time else None, silu=bool(silu))

    x = _randn(use, 0, 1, channels, height, width).contiguous(memory_format=torch.channels_last)
    times = [_randn(use, 3, 1, channels)] if timed else []
    return call, [x, _randn(use, 1, channels), _randn(use, 2, channels), *times]


def _add_layer_norm(use: Use) -> tuple[Op, list[Tensor]]:
    """sizes: M rows, C, eps."""
    rows, channels = map(int, use.sizes[:2])

    def call(ops: Operations, x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return ops.add_layer_norm(
            x, branch, _holding(nn.LayerNorm(channels, use.sizes[2], device="meta"), weight, bias)
        )

    shapes = ((rows, channels), (rows, channels), (channels,), (channels,))
    return call, [_randn(use, seed, *shape) for seed, shape in enumerate(shapes)]


CASES: dict[str, Callable[[Use], tuple[Op, list[Tensor]]]] = {
    "attention": _attention,
    "geglu": _geglu,
    "group_norm": _group_norm,
    "add_layer_norm": _add_layer_norm,
}


def _randn(use: Use, seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(use.device, use.dtype)


def _holding(norm: nn.Module, weight: Tensor, bias: Tensor) -> nn.Module:
    """A norm whose parameters are these tensors themselves, so that their gradients can be asked for."""
    del norm.weight, norm.bias
    norm.weight, norm.bias = weight, bias
    return norm
