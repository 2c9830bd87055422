"""`ldm bench unet --growth`: a call's time against rows and against image size, with the exponent of each.

ldm bench unet --growth                                   the shipped phantom model, 1 to 32 rows, 128 to 512 px
ldm bench unet --growth --random-sd15 --out out/sd15      SD1.5's size, 256 to 1024 px: long on a CPU
"""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm import fast
from ldm.bench import growth, harness, networks
from ldm.bench.growth import Point
from ldm.bench.rows import RowFile
from ldm.config import CONTEXT_TOKENS, Config
from ldm.files import write_json, write_text
from ldm.study.report.plot_style import save_figure
from ldm.traversal.plan import parse_integers
from ldm.unet import UNet
from ldm_tools.bench.against import CLOCKS

Json = dict[str, Any]
ROWS = "1,2,4,8,16,32"
OUT = Path("out/bench/growth")
OPTIONS = ("growth_rows", "growth_sizes", "out")  # that belong to --growth alone


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the measurement to `parser`."""
    group = parser.add_argument_group(
        "growth",
        "Time against rows, of images of --size, and against image size, --batch rows a call; each with the exponent k "
        "of time ~ size^k by least squares on logarithms. The median of --rounds calls; what would not fit into half "
        "of the free memory is left out, and named. A line a timing in growth.jsonl, from which a run that was stopped "
        "goes on; at the end growth.json, .csv, .png, .pdf.",
    )
    group.add_argument("--growth", action="store_true", help="measure this instead")
    group.add_argument("--growth-rows", metavar="ROWS", help=f"rows in a call, such as 1,8,64 (default {ROWS})")
    group.add_argument(
        "--growth-sizes",
        metavar="PX",
        help="image pixels a side, such as 256,512 (default: a model's own to 4 times that; of 512 px, half to twice)",
    )
    group.add_argument("--out", type=Path, help=f"folder (default {OUT})")


def refuse_idle(args: argparse.Namespace) -> None:
    """ValueError for an option that the measurement asked for does not take."""
    if not args.growth:
        if idle := [name for name in OPTIONS if getattr(args, name) is not None]:
            raise ValueError(f"--{idle[0].replace('_', '-')}: it belongs to --growth, which is missing")
    elif idle := [name for name in ("against", "checkout", "compile") if getattr(args, name)]:
        raise ValueError(f"--{idle[0]}: it does nothing beside --growth; leave one of the two out")


def report(args: argparse.Namespace, network: UNet, config: Config, x: Tensor) -> None:
    """Measure, write and print; x: an example of the latents' device and precision. ValueError for what is no size."""
    folder = args.out or OUT
    by_rows, by_size, left_out = points_of(args, config, x)
    points = list(dict.fromkeys([*by_rows, *by_size]))
    one_row = {side: gflop_of(network, config, x, side) for side in {point.side for point in points}}
    fast.install(network, kernels=args.backend)
    environment = harness.environment()
    chosen = ("random_sd15", "weights", "base", "ema", "dtype", "device", "blocks", "backend", "clock")
    settings = {name: str(getattr(args, name)) for name in chosen} | {"environment": environment}
    file = RowFile(folder / "growth.jsonl", settings, growth.NAMES)
    total = len(points) * args.rounds
    known = sum({**point._asdict(), "round": turn} in file for point in points for turn in range(args.rounds))
    if known:
        print(f"{known} of {total} timings are read from {file.path}", file=sys.stderr)
    inputs = cache(partial(random_inputs, config, x))
    with torch.inference_mode(), tqdm(total=total, initial=known, desc="unet", unit="call", leave=False) as bar:
        call = lambda point: network(inputs(point)[0], 500, inputs(point)[1])  # noqa: E731
        growth.measure(call, points, args.rounds, CLOCKS[args.clock], file, bar.update)

    def series(chosen: Sequence[Point], sizes: Sequence[int]) -> Json:
        gflop = [point.rows * one_row[point.side] for point in chosen]
        found = growth.series(chosen, sizes, growth.times(file, chosen, args.rounds), gflop)
        for row in found["points"]:
            row["px"] = row["side"] * config.vae.downscale
        return found

    pixels = [(point.side * config.vae.downscale) ** 2 for point in by_size]
    result = {
        "series": {"rows": series(by_rows, [point.rows for point in by_rows]), "pixels": series(by_size, pixels)},
        "left_out": left_out,
        "rounds": args.rounds,
        "clock": args.clock,
        "dtype": str(x.dtype).removeprefix("torch."),
        "backend": fast.resolved(args.backend, x.device),
        "environment": environment,
    }
    write_json(folder / "growth.json", result)
    write_text(folder / "growth.csv", growth.as_csv(result))
    save_figure(growth.figure(result), folder / "growth")
    print(json.dumps(result, indent=1) if args.json else f"{table(result)}\nsee {folder / 'growth.png'}")


