"""The kernels at the sites of SD1.5: what the compiler made of them, and what a clock says where there is a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm.bench.harness import gpu_ms, matmul_gflops
from ldm.bench.kernel_predictions import BATCHES
from ldm.bench.kernel_sites import Site, prepare, sites
from ldm.fast.backend import Backend
from ldm.fast.cuda_graph import CudaCapture

# ---- the compiler ----------------------------------------------------------------------------------


def compile_all(
    prefix: str, capability: int | None, processes: int | None, record: bool
) -> tuple[list[dict[str, Any]], list[str]]:
    """Compile the configurations whose names begin so, for the four GPUs or one of them.

    Args:    capability: 90 for sm_90; None: all.
             record: keep the result as what later ones are compared with, if it is within bounds; otherwise it is
             compared with what is recorded of the Triton that is installed.
    Returns: a line each, and what is wrong with them.
    """
    from ldm_kernels import compiling

    def asked(name: str, on: int) -> bool:
        return name.startswith(prefix) and capability in (None, on)

    rows = compiling.compile_all(only=asked, processes=processes)
    wrong = [line for row in rows for line in compiling.complaints(row)]
    if not record:
        before = compiling.recorded(by=version("triton"))
        wrong += compiling.regressions(rows, before) if before else []
    elif not wrong:
        compiling.record(rows)
    return [asdict(row) for row in rows], wrong


# ---- the clock -------------------------------------------------------------------------------------

SDPA = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
}
BACKENDS: tuple[Backend, ...] = ("triton", "torch")
L2_BYTES = 256 * 2**20  # written between replays: more than any GPU's L2 holds
WORST_RATIO = 2.0  # of a kernel's error to torch's in the same dtype


@dataclass(frozen=True)
class Measured:
    """What is known so far. wrong: a line for each site that could not be timed, and why."""

    rates: Mapping[str, float]
    rows: Sequence[dict[str, Any]]
    wrong: Sequence[str]
    skipped: Sequence[str]  # for want of time


def measure(
    dtype: torch.dtype = torch.float16, rounds: int = 30, seconds: float = 240, device: str = "cuda"
) -> Iterator[Measured]:
    """Every site on the GPU that is here: correctness first, then times, beside torch's own and the roofline.

    What is known is given after each site, the most costly ones first. A site that is wrong or fails is noted, not
    timed, and the next one follows; after so many seconds the rest is skipped.
    """
    began = time.monotonic()
    rates = {"matmul_tflops": matmul_gflops(8192, dtype, device) / 1e3, "copy_tbytes_a_second": _copy_rate()}
    rows: list[dict[str, Any]] = []
    wrong: list[str] = []
    skipped: list[str] = []
    for site in sites():
        if time.monotonic() - began > seconds:
            skipped.append(site.name)
            continue
        try:
            errors = check(site, dtype, device)
            for batch in BATCHES:
                for backward in (False, True):
                    rows += _measure_site(site, batch, backward, dtype, rounds, rates, errors)
        except (ValueError, RuntimeError) as error:  # out of memory, no such attention, a launch that failed
            why = str(error).split("\n")[0]
            wrong.append(why if site.name in why else f"{site.name}: {why}")
        yield Measured(rates, tuple(rows), tuple(wrong), ())
    yield Measured(rates, tuple(rows), tuple(wrong), tuple(skipped))


def check(site: Site, dtype: torch.dtype, device: str = "cuda") -> dict[str, float]:
    """Relative error of kernel and torch against float64, results and gradients together.

    Raises:  ValueError: the kernel's is more than twice as large.
    """
    exact = _results(site, torch.float64, device, "torch")
    errors: dict[str, float] = {
        backend: max(_error(got, true) for got, true in zip(_results(site, dtype, device, backend), exact, strict=True))
        for backend in BACKENDS
    }
    if not errors["triton"] <= WORST_RATIO * errors["torch"] + torch.finfo(dtype).eps:
        raise ValueError(f"{site.name}: error {errors['triton']:.1e}, torch's own {errors['torch']:.1e}; not timed")
    return errors


def _results(site: Site, dtype: torch.dtype, device: str, backend: Backend) -> list[Tensor]:
    """The output of one image, and every gradient, in float64 but computed in dtype."""
    call = prepare(site, 1, device, dtype, backend)
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
    work = {backend: _work(site, batch, backward, dtype, backend) for backend in BACKENDS}
    times = {"triton": _times(work["triton"], None, rounds)}
    if site.flops(batch):
        times |= {name: _times(work["torch"], sdpa, rounds) for name, sdpa in SDPA.items()}
    else:
        times["torch"] = _times(work["torch"], None, rounds)
    flops = site.flops(batch, backward)
    floor_us = max(
        flops / rates["matmul_tflops"] / 1e6,
        site.bytes(batch, backward) / rates["copy_tbytes_a_second"] / 1e6,
    )
    ours = times["triton"]
    return [
        {
            **{"site": site.name, "a_step": site.count, "batch": batch, "backward": backward, "by": name},
            **dict(zip(("p20_us", "median_us", "p80_us"), measured, strict=True)),
            "tflops": flops / measured[1] / 1e6,
            "times_ours": measured[1] / ours[1] if ours else None,
            "times_floor": measured[1] / floor_us,
            "error": errors["triton" if name == "triton" else "torch"],
        }
        for name, measured in times.items()
        if measured is not None
    ]


def _work(site: Site, batch: int, backward: bool, dtype: torch.dtype, backend: Backend) -> Callable[[], object]:
    call = prepare(site, batch, "cuda", dtype, backend)
    return (lambda: torch.autograd.grad(call.run().sum(), call.leaves)) if backward else call.run


def _times(work: Callable[[], object], sdpa: SDPBackend | None, rounds: int) -> tuple[float, float, float] | None:
    """p20, median and p80 in microseconds of replays of a CUDA graph, each from a cold L2; None where torch cannot."""
    try:
        with sdpa_kernel(sdpa or list(SDPA.values())):
            replay, _, _ = CudaCapture()(work)
    except RuntimeError:
        if sdpa is None:
            raise
        return None  # this form of attention has no kernel for the head's width on this GPU
    flush = torch.empty(L2_BYTES, dtype=torch.uint8, device="cuda")
    times = [1e3 * ms for ms in gpu_ms(replay, rounds, before=flush.zero_)]
    p20, _, _, p80 = statistics.quantiles(times, n=5)
    return p20, statistics.median(times), p80


def _copy_rate() -> float:
    """TB/s of a large copy, reads and writes counted."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = _times(lambda: target.copy_(source), None, rounds=10)
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
