"""`ldm inspect`: what a checkpoint is, its networks and their configuration, and what becomes of every key.

ldm inspect weights/v1-5-pruned-emaonly.safetensors
ldm inspect weights/phantom.safetensors --trace --size 256
ldm inspect weights/phantom.safetensors --change transformer_depth=2 --change attention=true,true,true
"""

import argparse
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ldm import pipeline
from ldm.checkpoint import Examined, adapted, examine, identify, save, sha256
from ldm.checkpoint.adapters import read_embedding, read_lora
from ldm.checkpoint.container import LazyTensor
from ldm.checkpoint.layouts import PARTS
from ldm.checkpoint.loading import build
from ldm.checkpoint.report import require_fit
from ldm.config import SD15, CLIPConfig, Config, UNetConfig, VAEConfig
from ldm.probe import surgery, trace
from ldm.unet import UNet
from ldm_tools.options import add_adapters, lora_files, own_blocks

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command to `parser`."""
    parser.description = (
        "Say what a file or folder of weights is, from its header; of its weights only whether they are numbers. "
        "Fails when any key is missing, unexpected or of the wrong shape, after saying which."
    )
    parser.add_argument("file", type=Path, help="a .safetensors file, or a folder")
    add_adapters(parser)
    parser.add_argument("--blocks", metavar="FILE.py:NAME", help="a UNetBlocks of your own: the one it was saved with")
    parser.add_argument("--json", action="store_true", help="everything, as JSON")
    parser.add_argument("--keys", action="store_true", help="also list every key, as it is stored and as it is here")
    parser.add_argument(
        "--no-hash",
        action="store_true",
        help="leave away what reads every byte: the SHA-256, and the search for NaN and Inf",
    )
    parser.add_argument(
        "--trace",
        action="store_true",
        help="every block as it runs: shapes, parameters, FLOPs, memory; needs no memory",
    )
    parser.add_argument(
        "--size", help="of the traced image in pixels, WIDTHxHEIGHT or one number (default: as trained)"
    )
    parser.add_argument("--batch", type=int, default=1, help="traced images (default %(default)s)")
    parser.add_argument(
        "--change",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="a setting of the U-Net, as listed, such as heads=4: what a network with it would take over and cost",
    )
    parser.add_argument("--out", type=Path, help="write the model with the changed U-Net as a new file, to train on")


def run(args: argparse.Namespace) -> None:
    """Print the description. Raises CheckpointError when the path is no SD1.5 model, or its keys do not fit."""
    _, blocks = own_blocks(args, args.file)
    if (saved_with := identify(args.file).blocks) and saved_with != blocks.changes():
        raise ValueError(f"{args.file}: its U-Net was saved with {saved_with}: name those by --blocks FILE.py:NAME")
    examined = examine(adapted(identify(args.file), lora_files(args), args.embeddings), blocks)
    if args.out and not args.change:
        raise ValueError("--out: it writes a changed network; expected --change FIELD=VALUE, too; see ldm convert")
    if args.batch < 1:
        raise ValueError(f"--batch: got {args.batch}, expected 1 or more")
    facts = describe(examined, with_hashes=not args.no_hash)
    traces, text = {}, []
    if args.trace:
        traces = trace_examined(examined, args.size, args.batch)
        facts["trace"] = {name: [asdict(block) for block in blocks] for name, blocks in traces.items()}
        text += trace_lines(traces)
    adapter_lines = describe_adapters(args)
    if adapter_lines:
        facts["adapters"] = adapter_lines
        text += ["", *(f"  {line}" for line in adapter_lines)]
    if args.change:
        changed = change_unet(examined, args.change)
        facts["changed"], changed_text = describe_change(examined, changed, args.size, args.batch)
        text += changed_text
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        print("\n".join(lines(facts)))
        if args.keys:
            print("\n".join(key_lines(examined)))
        print("\n".join(text), end="\n" if text else "")
    require_fit(examined.checkpoint, examined.report)
    if args.out:
        write_changed(args, changed)


def write_changed(args: argparse.Namespace, config: UNetConfig) -> None:
    """The model with the U-Net that was asked for, each tensor as the description says."""
    _, blocks = own_blocks(args, args.file)
    sd = pipeline.load(args.file, dtype=None, loras=lora_files(args), embeddings=args.embeddings, blocks=blocks)
    unet, _ = surgery.rebuild(sd.unet, config)
    save(args.out, {"clip": sd.clip, "vae": sd.vae, "unet": unet}, diffusion=sd.diffusion)
    logger.info("wrote %s; ldm finetune --weights %s trains it on", args.out, args.out)


def describe_adapters(args: argparse.Namespace) -> list[str]:
    """A line for each LoRA and embedding that was given."""
    lines = [f"{path}: {read_lora(path).describe()}, at weight {weight:g}" for path, weight in lora_files(args)]
    for path in args.embeddings:
        lines += [f"{path}: the word {e.word!r}, {e.rows} tokens" for e in read_embedding(path)]
    return lines


def describe(examined: Examined, with_hashes: bool) -> dict[str, Any]:
    """Everything about a checkpoint that its headers and its hashes tell, for JSON."""
    checkpoint = examined.checkpoint
    parts = {}
    for part, tensors in checkpoint.parts.items():
        network = part.removesuffix("_ema")
        weights = [tensors[name] for name in examined.networks[network].state_dict() if name in tensors]
        parts[part] = {
            "parameters": sum(math.prod(tensor.shape) for tensor in weights),
            "tensors": len(weights),
            "dtypes": _dtypes(weights),
            "config": asdict(examined.configs[network]),
        }
        if with_hashes:  # which reads every byte, as this does
            parts[part]["not_finite"] = [t.key for t in weights if not t.values().float().isfinite().all()]
    return {
        "path": str(checkpoint.path),
        "is": checkpoint.describe(),
        "files": [
            {
                "path": str(file.path),
                "bytes": file.header.file_bytes,
                "sha256": _hash(file.path) if with_hashes else None,
                "metadata": file.header.metadata,
            }
            for file in checkpoint.files
        ],
        "parts": parts,
        "keys": examined.report.to_dict(),
        "fits": examined.report.ok,
    }


def _dtypes(tensors: Iterable[LazyTensor]) -> dict[str, int]:
    return dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors))


def _hash(path: Path) -> str:
    with tqdm(total=path.stat().st_size, unit="B", unit_scale=True, disable=None, leave=False, desc="SHA-256") as bar:
        return sha256(path, bar.update)


def lines(facts: dict[str, Any]) -> list[str]:
    """The description as text."""
    text = [f"{facts['path']}: {facts['is']}"]
    for file in facts["files"]:
        name = f"{file['path']}: " if len(facts["files"]) > 1 else ""
        digest = f", sha256 {file['sha256']}" if file["sha256"] else ""
        text.append(f"  {name}{file['bytes']:,} bytes{digest}")
    for part, row in facts["parts"].items():
        dtypes = ", ".join(row["dtypes"])
        text.append(f"  {part:8} {row['parameters']:>13,} parameters in {row['tensors']} tensors of {dtypes}")
        if part in PARTS:
            text.append("           " + ", ".join(f"{name} {value}" for name, value in row["config"].items()))
    for part, row in facts["parts"].items():
        if bad := row.get("not_finite"):
            text.append(f"  {part}: {len(bad)} tensors hold NaN or Inf, the first {bad[0]}: get the file again")
    keys = facts["keys"]
    counts = {
        "used": keys["used"],
        "known and not needed": keys["unneeded"],
        "missing": keys["missing"],
        "unexpected": keys["unexpected"],
        "of wrong shape": keys["wrong_shape"],
    }
    text.append("  keys: " + ", ".join(f"{len(names)} {kind}" for kind, names in counts.items()))
    text += [f"    missing      {name}" for name in keys["missing"]]
    text += [f"    unexpected   {name}" for name in keys["unexpected"]]
    text += [f"    wrong shape  {name} {shape}, expected {expected}" for name, shape, expected in keys["wrong_shape"]]
    return text


def key_lines(examined: Examined) -> list[str]:
    """Every key: its name in the file, shape and dtype, and where it goes."""
    unneeded = set(examined.report.unneeded)
    rows = []
    for part, tensors in examined.checkpoint.parts.items():
        for name, tensor in tensors.items():
            rows.append((tensor, "not needed" if tensor.key in unneeded else f"{part}.{name}"))
    rows += [(tensor, "not needed") for tensor in examined.checkpoint.extras]
    text = []
    for tensor, place in sorted(rows, key=lambda row: row[0].key):
        text.append(f"    {tensor.key} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} -> {place}")
    return text


# ---- what runs, and what it costs ------------------------------------------------------------------------------------


def whole_config(examined: Examined) -> Config:
    """The configuration of all three networks; SD1.5's where the checkpoint lacks one."""
    clip, vae, unet = (examined.configs.get(part, getattr(SD15, part)) for part in PARTS)
    assert isinstance(clip, CLIPConfig)
    assert isinstance(vae, VAEConfig)
    assert isinstance(unet, UNetConfig)
    return Config(clip, vae, unet)


