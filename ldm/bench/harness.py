"""The one way that things are timed here: in turn, after a warm-up, correctness first, medians with their spread.

A timing says little by itself, since machines differ and are busy with other things. So every candidate is timed in
turn with its peers, round after round in one process, and is read as a ratio to the first of them.
"""

from __future__ import annotations

import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm


@dataclass(frozen=True)
class Timing:
    """How long one candidate took, over all rounds."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    ratio: float  # of the first candidate's time to this one's, the median over rounds: above 1 is faster
    rounds: int


def time_in_turn(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int = 5,
    warmup: int = 1,
    check: Callable[[], None] | None = None,
    label: str = "timing",
) -> dict[str, Timing]:
    """Time every candidate once a round, one after the other; the first is the peer that ratios are taken to.

    Args:    candidates: name -> what to time; called without arguments, its result dropped.
             check: called before anything is timed; raises where results are wrong.
    Returns: name -> timing, in the order of `candidates`.
    Raises:  ValueError: nothing to time, rounds < 1 or warmup < 0; whatever `check` raises.
    """
    if not candidates or rounds < 1 or warmup < 0:
        raise ValueError(f"timing: {len(candidates)} candidates, {rounds} rounds, {warmup} for warm-up; expected some")
    if check is not None:
        check()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in tqdm(range(warmup + rounds), desc=label, unit="round", delay=2, leave=False):
        for name, call in candidates.items():
            synchronise()
            began = time.perf_counter()
            call()
            synchronise()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - began)
    first = np.array(seconds[next(iter(candidates))])
    return {name: _timing(np.array(taken), first) for name, taken in seconds.items()}


def _timing(seconds: np.ndarray, peer: np.ndarray) -> Timing:
    p20, median, p80 = (1000 * float(q) for q in np.quantile(seconds, [0.2, 0.5, 0.8]))
    return Timing(median, p20, p80, ratio=float(np.median(peer / seconds)), rounds=len(seconds))


def synchronise() -> None:
    """Work on a GPU is queued: wait until it is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matmul_gflops(size: int = 2048, dtype: torch.dtype = torch.float32, device: str = "cpu", rounds: int = 5) -> float:
    """The rate of a large square matrix product, in GFLOP/s: what this machine can do, as far as torch reaches it."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    if device == "cuda":
        return 2 * size**3 / statistics.median(gpu_ms(lambda: a @ b, rounds)) / 1e6
    timing = time_in_turn({"matmul": lambda: a @ b}, rounds, warmup=2)["matmul"]
    return 2 * size**3 / timing.median_ms / 1e6


def gpu_ms(call: Callable[[], object], rounds: int, before: Callable[[], object] = lambda: None) -> list[float]:
    """How long the GPU itself took for each round of a call, by its own clock: without what Python and launches take.

    before: done ahead of each round, not timed. The first two rounds are a warm-up.
    """
    times = []
    for _ in range(2 + rounds):
        before()
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        call()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended))
    return times[2:]


def peak_memory_mib(device: torch.device) -> float:
    """The most memory that this process has held; on a GPU, that torch has allocated there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # Linux counts in KiB


def environment() -> dict[str, Any]:
    """What a timing was taken on: processor or GPU, threads, versions, the code's revision."""
    cpu = line_of(Path("/proc/cpuinfo"), ("model name",))  # Linux; elsewhere `platform` knows less, but something
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu": cpu or platform.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "revision": _revision(),
    }


def _revision() -> str | None:
    """The git revision of this checkout, "+" behind it where files differ; None outside of one."""
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def memory_gib(key: str) -> float | None:
    """The machine's "MemTotal" or "MemAvailable"; None where the system does not say."""
    text = line_of(Path("/proc/meminfo"), (key,))
    return int(text.split()[0]) / 2**20 if text else None


def line_of(path: Path, names: tuple[str, ...]) -> str:
    """What stands behind the first of these names in a file of Linux; empty elsewhere."""
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.split(":")[0].strip() in names), "")
