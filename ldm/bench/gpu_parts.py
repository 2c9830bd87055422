"""What only a GPU can tell, part by part: each is a generator of rows, so that what is known is written at once.

A dry run takes the same steps on the CPU with a network of a few channels; its numbers mean nothing.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm import checkpoint, fast, pipeline
from ldm.bench.harness import synchronise, time_in_turn
from ldm.bench.networks import AGREEMENT, count_gflop, longest
from ldm.clip import CLIPTextEncoder
from ldm.config import CONTEXT_TOKENS, PHANTOM, SD15
from ldm.fast.cuda_graph import CudaCapture
from ldm.pipeline import PHANTOM_WEIGHTS
from ldm.traversal.round_trip import relative_error
from ldm.unet import UNet
from ldm.vae import AutoencoderKL

Row = dict[str, Any]
PROMPTS = ["Normal chest X-ray with no significant findings", "Chest X-ray of a subject with Pleural Effusion"]
FLOAT32_AGREES = 1e-5  # of one call, without TF32
OVER_A_RUN = 10.0  # times what one call may be off


def short_name(dtype: torch.dtype) -> str:
    """ "float16"."""
    return str(dtype).removeprefix("torch.")


# ---- does it compute what the CPU computes ---------------------------------------------------------


def agree(dry: bool) -> Iterator[Row]:
    """The shipped model in each precision, by torch, kernels and graphs, against the CPU's float32."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    device, steps = ("cpu", 1) if dry else ("cuda", 20)
    exact = whole_model("cpu", torch.float32, "torch", False, steps)[0]
    dtypes = (torch.float32, torch.bfloat16) if dry else (torch.float32, torch.float16, torch.bfloat16)
    for dtype in dtypes:
        for backend, graph in (("torch", False), ("auto", False), ("auto", True)):
            found, used = whole_model(device, dtype, backend, graph, steps)  # type: ignore[arg-type]
            errors = {name: relative_error(found[name], exact[name]) for name in exact}
            allowed = FLOAT32_AGREES if dtype == torch.float32 else AGREEMENT[dtype]
            ok = max(errors["context"], errors["eps"]) <= allowed and errors["latents"] <= OVER_A_RUN * allowed
            way = {"dtype": short_name(dtype), "backend": backend, "graph": graph, "graph_used": used}
            yield {**way, "ok": ok and (used == graph or dry), **errors}


@torch.no_grad()
def whole_model(
    device: str, dtype: torch.dtype, backend: fast.Backend, graph: bool, steps: int
) -> tuple[dict[str, Tensor], bool]:
    """Contexts, one eps, latents after guided steps, their images, all on the CPU; whether a graph was used."""
    sd = pipeline.load(PHANTOM_WEIGHTS, device, dtype)
    for network in (sd.clip, sd.unet):
        installed = fast.install(network, kernels=backend, cuda_graph=graph and network is sd.unet)
    contexts = sd.encode_prompts(PROMPTS)
    *_, last = sd.sample(contexts[1:], [0, 1], steps=steps, guidance_scale=3.0)
    eps = sd.unet(last.x_t.to(sd.dtype), 500, contexts)
    found = {"context": contexts, "eps": eps, "latents": last.x_prev, "image": sd.decode_latents(last.x_prev)}
    return {name: x.float().cpu() for name, x in found.items()}, installed.cuda_graph_used


# ---- a step of the U-Net ---------------------------------------------------------------------------