def parse_size(text: str | None) -> tuple[int, int] | None:
    """ "640x512" -> (512, 640), height and width in pixels. Raises ValueError for other text."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match:
        raise ValueError(f"--size: got {text!r}, expected WIDTHxHEIGHT or one number, in pixels")
    return int(match[2] or match[1]), int(match[1])


def trace_examined(examined: Examined, size: str | None, batch: int) -> dict[str, list[trace.Block]]:
    """The blocks of the networks that the checkpoint has. Raises ValueError for a size that does not fit."""
    traces = trace.trace_model(whole_config(examined), parse_size(size), batch)
    return {name: blocks for name, blocks in traces.items() if name.split(".")[0] in examined.configs}


def trace_lines(traces: Mapping[str, Sequence[trace.Block]]) -> list[str]:
    """A table for each network, a line for each block in running order, and the total."""
    text = []
    for network, blocks in traces.items():
        width = max(len(block.name) for block in blocks)
        text += [
            "",
            f"  {network}",
            f"    {'':{width}} {'in -> out':>37} {'parameters':>13} {'GFLOP':>10} {'MiB kept':>9}",
        ]
        for block in blocks:
            shapes = f"{_shape(block.input)} -> {_shape(block.output)}"
            text.append(f"    {block.name:{width}} {shapes:>37} {_costs(block)}")
        text.append(f"    {'total':{width}} {'':37} {_costs(trace.Cost.of(blocks))}")
    return [
        *text,
        "",
        "  GFLOP: 10^9 operations of convolutions and matrix products, a multiplication and its addition being two;",
        "  MiB kept: what the backward pass needs, in float32, with fused attention. None of it is held by sampling.",
    ]


def _shape(shape: Sequence[int]) -> str:
    return "x".join(str(size) for size in shape)


def _costs(cost: trace.Block | trace.Cost) -> str:
    return f"{cost.parameters:>13,} {cost.flops / 1e9:>10,.3f} {cost.kept_bytes / 2**20:>9,.2f}"


# ---- a changed U-Net -------------------------------------------------------------------------------------------------


def change_unet(examined: Examined, changes: Sequence[str]) -> UNetConfig:
    """The U-Net's configuration with some fields changed, each written as its field is: 4, 0.5, true, or 1,2,3.

    Raises: ValueError: for no U-Net, a field that it does not have, or a value of another kind.
    """
    config = examined.configs.get("unet")
    if not isinstance(config, UNetConfig):
        raise ValueError("--change: there is no U-Net in this file")
    fields = asdict(config)
    values: dict[str, Any] = {}
    for change in changes:
        name, _, text = change.partition("=")
        if name not in fields:
            raise ValueError(f"--change: got {change!r}, expected FIELD=VALUE with one of {', '.join(fields)}")
        try:
            value = json.loads(f"[{text}]") if isinstance(fields[name], tuple) else json.loads(text)
        except ValueError as error:
            raise ValueError(f"--change: got {change!r}, expected a value like {fields[name]!r}") from error
        kind = fields[name][0] if isinstance(fields[name], tuple) else fields[name]
        if any(type(item) is not type(kind) for item in (value if isinstance(value, list) else [value])):
            raise ValueError(f"--change: got {change!r}, expected a value like {fields[name]!r}")
        values[name] = tuple(value) if isinstance(value, list) else value
    return replace(config, **values)


def describe_change(
    examined: Examined, config: UNetConfig, size: str | None, batch: int
) -> tuple[dict[str, Any], list[str]]:
    """What the changed U-Net takes over and what both cost, for JSON and as text; no weight is read."""
    before, after = examined.networks["unet"], build(config)
    assert isinstance(before, UNet)
    assert isinstance(after, UNet)
    shapes = {name: tuple(tensor.shape) for name, tensor in before.state_dict().items()}
    transplant = surgery.plan(shapes, after)
    f = whole_config(examined).vae.downscale
    height, width = parse_size(size) or (f * config.sample_size,) * 2
    costs = [trace.by_part(trace.trace_unet(unet, (height // f, width // f), batch)) for unet in (before, after)]
    rows = {
        part: [cost.get(part, trace.Cost(0, 0, 0)) for cost in costs] for part in dict.fromkeys([*costs[0], *costs[1]])
    }
    rows["total"] = [trace.Cost.of(cost.values()) for cost in costs]
    text = ["", "  the U-Net changed: " + ", ".join(_differences(before.config, config)) or "nothing"]
    text += [f"    {line}" for line in str(transplant).splitlines()]
    if config.heads != before.config.heads:  # which no tensor's shape shows
        text.append(
            f"    heads {before.config.heads} -> {config.heads}: every attention's weights are carried over, and cut "
            "into heads of another width, so the network computes something else until it is trained on"
        )
    text += [f"    {'':16} {'parameters before':>18} {'after':>14} {'GFLOP before':>13} {'after':>10}"]
    for part, (old, new) in rows.items():
        flops = f"{old.flops / 1e9:>13,.3f} {new.flops / 1e9:>10,.3f}"
        text.append(f"    {part:16} {old.parameters:>18,} {new.parameters:>14,} {flops}")
    facts = {
        "config": asdict(config),
        "transplant": asdict(transplant),
        "costs": {part: {"before": asdict(old), "after": asdict(new)} for part, (old, new) in rows.items()},
    }
    return facts, text


def _differences(before: UNetConfig, after: UNetConfig) -> list[str]:
    old, new = asdict(before), asdict(after)
    return [f"{name} {old[name]} -> {new[name]}" for name in new if old[name] != new[name]]
