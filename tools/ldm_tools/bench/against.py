"""`ldm bench unet --against PEER`: our U-Net and somebody else's, with the same weights, in turn in one process.

A peer is one function below: it takes our network and returns eps(x_t, t, context). None is imported unless it is asked
for, and none is needed by anything else here.
"""

import argparse
import copy
import importlib
import json
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ldm import fast
from ldm.bench import harness, networks
from ldm.checkpoint.config_json import written
from ldm.traversal.round_trip import relative_error
from ldm.unet import UNet
from ldm_tools.bench import peers

EpsFn = Callable[[Tensor, float, Tensor], Tensor]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
RESAMPLES = 2000  # of the rounds, for the interval


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the comparison to `parser`."""
    parser.add_argument("--against", choices=PEERS, help="time another U-Net with the same weights in turn with ours")
    parser.add_argument("--checkout", type=Path, help="for --against previous: a checkout of this project")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: processor time, for a busy machine (default %(default)s)"
    )


def refuse_idle(args: argparse.Namespace) -> None:
    """ValueError for an option that the measurement asked for does not take."""
    if (args.against == "previous") != bool(args.checkout):
        raise ValueError("--checkout: expected a folder with --against previous, and only there")
    if args.clock != "wall" and not (args.against or args.growth):
        raise ValueError("--clock: it belongs to --against and --growth, which are missing")
    if args.against and args.compile:
        raise ValueError("--compile: it does nothing beside --against; leave one of the two out")


def report(args: argparse.Namespace, network: UNet, x_t: Tensor, context: Tensor) -> None:
    """Measure and print. Raises ValueError where the peer is not here or computes something else."""
    if x_t.device.type != "cpu":
        raise ValueError(f"--against: peers are timed on a CPU, got {x_t.device}; expected --device cpu")
    with torch.inference_mode():
        float32 = network if x_t.dtype == torch.float32 else copy.deepcopy(network).float()
        exact = UNet.forward(float32, x_t.float(), 500, context.float())
    peer, version = PEERS[args.against](network, args)
    fast.install(network, kernels=args.backend)
    calls: dict[str, networks.Call] = {"ours": partial(network, x_t, 500, context)}
    calls[args.against] = partial(peer, x_t, 500, context)
    with torch.inference_mode():
        errors = {name: relative_error(call().float(), exact) for name, call in calls.items()}
        if not errors[args.against] <= 10 * networks.AGREEMENT[x_t.dtype]:
            raise ValueError(f"{args.against}: {errors[args.against]:.1e} away from ours in float32; not timed")
        gflop = networks.count_gflop(partial(UNet.forward, network, x_t, 500, context))
        result = compared(calls, args.rounds, CLOCKS[args.clock])
        rates = best_rates(x_t.dtype, CLOCKS[args.clock])
    for name, way in result["ways"].items():
        way |= {"error": errors[name], "gflops": 1000 * gflop / way["median_ms"]}
    result |= {
        "against": args.against,
        "version": version,
        "clock": args.clock,
        "shape": list(x_t.shape),
        "dtype": str(x_t.dtype).removeprefix("torch."),
        "gflop": gflop,
        **rates,
        "environment": harness.environment(),
    }
    print(json.dumps(result, indent=1) if args.json else table(result))


def compared(calls: dict[str, networks.Call], rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Medians, and the ratio of the peer's time to ours with its 95 % interval over rounds; in turn, both orders.

    calls: ours, then the peer. Above 1 ours is the faster.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in list(calls)[:: -1 if turn % 2 else 1]:
            began = clock()
            calls[name]()
            taken[name].append(clock() - began)
    ours, theirs = (np.array(seconds) for seconds in taken.values())
    ratios = theirs / ours
    again = np.random.default_rng(0).choice(ratios, (RESAMPLES, rounds))
    low, high = np.quantile(np.median(again, axis=1), [0.025, 0.975])
    return {
        "ratio": float(np.median(ratios)),
        "interval": [float(low), float(high)],
        "rounds": rounds,
        "ways": {name: {"median_ms": 1000 * float(np.median(seconds))} for name, seconds in taken.items()},
    }


def best_rates(dtype: torch.dtype, clock: Callable[[], float]) -> dict[str, float]:
    """The best rates here, in GFLOP/s: of a large matrix product, and of 3 x 3 convolutions as SD1.5 has them."""
    a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    convolutions = []
    for channels, side in ((320, 64), (640, 32), (1280, 16)):
        x = torch.randn(2, channels, side, side).to(dtype)
        weight = torch.randn(channels, channels, 3, 3).to(dtype)
        gflop = 2 * 9 * x.numel() * channels / 1e9
        convolutions.append(gflop / _seconds(partial(F.conv2d, x, weight, padding=1), clock))
    return {"matmul_gflops": 2 * 2048**3 / 1e9 / _seconds(lambda: a @ b, clock), "conv_gflops": max(convolutions)}


def _seconds(call: Callable[[], Tensor], clock: Callable[[], float]) -> float:
    """The least of a few calls."""
    taken = []
    for _ in range(4):
        began = clock()
        call()
        taken.append(clock() - began)
    return min(taken)


def table(result: dict[str, Any]) -> str:
    """The comparison for reading."""
    low, high = result["interval"]
    lines = [
        f"unet, {result['dtype']}, {result['shape']}, {result['rounds']} rounds of {result['clock']} time: ours is "
        f"{result['ratio']:.2f} x as fast as {result['against']} {result['version']} ({low:.2f} to {high:.2f})",
        f"best rates here: 3 x 3 convolutions {result['conv_gflops']:.0f} GFLOP/s, matrix product "
        f"{result['matmul_gflops']:.0f}; a call is {result['gflop']:.1f} GFLOP",
        f"{'':12}{'median ms':>11}{'GFLOP/s':>9}{'error to float32':>18}",
    ]
    for name, way in result["ways"].items():
        lines.append(f"{name:12}{way['median_ms']:11.1f}{way['gflops']:9.0f}{way['error']:18.1e}")
    return "\n".join(lines)


def _openvino(network: UNet, args: argparse.Namespace) -> tuple[EpsFn, str]:
    unet = copy.deepcopy(network)
    engine = fast.install(unet, kernels="openvino").by_openvino
    assert engine is not None
    return unet, str(engine.record()["version"])


def _diffusers(network: UNet, args: argparse.Namespace) -> tuple[EpsFn, str]:
    diffusers = peers.library("diffusers")
    unet = diffusers.UNet2DConditionModel.from_config(written(network.config))
    unet.load_state_dict(network.state_dict())
    unet = unet.to(network.conv_in.weight.dtype).eval()
    return lambda x_t, t, context: unet(x_t, t, context).sample, diffusers.__version__


def _previous(network: UNet, args: argparse.Namespace) -> tuple[EpsFn, str]:
    if not (args.checkout / "ldm" / "unet.py").exists():
        raise ValueError(f"--checkout: {args.checkout} has no ldm/unet.py, expected a checkout of this project")
    try:
        with _modules_of(args.checkout):
            unet, config = (importlib.import_module(f"ldm.{name}") for name in ("unet", "config"))
            theirs = unet.UNet(config.UNetConfig(**asdict(network.config)))
            theirs.load_state_dict(network.state_dict())
            theirs = theirs.to(network.conv_in.weight.dtype).eval()
            if (args.checkout / "ldm" / "fast").exists():  # before it was there, nothing was installed on a CPU
                importlib.import_module("ldm.fast").install(theirs, kernels="torch")
    except (ImportError, AttributeError, TypeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(f"--checkout: the U-Net of {args.checkout} is not made as this one's: {reason}") from None
    return theirs, str(args.checkout)


@contextmanager
def _modules_of(checkout: Path) -> Any:
    """While open, `import ldm` reads another checkout's files; ours come back at the end."""
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if _is_ours(name)}
    folders = [str(checkout.resolve()), str(checkout.resolve() / "kernels")]
    sys.path[:0] = folders
    try:
        yield
    finally:
        theirs: list[str] = [name for name in sys.modules if _is_ours(name)]
        for name in theirs:
            del sys.modules[name]
        restored: dict[str, ModuleType] = ours
        sys.modules.update(restored)
        for folder in folders:
            sys.path.remove(folder)


def _is_ours(name: str) -> bool:
    return name.split(".")[0] in ("ldm", "ldm_kernels")


PEERS: dict[str, Callable[[UNet, argparse.Namespace], tuple[EpsFn, str]]] = {
    "openvino": _openvino,
    "diffusers": _diffusers,
    "previous": _previous,
}
