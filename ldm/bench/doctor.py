"""What this machine is, what would be used on it, and whether that works: what `ldm doctor` prints.

Anything that a GPU may be brought down by runs in a process of its own.
"""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os
import platform
import re
import shutil
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from ldm import fast, pipeline
from ldm.bench.harness import environment, line_of, memory_gib, synchronise
from ldm.bench.kernel_sites import prepare, sites
from ldm.bench.networks import AGREEMENT
from ldm.config import SD15
from ldm.fast import first_use
from ldm.fast.first_use import Use
from ldm.fast.ops import Ops
from ldm.pipeline import PHANTOM_WEIGHTS, StableDiffusion, load
from ldm.samplers import initial_noise
from ldm.study.evaluation.workers import without_the_script
from ldm.traversal.batches import images_a_call, rows_a_call
from ldm.traversal.round_trip import relative_error

Json = dict[str, Any]

DISTRIBUTION = "ldm-traversal"
SHOWN = ("python", "torch", "torchvision", "triton", "numpy", "safetensors", "pillow")
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
SECONDS = 300  # for the checks in a process of their own: on a GPU the first one compiles every kernel

# ---- what is here ----------------------------------------------------------------------------------


def machine() -> Json:
    """Processor, memory and GPUs; notes: what keeps a GPU from being used, where something does."""
    flags = line_of(Path("/proc/cpuinfo"), ("flags", "Features")).split()
    memory = {key: memory_gib(key) for key in ("MemTotal", "MemAvailable")}
    return {
        "cpu": environment()["cpu"],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "features": [feature for feature in FEATURES if feature in flags],
        "memory_gib": memory["MemTotal"],
        "memory_free_gib": memory["MemAvailable"],
        "system": platform.platform(),
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "notes": _notes(),
    }


def _gpu(index: int) -> Json:
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": total / 2**30,
        "memory_free_gib": free / 2**30,
    }


def _notes() -> list[str]:
    if torch.cuda.is_available():
        compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("gcc", "clang", "cc"))), None)
        return [] if compiler else ["no C compiler: triton needs one, such as gcc, to launch kernels"]
    if not shutil.which("nvidia-smi"):
        return []
    why = "its driver is too old for it, or no GPU is visible" if torch.version.cuda else "it was built without CUDA"
    return [f"there is an NVIDIA driver, but torch {torch.__version__} uses no GPU: {why}"]


def packages() -> list[Json]:
    """Python and the libraries that matter: version, what is allowed, whether that is met."""
    allowed = requirements()
    found = []
    for name in SHOWN:
        version = platform.python_version() if name == "python" else _version(name)
        needed = name in allowed and not (name == "triton" and platform.system() != "Linux")
        ok = within(version, allowed.get(name, "")) if version else not needed
        found.append({"name": name, "version": version, "allowed": allowed.get(name, ""), "ok": ok})
    return found


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def requirements() -> dict[str, str]:
    """Name -> the versions that are allowed, ">=2.11,<2.15"; of the checkout, or of the installed package."""
    project = pipeline.PACKAGE.parent / "pyproject.toml"
    if project.exists():
        described = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        lines, python = described["dependencies"], described["requires-python"]
    else:
        lines = [line for line in importlib.metadata.requires(DISTRIBUTION) or [] if "extra ==" not in line]
        python = importlib.metadata.metadata(DISTRIBUTION)["Requires-Python"]
    split = (re.match(r"([\w.-]+)\s*([^;]*)", line) for line in lines)
    return {"python": python} | {match[1].lower(): match[2].strip() for match in split if match}


def within(version: str, allowed: str) -> bool:
    """Whether "2.14.1+cu130" is within ">=2.11,<2.15"; a release is judged by its numbers alone."""
    have = _numbers(version)
    for bound in filter(None, allowed.replace(" ", "").split(",")):
        match = re.fullmatch(r"(>=|<=|==|<|>)([\d.]+)", bound)
        if not match:
            raise ValueError(f"version: got {bound!r}, expected bounds such as >=2.11,<2.15")
        limit = _numbers(match[2])
        met = {
            ">=": have >= limit,
            "<=": have <= limit,
            "==": have == limit,
            "<": have < limit,
            ">": have > limit,
        }
        if not met[match[1]]:
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in found[0].split(".")] if found else []
    while numbers and numbers[-1] == 0:
        del numbers[-1]
    return tuple(numbers)


# ---- what would be used ----------------------------------------------------------------------------


def choices(device: torch.device, dtype: torch.dtype, backend: fast.Backend) -> Json:
    """What the commands take by default on a device; rows and images as SD1.5 has them at 512 x 512."""
    return {
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "backend": fast.resolved(backend, device),
        "cuda_graph": device.type == "cuda",
        **_amounts(device, dtype),
    }


def _amounts(device: torch.device, dtype: torch.dtype) -> Json:
    sd = load(PHANTOM_WEIGHTS)
    sized = replace(sd, config=SD15, unet=sd.unet.to(dtype), device=device)
    shape = (4, SD15.unet.sample_size, SD15.unet.sample_size)
    return {"rows_a_call": rows_a_call(sized, shape), "images_a_call": images_a_call(sized, shape)}