@torch.no_grad()
def step(dry: bool) -> Iterator[Row]:
    """SD1.5's U-Net with random weights: right first, then milliseconds of every way to call it, in turn."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    device, config = ("cpu", PHANTOM.unet) if dry else ("cuda", SD15.unet)
    torch.manual_seed(0)
    with torch.device(device):
        network = UNet(config).eval()
    cases = [(torch.float32, 2)] if dry else [(torch.float16, 2), (torch.float16, 18), (torch.bfloat16, 2)]
    for dtype, rows in cases:
        yield from _step_of(network, dtype, rows, dry)


def _step_of(network: UNet, dtype: torch.dtype, rows: int, dry: bool) -> Iterator[Row]:
    """A row for each way that says whether it is right, then one for each that is, with its times; then its kernels."""
    generator, side = torch.Generator().manual_seed(0), network.config.sample_size
    shapes = (4, side, side), (CONTEXT_TOKENS, network.config.context_width)
    inputs = [torch.randn(rows, *shape, generator=generator).to(network.conv_in.weight.device) for shape in shapes]
    exact = network(inputs[0], 500, inputs[1])
    x_t, context = (x.to(dtype) for x in inputs)
    plain = copy.deepcopy(network).to(dtype)
    case: Row = {"dtype": short_name(dtype), "rows": rows}
    right: dict[str, Callable[[], Tensor]] = {}
    for name, build in _ways(plain, dry).items():
        began = time.perf_counter()
        try:
            call = build(x_t, context)
            error = relative_error(call().float(), exact)
            synchronise()
        except (RuntimeError, ValueError) as failed:
            yield {"way": name, **case, "ok": False, "failed": " ".join(str(failed).split())[:200]}
            continue
        ok = error <= AGREEMENT[dtype]
        yield {"way": name, **case, "ok": ok, "error": error, "first_call_s": time.perf_counter() - began}
        if ok:
            right[name] = call
    if not right:
        return
    gflop = count_gflop(lambda: plain(x_t, 500, context))
    timings = time_in_turn(right, 2 if dry else 20, warmup=1 if dry else 3, label="step")
    for name, timing in timings.items():
        yield {
            **{"way": name, **case, "median_ms": timing.median_ms, "p20_ms": timing.p20_ms, "p80_ms": timing.p80_ms},
            **{"times_faster_than_first": timing.ratio, "tflops": gflop / timing.median_ms},
        }
    for name in PROFILED:
        if name in right:
            yield from _where_time_goes(name, right[name], case, x_t.device.type)


PROFILED = ("torch channels_last", "kernels")  # a graph's replay is the same kernels


def _where_time_goes(name: str, call: Callable[[], Tensor], case: Row, device: str) -> Iterator[Row]:
    """A row for each of the kernels that took most of one call. A profiler that fails costs this alone."""
    try:
        for row in longest(call, device):
            yield {"way": name, **case, **row}
    except (RuntimeError, ValueError) as failed:
        yield {"way": name, **case, "no_profile": " ".join(str(failed).split())[:200]}


Build = Callable[[Tensor, Tensor], Callable[[], Tensor]]


def _ways(plain: UNet, dry: bool) -> dict[str, Build]:
    """Name -> what makes a call of the network on (x_t, context). The first is what ratios are taken to."""

    def installed(kernels: fast.Backend, channels_last: bool | None, graph: bool) -> Build:
        def build(x_t: Tensor, context: Tensor) -> Callable[[], Tensor]:
            network = copy.deepcopy(plain)
            report = fast.install(network, kernels=kernels, channels_last=channels_last, cuda_graph=graph)
            network(x_t, 500, context)
            if graph and not dry and not report.cuda_graph_used:
                raise ValueError("no CUDA graph was used; the log says why")
            return lambda: network(x_t, 500, context)

        return build

    def compiled(graph: bool) -> Build:
        def build(x_t: Tensor, context: Tensor) -> Callable[[], Tensor]:
            network = copy.deepcopy(plain).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            call = torch.compile(network, dynamic=False, backend="eager" if dry else "inductor")
            t = torch.full((), 500.0, device=x_t.device)
            call(x_t, t, context)
            if not graph or dry:
                return lambda: call(x_t, t, context)
            replay, result, _ = CudaCapture()(lambda: call(x_t, t, context))
            return lambda: (replay(), result)[1]

        return build

    return {
        "torch": installed("torch", False, False),
        "torch channels_last": installed("torch", True, False),
        "torch channels_last, CUDA graph": installed("torch", True, True),
        "kernels": installed("auto", None, False),
        "kernels, CUDA graph": installed("auto", None, True),
        "torch.compile": compiled(False),
        "torch.compile, CUDA graph": compiled(True),
    }


# ---- weights to traverse with ----------------------------------------------------------------------


def random_weights(file: Path, dry: bool) -> Iterator[Row]:
    """A whole model of SD1.5's size with random weights in one float16 file, 2.1 GB."""
    config = PHANTOM if dry else SD15
    torch.manual_seed(0)
    with torch.device("cpu" if dry else "cuda"):
        networks = {"clip": CLIPTextEncoder(config.clip), "vae": AutoencoderKL(config.vae), "unet": UNet(config.unet)}
    for network in networks.values():
        network.half().cpu().eval()
    file.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(file, networks, overwrite=True)
    yield {"file": file.name, "gigabytes": file.stat().st_size / 1e9}
