"""`ldm inspect`: what a checkpoint is, its networks and their configuration, and what becomes of every key.

ldm inspect weights/v1-5-pruned-emaonly.safetensors
"""

import argparse
import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ldm.checkpoint import Examined, examine, identify, sha256
from ldm.checkpoint.container import LazyTensor
from ldm.checkpoint.layouts import PARTS
from ldm.checkpoint.report import require_fit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command to `parser`."""
    parser.description = (
        "Say what a file or folder of weights is, from its header alone: no weight is loaded. "
        "Fails when any key is missing, unexpected or of the wrong shape, after saying which."
    )
    parser.add_argument("file", type=Path, help="a .safetensors file, or a folder")
    parser.add_argument("--json", action="store_true", help="everything, as JSON")
    parser.add_argument("--keys", action="store_true", help="also list every key, as it is stored and as it is here")
    parser.add_argument("--no-hash", action="store_true", help="leave the SHA-256 away, which reads every byte")


def run(args: argparse.Namespace) -> None:
    """Print the description. Raises CheckpointError when the path is no SD1.5 model, or its keys do not fit."""
    examined = examine(identify(args.file))
    facts = describe(examined, with_hashes=not args.no_hash)
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        print("\n".join(lines(facts)))
        if args.keys:
            print("\n".join(key_lines(examined)))
    require_fit(examined.checkpoint, examined.report)


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
    text += [f"    wrong shape  {name} {found}, expected {expected}" for name, found, expected in keys["wrong_shape"]]
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
