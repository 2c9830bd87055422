"""What only a GPU can tell, part by part: each is a generator of rows, so that what is known is written at once.

A dry run takes the same steps on the CPU with a network of a few channels; its numbers mean nothing.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm import checkpoint, fast, pipeline
from ldm.bench.harness import gpu_ms, synchronise, time_in_turn
from ldm.bench.networks import AGREEMENT, count_gflop
from ldm.blocks import attend
from ldm.clip import CLIPTextEncoder
from ldm.config import CONTEXT_TOKENS, PHANTOM, SD15
from ldm.fast.cuda_graph import CudaCapture
from ldm.fast.first_use import FACTOR
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
    cases = [(torch.float16, 2), (torch.float16, 18), (torch.bfloat16, 2), (torch.float32, 2)]
    for dtype, rows in cases[3:] if dry else cases[:3]:
        yield from _step_of(network, dtype, rows, dry)


def _step_of(network: UNet, dtype: torch.dtype, rows: int, dry: bool) -> Iterator[Row]:
    """A row for each way that says whether it is right, then one for each that is, with its times."""
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


# ---- block sizes of self-attention -----------------------------------------------------------------

LENGTHS = {40: 4096, 80: 1024, 160: 256}
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

    shipped = {str(c) for c in CONFIGURATIONS}
    every = candidates()
    if dry:
        with_descriptors = sum(c.layout == "box" for c in every)
        counts = {"candidates": len(every), "of_them_shipped": sum(str(c) in shipped for c in every)}
        yield {**counts, "of_them_with_descriptors": with_descriptors}
        return
    groups: dict[tuple[str, int, bool], list[Any]] = {}
    for c in every:
        if c.layout != "box" or torch.cuda.get_device_capability() == (9, 0):
            groups.setdefault((c.kernel, c.width, c.layout == "box"), []).append(c)
    took: dict[tuple[str, int], list[tuple[float, str]]] = {}
    for (kernel, width, descriptors), group in groups.items():
        n, times, failed = LENGTHS[width], took.setdefault((kernel, width), []), []
        for c in group:
            try:
                require_right(c)
                times.append((1000 * statistics.median(gpu_ms(_work(c, n)[0], 20)), str(c)))
            except Exception as error:  # does not fit, does not compile, is wrong: it is out
                failed.append(f"{c}: {' '.join(str(error).split())[:100]}")
        best = [{"us": round(us, 1), "candidate": name, "shipped": name in shipped} for us, name in sorted(times)]
        site = {"kernel": kernel, "width": width, "n": n, "batch": 2, "descriptors": descriptors}
        yield {**site, "best": best, "failed": failed}


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


def require_right(c: Any, device: str = "cuda", n: int = 256) -> None:
    """Raises ValueError where a candidate's results on a short case are not what first use asks of a kernel."""
    call, views, results = _work(c, n, 1, 2, device)
    call()
    exact, theirs = (_by_torch(c.kernel, [x.to(dtype) for x in views]) for dtype in (torch.float64, torch.float16))
    for ours, peer, true in zip(results, theirs, exact, strict=True):
        error, allowed = (
            relative_error(ours, true),
            FACTOR * relative_error(peer, true) + 2 * torch.finfo(torch.float16).eps,
        )
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
