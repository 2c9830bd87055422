"""`ldm bench unet` and `ldm bench vae`: a network's call against the rate of a matrix product, and where time goes.

ldm bench unet                                            the shipped phantom model
ldm bench unet --random-sd15 --batch 2                    SD1.5's size, where no file is at hand
ldm bench unet --random-sd15 --against openvino           in turn with a peer; also diffusers, previous --checkout DIR
ldm bench unet --growth                                   time against rows and image size, with the exponents
ldm bench vae --weights FILE --json > vae.json
"""

import argparse
import copy
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ldm import fast
from ldm.bench import harness, networks
from ldm.config import CONTEXT_TOKENS, SD15, Config
from ldm.pipeline import PHANTOM_WEIGHTS
from ldm.unet import UNet
from ldm.vae import AutoencoderKL
from ldm_tools.bench import against, growth
from ldm_tools.options import DTYPES, add_model, load_model, no_tf32

Network = Callable[[], Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the subjects to `parser`; they share their options."""
    parser.add_argument("--batch", type=int, default=2, help="latents in a call (default %(default)s)")
    parser.add_argument("--size", type=int, help="latent pixels a side (default: as trained)")
    parser.add_argument("--rounds", type=int, default=5, help="of the timing (default %(default)s)")
    parser.add_argument("--compile", action="store_true", help="also by torch.compile, which takes minutes to begin")
    parser.add_argument("--random-sd15", action="store_true", help="SD1.5's size with random weights, no file read")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_model(parser)


def run_unet(args: argparse.Namespace) -> None:
    """One evaluation of eps(x_t, t, context)."""
    growth.refuse_idle(args)
    against.refuse_idle(args)
    network, config, device, dtype = network_of(args, "unet")
    size = args.size or config.unet.sample_size
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(args.batch, config.unet.latent_channels, size, size, generator=generator).to(device, dtype)
    context = torch.randn(args.batch, CONTEXT_TOKENS, config.unet.context_width, generator=generator).to(device, dtype)
    assert isinstance(network, UNet)
    if args.growth:
        growth.report(args, network, config, x_t)
        return
    if args.against:
        against.report(args, network, x_t, context)
        return
    blocks = {f"{part}.{i}": block for part in ("down_blocks", "up_blocks") for i, block in parts(network, part)}
    blocks["mid_block"] = network.get_submodule("mid_block")
    report(args, "unet", network, blocks, lambda unet, x: unet(x, 500, context), x_t)


def run_vae(args: argparse.Namespace) -> None:
    """Decoding: what a traversal does fifty times a curve."""
    network, config, device, dtype = network_of(args, "vae")
    size = args.size or config.unet.sample_size
    z = torch.randn(args.batch, config.vae.latent_channels, size, size, generator=torch.Generator().manual_seed(0))
    blocks = {f"decoder.up_blocks.{i}": block for i, block in parts(network, "decoder.up_blocks")}
    blocks["decoder.mid_block"] = network.get_submodule("decoder.mid_block")
    report(args, "vae", network, blocks, lambda vae, x: vae.decode(x), z.to(device, dtype))


def network_of(args: argparse.Namespace, part: str) -> tuple[nn.Module, Config, torch.device, torch.dtype]:
    """The network that the options name. Raises ValueError for numbers that do not fit."""
    for name in ("batch", "rounds", "size"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name}: got {value}, expected 1 or more")
    if args.random_sd15:
        given = {"weights": args.weights != PHANTOM_WEIGHTS, "base": args.base, "ema": args.ema, "blocks": args.blocks}
        if idle := [name for name, value in given.items() if value]:
            raise ValueError(f"--{idle[0]}: it does nothing beside --random-sd15, which reads no file")
    else:
        sd = load_model(args)
        network: nn.Module = getattr(sd, part)
        return network, sd.config, sd.device, next(network.parameters()).dtype
    device = torch.device(args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES.get(args.dtype, torch.float16 if device.type == "cuda" else torch.float32)
    if dtype == torch.float32:
        no_tf32()
    torch.manual_seed(0)
    network = UNet(SD15.unet) if part == "unet" else AutoencoderKL(SD15.vae)
    network = network.to(device, dtype).eval()
    return network, SD15, device, dtype


def parts(network: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """A list of blocks and their numbers."""
    return list(network.get_submodule(name).named_children())


def report(
    args: argparse.Namespace,
    subject: str,
    network: nn.Module,
    blocks: dict[str, nn.Module],
    call: Callable[[Any, Tensor], Tensor],
    x: Tensor,
) -> None:
    """Measure and print."""
    ways = ways_of(args, network, call, x)
    result = networks.measure(ways, x.dtype, x.device.type, args.rounds, subject)
    result["blocks"] = networks.by_block(blocks, ways["eager"])
    result |= {
        "subject": subject,
        "backend": fast.resolved(args.backend, x.device),
        "shape": list(x.shape),
        "dtype": str(x.dtype).removeprefix("torch."),
        "peak_memory_mib": round(harness.peak_memory_mib(x.device)),
        "environment": harness.environment(),
    }
    print(json.dumps(result, indent=1) if args.json else table(result))


def ways_of(
    args: argparse.Namespace, network: nn.Module, call: Callable[[Any, Tensor], Tensor], x: Tensor
) -> dict[str, Network]:
    """Name -> a call, by every way that there is here; eager first, which ratios are taken to."""
    fast.install(network, kernels="torch")
    ways: dict[str, Network] = {"eager": partial(call, network, x)}
    other_layout = copy.deepcopy(network).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ways["channels_last"] = partial(call, other_layout, x)
    backend = fast.resolved(args.backend, x.device)
    if backend == "triton":
        fused = copy.deepcopy(network)
        if isinstance(network, UNet):
            fast.install(fused, kernels=args.backend)  # in half precision packed, and in channels_last
        else:
            fast.install(fused, kernels=args.backend, packed=False, channels_last=False)  # as ldm.load has it
        ways["kernels"] = partial(call, fused, x)
    if backend == "openvino" and isinstance(network, UNet):
        converted = copy.deepcopy(network)
        fast.install(converted, kernels="openvino")
        ways["openvino"] = partial(call, converted, x)
    if isinstance(network, UNet) and x.device.type == "cuda":
        graphed = copy.deepcopy(other_layout if backend == "torch" else network)
        installed = fast.install(graphed, kernels=args.backend, cuda_graph=True)
        with torch.inference_mode():
            call(graphed, x)
        if installed.cuda_graph_used:  # else the log has said why not
            ways["CUDA graph"] = partial(call, graphed, x)
    if args.compile:
        compiled = copy.deepcopy(network)
        compiled.forward = torch.compile(compiled.forward)  # type: ignore[method-assign]
        if isinstance(compiled, AutoencoderKL):
            compiled.decode = torch.compile(compiled.decode)  # type: ignore[method-assign]
        ways["compiled"] = partial(call, compiled, x)
    return ways


def table(result: dict[str, Any]) -> str:
    """The measurement for reading."""
    lines = [
        f"{result['subject']}, {result['dtype']}, {result['shape']}: {result['gflop']:.1f} GFLOP a call; a matrix "
        f"product reaches {result['matmul_gflops']:.0f} GFLOP/s here, so at least {result['floor_ms']:.0f} ms",
        f"{'':16}{'median ms':>11}{'p20':>9}{'p80':>9}{'GFLOP/s':>9}{'of matmul':>11}{'ratio':>7}",
    ]
    for name, way in result["ways"].items():
        lines.append(
            f"{name:16}{way['median_ms']:11.1f}{way['p20_ms']:9.1f}{way['p80_ms']:9.1f}{way['gflops']:9.0f}"
            f"{way['share_of_matmul']:11.0%}{way['ratio']:7.2f}"
        )
    for title in ("profile", "blocks"):
        shares = ", ".join(f"{name} {share:.0%}" for name, share in result[title].items())
        lines += [f"{title}: {shares}"] if shares else []
    return "\n".join(lines)
