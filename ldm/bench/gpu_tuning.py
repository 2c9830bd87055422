"""Which block sizes are fastest on this GPU: every candidate of self-attention, and GEGLU in its product's epilogue.

A candidate is right on a short case before it is timed, and one that fails is noted. Nothing is chosen here: what wins
is put first in the kernels' own tables by hand.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.bench.gpu_parts import Row
from ldm.bench.harness import gpu_ms
from ldm.bench.kernel_sites import sites
from ldm.blocks import attend
from ldm.fast.first_use import FACTOR
from ldm.fast.ops import Ops
from ldm.traversal.round_trip import relative_error

Took = list[tuple[float, str]]  # microseconds, which candidate

LENGTHS = {40: 4096, 80: 1024, 160: 256}  # width of a head -> positions, where SD1.5's self-attention has it
# Own rows, rows a round of the loop, warps, stages.
FORWARD = (
    *((128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2), (128, 128, 8, 3), (64, 64, 4, 2)),
    *((64, 64, 4, 3), (64, 128, 4, 2), (128, 64, 4, 2), (128, 64, 4, 3), (128, 32, 8, 3), (64, 32, 4, 3)),
)
BACKWARD = ((64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (64, 128, 8, 2), (64, 32, 4, 2), (128, 32, 8, 2))


def candidates() -> list[Any]:
    """Block sizes worth a try, offered wherever they run; then Hopper's forward with tensor descriptors."""
    from ldm_kernels.attention_descriptors import CANDIDATES
    from ldm_kernels.configurations import EVERYWHERE, Configuration

    sizes_of = {"forward": FORWARD, "dq": BACKWARD, "dkdv": BACKWARD}
    with_pointers = [
        Configuration(width, kernel, *sizes, EVERYWHERE, layout)  # type: ignore[arg-type]
        for kernel, every in sizes_of.items()
        for width in LENGTHS
        for layout in (("split8", "pad") if (width, kernel) == (40, "forward") else ("split",))
        for sizes in every
    ]
    return [*with_pointers, *CANDIDATES]


def tune(dry: bool) -> Iterator[Row]:
    """Every candidate at its site of SD1.5, batch 2, float16: right first, then the fastest, and which are shipped.

    Those with descriptors come last, listed with the others at their site: what no GPU has run may hang or break it.
    """
    from ldm_kernels.attention import CONFIGURATIONS
    from ldm_kernels.geglu_product import CANDIDATES

    shipped = {str(c) for c in CONFIGURATIONS}
    every = candidates()
    if dry:
        counts = {"candidates": len(every), "of_them_shipped": sum(str(c) in shipped for c in every)}
        with_descriptors = sum(c.layout == "box" for c in every)
        yield {**counts, "of_them_with_descriptors": with_descriptors, "geglu_products": len(CANDIDATES)}
        return
    took: dict[tuple[str, int], Took] = {}
    yield from _attention([c for c in every if c.layout != "box"], shipped, took)
    yield from _geglu_products()
    if torch.cuda.get_device_capability() == (9, 0):
        yield from _attention([c for c in every if c.layout == "box"], shipped, took)


def _attention(every: Sequence[Any], shipped: set[str], took: dict[tuple[str, int], Took]) -> Iterator[Row]:
    """A row for each kernel and width: all that has been timed there so far, and what of `every` failed."""
    groups: dict[tuple[str, int], list[Any]] = {}
    for c in every:
        groups.setdefault((c.kernel, c.width), []).append(c)
    for (kernel, width), group in groups.items():
        n = LENGTHS[width]
        times, failed = _timed({str(c): partial(_proven, c, n) for c in group})
        took[kernel, width] = sorted([*took.get((kernel, width), []), *times])
        yield {"kernel": kernel, "width": width, "n": n, "batch": 2, **_best(took[kernel, width], shipped, failed)}


def _timed(tried: Mapping[str, Callable[[], Callable[[], object]]]) -> tuple[Took, list[str]]:
    """Medians of those that can be made ready and run, and why the others cannot."""
    times, failed = [], []
    for name, prepare in tried.items():
        try:
            times.append((1000 * statistics.median(gpu_ms(prepare(), 20)), name))
        except Exception as error:  # does not fit, does not compile, is wrong: it is out
            failed.append(f"{name}: {' '.join(str(error).split())[:100]}")
    return times, failed


def _best(times: Took, shipped: set[str], failed: list[str]) -> Row:
    """The rest of a row: what ran, the fastest first, and what did not."""
    best = [{"us": round(us, 1), "candidate": name, "shipped": name in shipped} for us, name in sorted(times)]
    return {"best": best, "failed": failed}


# ---- self-attention --------------------------------------------------------------------------------

Work = tuple[Callable[[], None], list[Tensor], list[Tensor]]


