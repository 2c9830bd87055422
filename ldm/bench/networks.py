"""What one call of a network costs: its arithmetic, its rate beside a matrix product's, and where the time goes.

Two numbers frame everything: how many operations a call needs, and how many a second this machine reaches in a large
matrix product of the same precision. Their quotient is the floor; what is measured is read as a share of that rate.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from ldm.bench.harness import Timing, matmul_gflops, synchronise, time_in_turn
from ldm.traversal.round_trip import relative_error

Json = dict[str, Any]
Call = Callable[[], Tensor]

# What a profiler calls the work -> what a reader does. The first that a name contains; all else is "other".
OPERATIONS = {
    "conv": "convolution",
    "attention": "attention",
    "addmm": "linear",
    "::mm": "linear",
    "::bmm": "linear",
    "group_norm": "normalisation",
    "batch_norm": "normalisation",  # what group_norm calls for its moments
    "layer_norm": "normalisation",
    "silu": "activation",
    "gelu": "activation",
    "cat": "copies",
    "copy_": "copies",
    "upsample": "copies",
}
# Of the square matrix product: 2048 keeps a CPU busy; on a GPU its launch would take a good part of its time.
MATMUL_SIDE = {"cpu": 2048, "cuda": 8192}
# How far another memory layout or a compiler may be from eager: sums in another order. A wrong weight is off by 1.
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


def measure(calls: Mapping[str, Call], dtype: torch.dtype, device: str, rounds: int, label: str) -> Json:
    """Time some ways to make one call, which must agree; the first is the peer of the others.

    Args:    calls: name -> the call. It returns its result, which is compared with the first one's.
             dtype: that all compute in, also of the matrix product beside them.
    Returns: gflop of a call, matmul_gflops, and for each way its timing, gflops and share of the matrix product's rate.
    Raises:  ValueError: two ways disagree.
    """
    first = next(iter(calls.values()))
    with torch.inference_mode():
        gflop = count_gflop(first)
        timings = time_in_turn(calls, rounds, check=lambda: _agree(calls, AGREEMENT[dtype]), label=label)
        reachable = matmul_gflops(MATMUL_SIDE[device], dtype, device)
        return {
            "gflop": gflop,
            "matmul_gflops": reachable,
            "floor_ms": 1000 * gflop / reachable,
            "ways": {name: cost(timing, gflop, reachable) for name, timing in timings.items()},
            "profile": by_operation(first) if device == "cpu" else {},
        }


def cost(timing: Timing, gflop: float, reachable: float) -> Json:
    """A timing with the rate that it means."""
    gflops = 1000 * gflop / timing.median_ms
    return {**asdict(timing), "gflops": gflops, "share_of_matmul": gflops / reachable}


def count_gflop(call: Call) -> float:
    """Operations of one call in units of 1e9, a multiplication and its addition as two, of all products there are."""
    formulas = _formulas()
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        call()
    if _formulas().keys() != formulas.keys():  # the call was the first to import kernels, which went uncounted
        return count_gflop(call)
    return counter.get_total_flops() / 1e9


def _formulas() -> dict[Any, Callable[..., int]]:
    """What torch's own table lacks: its attention on a CPU, and the kernels' where they were imported."""
    table = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flop}
    for name in ("attention", "cross_attention"):
        if hasattr(torch.ops.ldm, name):
            table[getattr(torch.ops.ldm, name)] = _kernel_flop
    return table


def _attention_flop(q: torch.Size, k: torch.Size, v: torch.Size, *rest: Any, **options: Any) -> int:
    """q k^T and the product with v, of shapes (B, h, N, d) and (B, h, M, d)."""
    return 2 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def _kernel_flop(q: torch.Size, k: torch.Size, v: torch.Size, *rest: Any, **options: Any) -> int:
    """The same, of shapes (B, N, h, d) and (B, M, h, d)."""
    return 2 * math.prod(q[:-1]) * k[1] * (q[-1] + v[-1])


def by_operation(call: Call) -> dict[str, float]:
    """The share of one call's time that each kind of operation takes on the CPU; they add up to 1."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    totals: dict[str, float] = {}
    for event in profiler.key_averages():
        kind = next((kind for part, kind in OPERATIONS.items() if part in event.key), "other")
        totals[kind] = totals.get(kind, 0.0) + event.self_cpu_time_total
    whole = sum(totals.values())
    return {kind: taken / whole for kind, taken in sorted(totals.items(), key=lambda item: -item[1])}


def longest(call: Call, device: str, most: int = 20) -> list[Json]:
    """The kernels that one call spends most time in on its device, those first: name, launches, us, share of all.

    Raises:  ValueError: the profiler has seen none on that device.
    """
    activities = [ProfilerActivity.CPU] if device == "cpu" else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    synchronise()
    with profile(activities=activities) as profiler:
        call()
        synchronise()
    taken = [
        (event.self_cpu_time_total if device == "cpu" else event.self_device_time_total, event)
        for event in profiler.key_averages()
        if event.device_type.name == device.upper()
    ]
    whole = sum(us for us, _ in taken)
    if not whole:
        raise ValueError(f"profiler: it saw no kernels on {device}, expected some; may this user read its counters?")
    taken.sort(key=lambda found: -found[0])
    return [
        {"kernel": event.key[:90], "launches": event.count, "us": round(us, 1), "share": us / whole}
        for us, event in taken[:most]
    ]


def by_block(blocks: Mapping[str, nn.Module], call: Call) -> dict[str, float]:
    """The share of one call's time that some parts of a network take, and "rest"; each waits for the GPU to be done.

    Args:    blocks: name -> a module of the network, none inside another.
    """
    began: dict[str, float] = {}
    taken = dict.fromkeys(blocks, 0.0)
    hooks = []
    for name, block in blocks.items():

        def before(module: nn.Module, args: object, name: str = name) -> None:
            synchronise()
            began[name] = time.perf_counter()

        def after(module: nn.Module, args: object, out: object, name: str = name) -> None:
            synchronise()
            taken[name] += time.perf_counter() - began[name]

        hooks += [block.register_forward_pre_hook(before), block.register_forward_hook(after)]
    synchronise()
    start = time.perf_counter()
    with torch.inference_mode():
        call()
    synchronise()
    whole = time.perf_counter() - start
    for hook in hooks:
        hook.remove()
    return {name: seconds / whole for name, seconds in taken.items()} | {"rest": 1 - sum(taken.values()) / whole}


def _agree(calls: Mapping[str, Call], tolerance: float) -> None:
    """Raises ValueError where a result is further than that from the first one, l2 of the difference over l2."""
    (name, first), *others = calls.items()
    expected = first().float()
    for other, call in others:
        error = relative_error(call().float(), expected)
        if not error <= tolerance:
            raise ValueError(f"{other}: {error:.1e} away from {name}, expected at most {tolerance:.0e}; not timed")