def points_of(args: argparse.Namespace, config: Config, x: Tensor) -> tuple[list[Point], list[Point], list[str]]:
    """The points by rows and by size, and a line for each that memory has no room for."""
    rows = parse_integers(args.growth_rows or ROWS, "--growth-rows")
    downscale, multiple = config.vae.downscale, 2 ** (len(config.unet.widths) - 1)
    side = args.size or config.unet.sample_size
    if side % multiple:
        raise ValueError(f"--size: got {side}, expected a multiple of {multiple}")
    sides = growth.usual_sides(config.unet.sample_size, multiple)
    if args.growth_sizes:
        sizes = parse_integers(args.growth_sizes, "--growth-sizes")
        if wrong := [size for size in sizes if size < 1 or size % (downscale * multiple)]:
            raise ValueError(f"--growth-sizes: got {wrong[0]}, expected multiples of {downscale * multiple} px")
        sides = [size // downscale for size in sizes]
    if min(rows) < 1:
        raise ValueError(f"--growth-rows: got {min(rows)}, expected 1 or more")
    room, left_out = growth.room_bytes(x.device), []
    kept: list[list[Point]] = []
    series = {
        "--growth-rows": [Point(count, side) for count in sorted(set(rows))],
        "--growth-sizes": [Point(args.batch, size) for size in sorted(set(sides))],
    }
    for option, points in series.items():
        needs = {point: growth.need_bytes(point, config.unet.widths[0], x.element_size()) for point in points}
        kept.append([point for point in points if needs[point] <= room])
        left_out += [
            f"{point.rows} rows of {point.side * downscale} px: about {need / 2**30:.1f} GiB, and {room / 2**30:.1f} "
            "(half of what is free) may be used"
            for point, need in needs.items()
            if need > room
        ]
        if len(kept[-1]) < 2:
            why = f"; left out: {left_out[-1]}" if len(points) > 1 else ""
            raise ValueError(f"{option}: {len(kept[-1])} points, expected 2 or more to fit an exponent to{why}")
    return kept[0], kept[1], list(dict.fromkeys(left_out))


def random_inputs(config: Config, x: Tensor, point: Point) -> tuple[Tensor, Tensor]:
    """Latents and contexts of a call."""
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(point.rows, config.unet.latent_channels, point.side, point.side, generator=generator)
    context = torch.randn(point.rows, CONTEXT_TOKENS, config.unet.context_width, generator=generator)
    return x_t.to(x), context.to(x)


def gflop_of(network: UNet, config: Config, x: Tensor, side: int) -> float:
    """Operations of one row; every product has a row of its own, so more rows are as many times that."""
    x_t, context = random_inputs(config, x, Point(1, side))
    with torch.inference_mode():
        return networks.count_gflop(partial(UNet.forward, network, x_t, 500, context))


def table(result: Json) -> str:
    """The measurement for reading."""
    lines = [f"unet, {result['dtype']}, {result['clock']} time, median of {result['rounds']}"]
    for name, one in result["series"].items():
        lines.append(
            f"time ~ {name}^{growth.exponent_text(one)}, off that line by {one['worst']:.0%} at most; between the last "
            f"two {one['slopes'][-1]:.2f}; operations ~ {name}^{one['operations_exponent']:.2f}"
        )
        lines.append(f"{'rows':>8}{'px':>8}{'median ms':>11}{'p20':>9}{'p80':>9}{'ms a row':>10}{'GFLOP/s':>9}")
        for row in one["points"]:
            lines.append(
                f"{row['rows']:8}{row['px']:8}{row['median_ms']:11.1f}{row['p20_ms']:9.1f}{row['p80_ms']:9.1f}"
                f"{row['median_ms'] / row['rows']:10.2f}{row['gflops']:9.0f}"
            )
    return "\n".join([*lines, *(f"left out: {line}" for line in result["left_out"])])