def _work(c: Any, n: int, batch: int = 2, heads: int = 8, device: str = "cuda") -> Work:
    """A call of one kernel alone, q, k, v and the gradient as the network lays them out, and what the call writes."""
    from ldm_kernels import attention as a

    packed = torch.randn(batch, n, 3, heads, c.width, generator=torch.Generator().manual_seed(0))
    q, k, v = packed.to(device, torch.float16).unbind(2)
    out, lse = a.launch_forward(q, k, v, False)
    grad = v.flip(1).contiguous()
    first, second = torch.empty_like(out), torch.empty_like(out)
    views = [q, k, v, grad]
    if c.kernel == "forward":
        pointers: list[Tensor] = [q, k, v, first, lse]
        return lambda: a.launch(a.kernel_of(c), c, False, pointers, views[:3]), views, [first]
    delta = (grad.float() * out.float()).sum(-1).mT.contiguous()
    if c.kernel == "dq":
        pointers = [q, k, v, out, grad, lse, delta, first]
        return lambda: a.launch(a.dq_kernel, c, False, pointers, views), views, [first]
    pointers = [q, k, v, grad, lse, delta, first, second]
    return lambda: a.launch(a.dkdv_kernel, c, False, pointers, views), views, [first, second]


def _proven(c: Any, n: int) -> Callable[[], None]:
    """A call of a candidate that was right on the short case."""
    require_right(c)
    return _work(c, n)[0]


def require_right(c: Any, device: str = "cuda", n: int = 512) -> None:
    """Raises ValueError where a candidate's results on a short case are not what first use asks of a kernel."""
    call, views, results = _work(c, n, 1, 2, device)
    call()
    exact, theirs = (_by_torch(c.kernel, [x.to(dtype) for x in views]) for dtype in (torch.float64, torch.float16))
    for ours, peer, true in zip(results, theirs, exact, strict=True):
        _require_close(ours, peer, true)


def _require_close(ours: Tensor, peer: Tensor, true: Tensor) -> None:
    error, allowed = relative_error(ours, true), FACTOR * relative_error(peer, true) + 2 * torch.finfo(ours.dtype).eps
    if not error <= allowed:  # NaN is not <=
        raise ValueError(f"error {error:.1e}, at most {allowed:.1e} allowed")


def _by_torch(kernel: str, views: list[Tensor]) -> list[Tensor]:
    """What a kernel writes, by torch in the views' precision."""
    q, k, v = leaves = [x.detach().requires_grad_() for x in views[:3]]
    out = attend(q.flatten(2), k.flatten(2), v.flatten(2), q.shape[2]).view(q.shape)
    if kernel == "forward":
        return [out.detach()]
    dq, dk, dv = torch.autograd.grad(out, leaves, views[3])
    return [dq] if kernel == "dq" else [dk, dv]


# ---- GEGLU in its product's epilogue ---------------------------------------------------------------

PAIR = "torch's product, then fused GEGLU"


def _geglu_products() -> Iterator[Row]:
    """A row for each of SD1.5's sites, with what is installed now among its candidates."""
    from ldm_kernels.geglu_product import CANDIDATES

    major, minor = torch.cuda.get_device_capability()
    mine = [c for c in CANDIDATES if 10 * major + minor in c.capabilities]
    for site in sites():
        if site.op == "geglu":
            n, channels = site.sizes
            inputs = product_inputs(2 * n, channels, "cuda")
            products = {str(c): partial(_proven_product, c, inputs) for c in mine}
            times, failed = _timed({PAIR: partial(partial, _pair, *inputs), **products})
            yield {"kernel": "geglu_product", "width": channels, "n": n, "batch": 2, **_best(times, {PAIR}, failed)}


def _pair(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return Ops("triton").geglu(F.linear(x, weight, bias))


def _proven_product(c: Any, inputs: tuple[Tensor, Tensor, Tensor]) -> Callable[[], Tensor]:
    """A call of a candidate that was right on the first rows."""
    from ldm_kernels.geglu_product import launch_forward

    x, weight, bias = inputs
    require_right_product(c, x[:512], weight, bias)
    return partial(launch_forward, x, weight, bias, c)


def product_inputs(rows: int, channels: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """x (rows, C / 4), weight (2C, C / 4), bias (2C) of a projection whose results are about 1."""
    generator = torch.Generator().manual_seed(0)
    width = channels // 4
    made = (
        torch.randn(shape, generator=generator) for shape in ((rows, width), (2 * channels, width), (2 * channels,))
    )
    x, weight, bias = (t.to(device, torch.float16) for t in made)
    return x, weight / width**0.5, bias


def require_right_product(c: Any, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Raises ValueError where a candidate's result is not what first use asks of a kernel."""
    from ldm_kernels.geglu_product import launch_forward

    def by_torch(dtype: torch.dtype) -> Tensor:
        value, gate = F.linear(x.to(dtype), weight.to(dtype), bias.to(dtype)).chunk(2, dim=-1)
        return value * F.gelu(gate)

    _require_close(launch_forward(x, weight, bias, c), by_torch(x.dtype), by_torch(torch.float64))