# ---- whether it works ------------------------------------------------------------------------------


def check(device: str, dtype: torch.dtype, backend: fast.Backend, interpret: bool, seconds: float = SECONDS) -> Json:
    """The shipped model and the kernels on a device, in a process of its own.

    Args:    interpret: on a CPU, run a few small kernels in Triton's interpreter.
    Returns: {"model": ..., "kernels": ...}, or {"failed": why}.
    """
    here, there = multiprocessing.get_context("spawn").Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(
        target=_check_into, args=(there, device, dtype, backend, interpret), daemon=True
    )
    with _interpreter(interpret), without_the_script():
        process.start()
    there.close()
    try:
        if not here.poll(seconds):
            return {"failed": f"no answer in {seconds:.0f} s"}
        return here.recv()
    except EOFError:
        process.join()
        return {"failed": f"the process ended with {process.exitcode}"}
    finally:
        process.kill()
        process.join()


@contextmanager
def _interpreter(wanted: bool) -> Iterator[None]:
    """Triton reads the variable when it is imported: the process that starts now has it, this one is as it was."""
    before = os.environ.pop("TRITON_INTERPRET", None)
    try:
        if wanted:
            os.environ["TRITON_INTERPRET"] = "1"
        yield
    finally:
        os.environ.pop("TRITON_INTERPRET", None)
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before


def _check_into(answer: Connection, device: str, dtype: torch.dtype, backend: fast.Backend, interpret: bool) -> None:
    try:
        at = torch.device(device)
        found: Json = {"model": check_model(at, dtype, backend)}
        if interpret or (at.type == "cuda" and fast.resolved(backend, at) == "triton"):
            found["kernels"] = check_kernels(at, dtype)
        answer.send(found)
    except Exception as error:  # whatever it is, it is what the machine does
        answer.send({"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})


@torch.inference_mode()
def check_model(device: torch.device, dtype: torch.dtype, backend: fast.Backend) -> Json:
    """The shipped model as it would be run, against plain float32 on the CPU."""
    reference = load(PHANTOM_WEIGHTS)
    with torch.inference_mode(False):
        sd = load(PHANTOM_WEIGHTS, device, dtype)
        installed = fast.install(sd.unet, kernels=backend, cuda_graph=device.type == "cuda")
    x_t = initial_noise([0, 1], reference.latent_shape)

    def eps(of: StableDiffusion) -> torch.Tensor:
        contexts = of.encode_prompts(["Normal chest X-ray with no significant findings", ""])
        return of.unet(x_t.to(of.device, of.dtype), 500, contexts).float().cpu()

    error = relative_error(eps(sd), eps(reference))
    synchronise()
    began = time.perf_counter()
    eps(sd)
    return {
        "error": error,
        "allowed": AGREEMENT[dtype],
        "ok": error <= AGREEMENT[dtype],
        "ms": 1000 * (time.perf_counter() - began),
        "backend": installed.backend,
        "cuda_graph_used": installed.cuda_graph_used,
    }


TINY = (
    ("attention", (32, 32, 40, False)),
    ("attention", (16, 77, 40, False)),
    ("geglu", (3, 16)),
    ("group_norm", (16, 4, 4, 4, 1e-5, True, True)),
    ("add_layer_norm", (3, 16, 1e-5)),
)


def check_kernels(device: torch.device, dtype: torch.dtype) -> Json:
    """Every configuration that SD1.5's U-Net uses, forwards and backwards; on a CPU a few, in the interpreter."""
    began = time.perf_counter()
    if device.type == "cuda":
        checked = 0
        for gradients in (False, True):
            for site in sites():
                with torch.set_grad_enabled(gradients):
                    prepare(site, 1, str(device), dtype, "auto").run()
                checked += 1
    else:
        for op, sizes in TINY:
            first_use.trusted(Use(op, sizes, torch.float16, device, True), Ops("triton"), Ops("torch"))
        checked = len(TINY)
    refused = [f"{use}: {why}" for use, why in first_use.refused().items()]
    return {
        "by": "GPU" if device.type == "cuda" else "interpreter",
        "checked": checked,
        "refused": refused,
        "ok": not refused,
        "seconds": round(time.perf_counter() - began, 1),
    }


def broken(report: Json) -> list[str]:
    """What is wrong, a line each; empty: nothing."""
    lines = [
        f"{of['name']}: {of['version'] or 'missing'}, expected {of['allowed']}"
        for of in report["packages"]
        if not of["ok"]
    ]
    lines += [f"{of['file']}: missing" for of in report["weights"] if of["needed"] and not of["found"]]
    lines += report["machine"]["notes"]
    checks = report["checks"]
    if "failed" in checks:
        return [*lines, f"check: {checks['failed']}"]
    model, kernels = checks["model"], checks.get("kernels", {"refused": []})
    if not model["ok"]:
        lines.append(f"model: {model['error']:.1e} away from the CPU, at most {model['allowed']:.0e} expected")
    if report["used"]["cuda_graph"] and not model["cuda_graph_used"]:
        lines.append("CUDA graph: none could be recorded; steps are launched kernel by kernel")
    return lines + [f"kernel: {line}" for line in kernels["refused"]]
