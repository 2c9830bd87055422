"""What the kernels' sites should cost on GPUs that are not here.

PREDICTIONS, all of them: from the compiled code and from data sheets. Nobody has held them against a clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ldm.bench.kernel_sites import Site, sites

BATCHES = (2, 18)  # an image with guidance; nine branches of a prompt tree with guidance


@dataclass(frozen=True)
class Gpu:
    """What a GPU can do at best. [NVIDIA's data sheets and architecture papers of A100 80GB SXM and H100 SXM]"""

    name: str
    capability: int
    multiprocessors: int
    ghz: float
    tensor_tflops: float  # float16 in, float32 out, dense
    tbytes_a_second: float
    exponentials: int = 16  # a cycle and multiprocessor
    instructions: int = 4  # of 32 threads each, a cycle and multiprocessor


A100 = Gpu("A100", 80, 108, 1.41, 312, 2.04)
H100 = Gpu("H100", 90, 132, 1.755, 989, 3.35)

PRODUCTS = {"forward": 2, "dq": 3, "dkdv": 4}  # N x M x d each: the backward's kernels compute q k^T and g v^T twice


def predict(
    site: Site, batch: int, gpu: Gpu, code: Sequence[Mapping[str, Any]] = (), backward: bool = False
) -> dict[str, Any]:
    """The least time a site can take, as the slowest of what it needs.

    bandwidth: its bytes once.  tensor cores: the operations executed, padding included.  exponentials: one for each
    weight.  issue: the instructions of the compiled loop, four a cycle.  All of them at their peak, perfectly
    overlapped, so a clock will show more; which of them is the slowest says what to work on. Kernels of one site run
    one after the other, so their times add up.

    Args:    code: the compiled kernels, with kernel, own, loop and warps beside it; none: without issue and padding.
             backward: forward and backward, as the clock takes them.
    Returns: site, batch, backward, gpu, floor_us, predicted_us, and what bounds it: the longest of its kernels.
    """
    floor = {
        "bandwidth": site.bytes(batch, backward) / gpu.tbytes_a_second / 1e6,
        "tensor cores": site.flops(batch, backward) / gpu.tensor_tflops / 1e6,
    }
    bound_by = max(floor, key=lambda name: floor[name])
    predicted_us = floor[bound_by]
    kernels = [_kernel_needs(site, batch, gpu, kernel) for kernel in code]
    if (compiled_us := sum(max(needs.values()) for needs in kernels)) > floor["bandwidth"]:
        longest = max(kernels, key=lambda needs: max(needs.values()))
        bound_by, predicted_us = max(longest, key=lambda name: longest[name]), compiled_us
    return {
        "site": site.name,
        "a_step": site.count,
        "batch": batch,
        "backward": backward,
        "gpu": gpu.name,
        "floor_us": max(floor.values()),
        "predicted_us": predicted_us,
        "bound_by": bound_by,
    }


def _kernel_needs(site: Site, batch: int, gpu: Gpu, code: Mapping[str, Any]) -> dict[str, float]:
    """Microseconds of each of a compiled attention kernel's needs, beside the bandwidth."""
    n, m, heads, width = site.sizes
    own, loop = (m, n) if code["kernel"] == "dkdv" else (n, m)
    rounds = batch * heads * -(-own // code["own"]) * -(-loop // code["loop"])
    executed = 2 * PRODUCTS[code["kernel"]] * batch * heads * n * m * width * code["useful_ratio"]
    cycles_a_us = gpu.multiprocessors * gpu.ghz * 1e3
    return {
        "tensor cores": executed / gpu.tensor_tflops / 1e6,
        "exponentials": batch * heads * n * m / gpu.exponentials / cycles_a_us,
        "issue": rounds * code["loop_instructions"] * code["warps"] / gpu.instructions / cycles_a_us,
    }


def predictions() -> list[dict[str, Any]]:
    """Every site at both batches on A100 and H100, from what is recorded of the compiled code."""
    return [
        predict(site, batch, gpu, _code_for(site, gpu, backward), backward)
        for gpu in (A100, H100)
        for backward in (False, True)
        for batch in BATCHES
        for site in sites()
    ]


def _code_for(site: Site, gpu: Gpu, backward: bool) -> list[dict[str, Any]]:
    """The recorded configurations that a GPU is given first for a self-attention; none for other sites."""
    if site.op != "attention":
        return []
    kernels = ("forward", "dq", "dkdv") if backward else ("forward",)
    return [_recorded(kernel, site.sizes[3], gpu.capability) for kernel in kernels]


def _recorded(kernel: str, width: int, capability: int) -> dict[str, Any]:
    from ldm_kernels import attention, compiling

    chosen = next(
        c for c in attention.CONFIGURATIONS if c.kernel == kernel and c.width == width and capability in c.capabilities
    )
    name = attention.compile_spec(chosen).name
    matching = [row for row in compiling.recorded() if (row.name, row.capability) == (name, capability)]
    if not matching:
        raise ValueError(f"compiled-*.json: no {name!r} for sm_{capability}; record it with --compile-only --record")
    return {**asdict(matching[0]), **{key: getattr(chosen, key) for key in ("kernel", "own", "loop", "warps")}}
