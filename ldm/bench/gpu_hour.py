"""The first hour with a GPU: all that only it can tell, in parts that may fail, one file of tables at the end.

Each part is a process with a limit of its own. Its output is in OUT/PART.txt; results.json and results.md are written
anew after each, so that what is known stays when the machine goes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.bench.harness import environment
from ldm.bench.kernels import table
from ldm.files import write_json, write_text
from ldm.pipeline import PACKAGE

Json = dict[str, Any]
LDM = (sys.executable, "-m", "ldm_tools")
NEUTRAL = "Normal chest X-ray with no significant findings"
STYLE = "effusion=Chest X-ray of a subject with Pleural Effusion"
NEEDS = {"traverse": "weights", "traverse-torch": "weights"}  # what must run before


@dataclass(frozen=True)
class Part:
    """One process. says: what it is for."""

    name: str
    says: str
    minutes: float
    command: Sequence[str]


def parts(out: Path, dry: bool) -> list[Part]:
    """All of them, in the order of their worth."""

    def own(name: str) -> list[str]:
        return [*LDM, "bench", "gpu", "--part", name, "--out", str(out), *(["--dry-run"] if dry else [])]

    def traverse(name: str, *options: str) -> list[str]:
        tiny = ["--steps", "4", "--swap-steps", "1,2", "--bezier-points", "2", "--size", "64"] if dry else []
        prompts = ["--neutral", NEUTRAL, "--style", STYLE, "--seeds", "0"]
        return [
            *(*LDM, "traverse", *prompts, "--weights", str(out / "random.safetensors")),
            *("--device", "cpu" if dry else "cuda", *tiny, *options, "--out", str(out / name)),
        ]

    tests = PACKAGE.parent / "tests"
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(tests)]
    by_torch = traverse("traverse-torch", "--backend", "torch", "--no-cuda-graph")
    kernels = ["--compile-only", "--only", "geglu", "--capability", "90"] if dry else ["--out", str(out / "kernels")]
    listed = [
        Part("doctor", "what the machine is, and whether it works", 5, [*LDM, "doctor", "--json"]),
        Part("agree", "the shipped model against the CPU, in each precision", 4, own("agree")),
        Part("step", "a step of SD1.5's U-Net, every way", 9, own("step")),
        Part("kernels", "kernels and SDPA at every site", 6, [*LDM, "bench", "kernels", *kernels]),
        Part("tests", "pytest -m gpu", 9, [*pytest, *(["--collect-only"] if dry else [])]),
        Part("weights", "random weights to traverse with", 3, own("weights")),
        Part("traverse", "one seed and style at 50 steps with images, as by default", 4, traverse("traverse")),
        Part("traverse-torch", "the same by plain torch", 4, by_torch),
        Part("tune", "block sizes of self-attention and of GEGLU in its product", 9, own("tune")),
    ]
    return [part for part in listed if part.name != "tests" or tests.exists()]


def run(listed: Sequence[Part], out: Path, minutes: float) -> Iterator[tuple[Part, Json]]:
    """Run some parts one after the other; each as it is done, and what became of it.

    Args:    minutes: for all of them; what there is no time for is skipped.
    """
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Json] = {}
    began = time.monotonic()
    for part in listed:
        left = 60 * minutes - (time.monotonic() - began)
        results[part.name] = {"state": "skipped: no time"}
        if left > 5:
            results[part.name] = _run(part, out, min(60 * part.minutes, left))
        record = {"minutes": minutes, "environment": environment(), "parts": results}
        write_json(out / "results.json", record)
        write_text(out / "results.md", tables(record) + "\n")
        yield part, results[part.name]


def _run(part: Part, out: Path, seconds: float) -> Json:
    began, since, said = time.monotonic(), time.time() - 1, out / f"{part.name}.txt"  # 1: files' clocks are coarse
    with said.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(part.command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(seconds)
            state = "ok" if code == 0 else f"exit status {code}"
        except subprocess.TimeoutExpired:
            state = f"cut off after {seconds:.0f} s"
        finally:
            _end(process)
    text = said.read_text(encoding="utf-8", errors="replace")
    found: Json = {"state": state, "seconds": round(time.monotonic() - began, 1), "rows": list(rows(text))}
    for name, written in (("kernels", "ldm_kernels.json"), ("run", "run.json")):
        if (record := out / part.name / written).exists():
            if record.stat().st_mtime >= since:
                found[name] = json.loads(record.read_text())
            elif state == "ok":
                found["state"] = f"{record} is an earlier run's: nothing was measured, take another --out"
    bad = [row for row in found["rows"] if row.get("ok") is False]
    if found["state"] == "ok" and bad:
        found["state"] = f"{len(bad)} wrong"
    if found["state"] != "ok":
        found["last_lines"] = text.strip().splitlines()[-3:]
    return found


def _end(process: subprocess.Popen[bytes]) -> None:
    """A part and all that it started, where it has not ended by itself."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def rows(text: str) -> Iterator[Json]:
    """What a part printed: a JSON object a line, or one over many lines; anything else is passed over."""
    try:
        whole = json.loads(text)
    except ValueError:
        whole = None
    if isinstance(whole, dict):
        yield whole
        return
    for line in text.splitlines():
        if line.startswith("{"):
            try:
                yield json.loads(line)
            except ValueError:
                continue


def tables(record: Mapping[str, Any]) -> str:
    """results.md: what ran, then the numbers."""
    found = record["parts"]
    states = [{"part": name, "state": of["state"], "s": of.get("seconds")} for name, of in found.items()]
    where = ", ".join(f"{key} {value}" for key, value in record["environment"].items())
    text = ["# The first hour with a GPU", where, table(states)]
    for name, title in (("agree", "Error against the CPU's float32"), ("step", "A step of the U-Net")):
        kept = found.get(name, {}).get("rows", [])
        by_kind: dict[tuple[str, ...], list[Json]] = {}
        for row in kept:
            by_kind.setdefault(tuple(row), []).append(row)
        text += [f"## {title}"] if kept else []
        text += [table(kind) for kind in by_kind.values()]
    if kernel_rows := found.get("kernels", {}).get("kernels", {}).get("rows"):
        text += ["## Kernels and SDPA", table(kernel_rows)]
    runs = [{"run": name, **_cost(of["run"])} for name, of in found.items() if "run" in of]
    text += ["## A whole traversal", table(runs)] if runs else []
    text += _tuned([row for row in found.get("tune", {}).get("rows", []) if "best" in row])
    for name, of in found.items():
        if "last_lines" in of:
            text += [f"## {name}: {of['state']}", "\n".join(f"    {line}" for line in of["last_lines"])]
    return "\n\n".join(text)


def _tuned(rows: Sequence[Json]) -> list[str]:
    """Of each site the last row, which has what the ones before it had; and of all rows what failed."""
    last = {(row["kernel"], row["width"], row["n"]): row for row in rows}
    fastest = [
        {"kernel": kernel, "width": width, "n": n, **choice}
        for (kernel, width, n), row in last.items()
        for choice in row["best"][:5]
    ]
    failed = [f"    {line}" for row in rows for line in row["failed"]]
    text = ["## Block sizes, the five fastest", table(fastest)] if fastest else []
    return text + (["## Block sizes that failed", "\n".join(failed)] if failed else [])


def _cost(run: Mapping[str, Any]) -> Json:
    return {
        key: run.get(key) for key in ("seconds", "unet_rows", "backend", "cuda_graph", "dtype", "max_batch", "device")
    }
