"""The kernels at the sites of SD1.5: what the compiler made of them, what that should cost, and what it does cost.

Without a GPU the first two are all there is, and the second is a prediction: nobody has held it against a clock.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm import ops
from ldm.bench.harness import matmul_gflops
from ldm.bench.kernel_sites import Site, prepare, sites

BATCHES = (2, 18)  # an image with guidance; nine branches of a prompt tree with guidance

# ---- the compiler ----------------------------------------------------------------------------------


def compile_all(prefix: str, processes: int | None, record: bool) -> tuple[list[dict[str, Any]], list[str]]:
    """Compile the configurations whose names begin so, for the four GPUs.

    Args:    record: keep the result as what later ones are compared with, if it is within bounds; otherwise it is
             compared with what is recorded, if that came from the Triton that is installed.
    Returns: a line each, and what is wrong with them.
    """
    from kernels import compiling

    rows = compiling.compile_all(only=lambda name, _: name.startswith(prefix), processes=processes)
    wrong = [line for row in rows for line in compiling.complaints(row)]
    if not record:
        by, before = compiling.recorded()
        wrong += compiling.regressions(rows, before) if by == version("triton") else []
    elif not wrong:
        compiling.record(rows)
    return [asdict(row) for row in rows], wrong


# ---- the prediction --------------------------------------------------------------------------------


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


def predict(site: Site, batch: int, gpu: Gpu, code: Mapping[str, Any] | None) -> dict[str, Any]:
    """The least time a site can take forward, as the slowest of what it needs.

    bandwidth: its bytes once.  tensor cores: the operations executed, padding included.  exponentials: one for each
    weight.  issue: the instructions of the compiled loop, four a cycle.  All of them at their peak, perfectly
    overlapped, so a clock will show more; which of them is the slowest says what to work on.

    Args:    code: the compiled configuration, with own, loop and warps beside it; None: bandwidth alone.
    Returns: site, batch, gpu, floor_us, predicted_us, and what bounds it.
    """
    floor = {
        "bandwidth": site.bytes(batch) / gpu.tbytes_a_second / 1e6,
        "tensor cores": site.flops(batch) / gpu.tensor_tflops / 1e6,
    }
    needed = dict(floor)
    if code is not None:
        n, m, heads, _ = site.sizes
        cycles_a_us = gpu.multiprocessors * gpu.ghz * 1e3
        rounds = batch * heads * -(-n // code["own"]) * -(-m // code["loop"])
        needed["tensor cores"] *= code["useful_ratio"]
        needed["exponentials"] = batch * heads * n * m / gpu.exponentials / cycles_a_us
        needed["issue"] = rounds * code["loop_instructions"] * code["warps"] / gpu.instructions / cycles_a_us
    slowest = max(needed, key=lambda name: needed[name])
    return {
        "site": site.name,
        "a_step": site.count,
        "batch": batch,
        "gpu": gpu.name,
        "floor_us": max(floor.values()),
        "predicted_us": needed[slowest],
        "bound_by": slowest,
    }


def predictions() -> list[dict[str, Any]]:
    """Every site at both batches on A100 and H100, from what is recorded of the compiled code."""
    return [
        predict(site, batch, gpu, _code_for(site, gpu)) for gpu in (A100, H100) for batch in BATCHES for site in sites()
    ]


def _code_for(site: Site, gpu: Gpu) -> dict[str, Any] | None:
    """The recorded forward configuration that a GPU is given first for a self-attention; None for other sites."""
    from kernels import attention, compiling

    if site.op != "attention":
        return None
    chosen = next(
        c
        for c in attention.CONFIGURATIONS
        if c.kernel == "forward" and c.width == site.sizes[3] and gpu.capability in c.capabilities
    )
    name = attention.compile_spec(chosen).name
    _, rows = compiling.recorded()
    found = [row for row in rows if (row.name, row.capability) == (name, gpu.capability)]
    if not found:
        raise ValueError(
            f"kernels/compiled.json: no {name!r} for sm_{gpu.capability}; record it with --compile-only --record"
        )
    return {**asdict(found[0]), "own": chosen.own, "loop": chosen.loop, "warps": chosen.warps}


# ---- the clock -------------------------------------------------------------------------------------

SDPA = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
}
L2_BYTES = 256 * 2**20  # written between replays: more than any GPU's L2 holds
WORST_RATIO = 2.0  # of a kernel's error to torch's in the same dtype


def measure(dtype: torch.dtype = torch.float16, rounds: int = 30) -> dict[str, Any]:
    """Every site on the GPU that is here: correctness first, then times, beside torch's own and the roofline.

    Raises:  ValueError: a kernel is more than twice as wrong as torch's own operation.
    """
    rates = {"matmul_tflops": matmul_gflops(8192, dtype, "cuda") / 1e3, "copy_tbytes_a_second": _copy_rate()}
    rows = []
    for site in sites():
        errors = check(site, dtype)
        for batch in BATCHES:
            for backward in (False, True):
                rows += _measure_site(site, batch, backward, dtype, rounds, rates, errors)
    return {**rates, "rows": rows}


def check(site: Site, dtype: torch.dtype, device: str = "cuda") -> dict[str, float]:
    """Relative error of kernel and torch against float64, results and gradients together.

    Raises:  ValueError: the kernel's is more than twice as large.
    """
    exact = _results(site, torch.float64, device, "torch")
    errors = {
        backend: max(_error(got, true) for got, true in zip(_results(site, dtype, device, backend), exact, strict=True))
        for backend in ("triton", "torch")
    }
    if not errors["triton"] <= WORST_RATIO * errors["torch"] + torch.finfo(dtype).eps:
        raise ValueError(f"{site.name}: error {errors['triton']:.1e}, torch's own {errors['torch']:.1e}; not timed")
    return errors


def _results(site: Site, dtype: torch.dtype, device: str, backend: ops.Backend) -> list[Tensor]:
    """The output of one image, and every gradient, in float64 but computed in dtype."""
    call = prepare(site, 1, device, dtype)
    with ops.using(backend):
        out = call.run()
        direction = torch.linspace(-1, 1, out.numel(), device=device, dtype=torch.float64).view(out.shape).to(dtype)
        gradients = torch.autograd.grad(out, call.leaves, direction)
    return [x.detach().double() for x in (out, *gradients)]


def _error(got: Tensor, exact: Tensor) -> float:
    return float((got - exact).norm() / exact.norm())


def _measure_site(
    site: Site,
    batch: int,
    backward: bool,
    dtype: torch.dtype,
    rounds: int,
    rates: Mapping[str, float],
    errors: Mapping[str, float],
) -> list[dict[str, Any]]:
    """A row for each way to compute the site that this GPU has."""
    call = prepare(site, batch, "cuda", dtype)
    work = _with_backward(call.run, call.leaves) if backward else call.run
    times = {"triton": _times(work, "triton", None, rounds)}
    if site.flops(batch):
        times |= {name: _times(work, "torch", sdpa, rounds) for name, sdpa in SDPA.items()}
    else:
        times["torch"] = _times(work, "torch", None, rounds)
    flops = site.flops(batch) * (3.5 if backward else 1)
    floor_us = max(
        flops / rates["matmul_tflops"] / 1e6,
        site.bytes(batch) * (3 if backward else 1) / rates["copy_tbytes_a_second"] / 1e6,
    )
    ours = times["triton"]
    return [
        {
            **{"site": site.name, "a_step": site.count, "batch": batch, "backward": backward, "by": name},
            **dict(zip(("p20_us", "median_us", "p80_us"), found, strict=True)),
            "tflops": flops / found[1] / 1e6,
            "times_ours": found[1] / ours[1] if ours else None,
            "times_floor": found[1] / floor_us,
            "error": errors["triton" if name == "triton" else "torch"],
        }
        for name, found in times.items()
        if found is not None
    ]


def _with_backward(run: Callable[[], Tensor], leaves: Sequence[Tensor]) -> Callable[[], object]:
    return lambda: torch.autograd.grad(run().sum(), leaves)


def _times(
    work: Callable[[], object], backend: ops.Backend, sdpa: SDPBackend | None, rounds: int
) -> tuple[float, float, float] | None:
    """p20, median and p80 in microseconds of replays of a CUDA graph, each from a cold L2; None where torch cannot."""
    try:
        with ops.using(backend), sdpa_kernel(sdpa or list(SDPA.values())):
            replay = _captured(work)
    except RuntimeError:
        if sdpa is None:
            raise
        return None  # this form of attention has no kernel for the head's width on this GPU
    flush = torch.empty(L2_BYTES, dtype=torch.uint8, device="cuda")
    found = []
    for _ in range(rounds):
        flush.zero_()
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        replay()
        ended.record()
        ended.synchronize()
        found.append(1e3 * began.elapsed_time(ended))
    p20, _, _, p80 = statistics.quantiles(found, n=5)
    return p20, statistics.median(found), p80


def _captured(work: Callable[[], object]) -> Callable[[], None]:
    """The work as a CUDA graph, after three runs that let everything compile and allocate."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def _copy_rate() -> float:
    """TB/s of a large copy, reads and writes counted."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = _times(lambda: target.copy_(source), "torch", None, rounds=10)
    assert times is not None
    return 2 * source.numel() / times[1] / 1e6


# ---- tables ----------------------------------------------------------------------------------------


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown; the columns are the keys of the first row."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(row[column]) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
