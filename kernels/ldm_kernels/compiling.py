"""Compiles every shipped configuration for GPUs that are not there, and holds what comes out to bounds.

What a GPU will do with a kernel is in its machine code: registers, numbers spilled to memory, shared memory, how wide
the loads are, whether the matrix products reach the tensor cores, how long the loop is. `ptxas` and `cuobjdump`, which
come with Triton, say all of it on any Linux machine. What code may not be is in `complaints`; what it was when it was
last looked at is in compiled-*.json, one for each Triton, and code that has become more than 5 % worse than what the
same Triton made is refused as well.

This file may be imported anywhere; Triton is imported in the processes that compile.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from math import ceil
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm_kernels.specs import Spec

RECORDS = Path(__file__).parent
WORSE = 1.05  # times what is recorded
READS_LITTLE = ("group_norm_silu.combine",)  # a few KiB in all: how wide its loads are does not matter


@dataclass(frozen=True)
class Multiprocessor:
    """What the programs that run on one multiprocessor at a time have to share. [CUDA programming guide, table of
    compute capabilities]"""

    threads: int
    programs: int
    shared_kib: int  # of which each program needs one more than it asks for
    most_shared_kib: int  # that one program may ask for
    registers: int = 65536


GPUS = {
    80: Multiprocessor(threads=2048, programs=32, shared_kib=164, most_shared_kib=163),  # A100
    86: Multiprocessor(threads=1536, programs=16, shared_kib=100, most_shared_kib=99),  # RTX 30, A10
    89: Multiprocessor(threads=1536, programs=24, shared_kib=100, most_shared_kib=99),  # RTX 40, L4
    90: Multiprocessor(threads=2048, programs=32, shared_kib=228, most_shared_kib=227),  # H100
}


@dataclass(frozen=True)
class Compiled:
    """What became of one configuration on one GPU."""

    name: str
    capability: int
    registers: int  # a thread
    spilled_bytes: int  # a thread, stored and loaded again for want of registers
    local_accesses: int  # instructions that do so
    shared_bytes: int
    programs: int  # on a multiprocessor at a time
    tensor_instructions: int  # HMMA, HGMMA
    narrow_loads: int  # of 2 bytes a thread
    wide_loads: int  # of 16 bytes a thread, into registers
    wide_copies: int  # of 16 bytes a thread or whole tiles into shared memory, while the program goes on computing
    serialized: bool  # matrix products of the Hopper kind that wait for each other
    loop_instructions: int  # of the loop with most matrix products, all groups of warps; without one, of the kernel
    useful_ratio: float | None  # see Spec
    most_useful_ratio: float | None
    pipelined: bool  # has a loop whose loads are to run ahead


Job = tuple["Callable[[], Iterator[Spec]]", str, int]  # where the specs come from, the name of one, the capability


def shipped() -> Iterator[Spec]:
    """Every configuration of every kernel."""
    from ldm_kernels import add_layer_norm, attention, cross_attention, geglu, geglu_product, group_norm_silu

    for kernel in (attention, cross_attention, group_norm_silu, geglu, geglu_product, add_layer_norm):
        yield from kernel.compile_specs()


def compile_all(
    specs: Callable[[], Iterator[Spec]] = shipped,
    only: Callable[[str, int], bool] = lambda name, capability: True,
    processes: int | None = None,
) -> list[Compiled]:
    """Compile configurations, several at a time, each in a process that does not interpret kernels.

    Args:    specs: makes them; a function of a module, since the processes call it again by its name.
             only: which name on which capability.  processes: None: one a core.
    Returns: in the order of `specs`, a line for each capability.
    """
    with ProcessPoolExecutor(processes or os.cpu_count(), get_context("spawn"), _compile_for_real) as pool:
        known = pool.submit(_names, specs).result()
        jobs = [(specs, name, capability) for name, capability in known if only(name, capability)]
        return list(pool.map(_compile, jobs))


def _compile_for_real() -> None:
    """First thing in a process: no interpreter, and nothing from an earlier compilation, which would leave no log."""
    os.environ.pop("TRITON_INTERPRET", None)
    from triton import knobs

    knobs.compilation.always_compile = True
    knobs.nvidia.dump_ptxas_log = True
    knobs.cache.dir = tempfile.mkdtemp(prefix="kernels-")


def _names(specs: Callable[[], Iterator[Spec]]) -> list[tuple[str, int]]:
    return [(spec.name, capability) for spec in specs() for capability in spec.capabilities]


@cache
def _by_name(specs: Callable[[], Iterator[Spec]]) -> dict[str, Spec]:
    return {spec.name: spec for spec in specs()}


def _compile(job: Job) -> Compiled:
    specs, name, capability = job
    spec = _by_name(specs)[name]
    built, log = build(spec, capability)
    code = disassemble(built.asm["cubin"])
    shared_bytes, warps = built.metadata.shared, built.metadata.num_warps  # with those of warp specialisation
    registers = _number(r"Used (\d+) registers", log)
    spilled = _number(r"(\d+) bytes spill stores", log) + _number(r"(\d+) bytes spill loads", log)
    return Compiled(
        name=name,
        capability=capability,
        registers=registers,
        spilled_bytes=spilled,
        local_accesses=count(code, r"(STL|LDL)\b"),
        shared_bytes=shared_bytes,
        programs=programs_at_once(GPUS[capability], registers, 32 * warps, shared_bytes),
        tensor_instructions=count(code, "(HMMA|HGMMA)"),
        narrow_loads=count(code, r"LDG\.E\.[US]16"),
        wide_loads=count(code, r"LDG\.E.*\.128"),
        wide_copies=count(code, r"(LDGSTS.*\.128|UTMALDG)"),
        serialized="serialized" in log,
        loop_instructions=busiest_loop(code),
        useful_ratio=spec.useful_ratio,
        most_useful_ratio=_most_useful_ratio(spec),
        pipelined=spec.num_stages > 1 and spec.useful_ratio is not None,
    )


def build(spec: Spec, capability: int) -> tuple[Any, str]:
    """Triton's compiled kernel, and what ptxas had to say; in a process that does not interpret kernels."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    position = {name: i for i, name in enumerate(spec.fn.arg_names)}
    divisible = {(position[name],): [["tt.divisibility", 16]] for name in spec.divisible}
    source = ASTSource(spec.fn, dict(spec.signature), dict(spec.constexprs), divisible)
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        built = triton.compile(
            source,
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": spec.num_warps, "num_stages": spec.num_stages},
        )
    return built, log.getvalue()


def _number(pattern: str, log: str) -> int:
    found = re.search(pattern, log)
    if found is None:
        raise ValueError(f"ptxas: nothing like {pattern!r} in what it printed: {log!r}")
    return int(found[1])


def _most_useful_ratio(spec: Spec) -> float | None:
    """What a head's width allows at best: 1.2 at 40, 1.1 where its second product is cut 32 + 8, 1 at any other; all of
    the box that a descriptor brings."""
    if spec.useful_ratio is None:
        return None
    if box := spec.constexprs.get("BOX"):
        return int(box) / int(spec.constexprs["D"])
    width = 1.0 if spec.constexprs.get("D") != 40 else 1.1 if spec.constexprs.get("V1") == 8 else 1.2
    return width * (80 / 77 if spec.name.startswith("cross_attention") else 1)


# ---- machine code ----------------------------------------------------------------------------------

Code = Sequence[tuple[int, str]]  # address, instruction


def disassemble(cubin: bytes) -> Code:
    """The instructions of a compiled kernel."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return parse_code(text)


def parse_code(text: str) -> Code:
    """Lines such as "/*0a30*/  @!P0 BRA 0x3e0 ;  /* 0x... */", predicates dropped."""
    found = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([^;]+?)\s*;", text, re.MULTILINE)
    return [(int(address, 16), instruction) for address, instruction in found]


def count(code: Code, pattern: str) -> int:
    """How many instructions begin like that."""
    return sum(re.match(pattern, instruction) is not None for _, instruction in code)


def busiest_loop(code: Code) -> int:
    """The number of instructions from a jump back to its target: of the loop with most tensor-core instructions, then
    of the longest; of all the code where nothing jumps back."""
    best = (-1, len(code))
    for address, instruction in code:
        target = re.match(r"BRA.*?\b0x([0-9a-f]+)", instruction)
        if target and int(target[1], 16) < address:
            body = [line for line in code if int(target[1], 16) <= line[0] <= address]
            best = max(best, (count(body, "(HMMA|HGMMA)"), len(body)))
    return best[1]


def programs_at_once(gpu: Multiprocessor, registers: int, threads: int, shared_bytes: int) -> int:
    """How many programs fit a multiprocessor together; registers are given out 256 at a time to a warp."""
    a_warp = 256 * ceil(32 * registers / 256)
    by_registers = gpu.registers // (a_warp * threads // 32)
    by_shared = gpu.shared_kib * 1024 // (shared_bytes + 1024)
    return min(by_registers, by_shared, gpu.threads // threads, gpu.programs)


# ---- the gate --------------------------------------------------------------------------------------


def complaints(c: Compiled) -> list[str]:
    """Which bounds a configuration breaks, each in one line."""
    broken = {
        f"spills {c.spilled_bytes} bytes": c.spilled_bytes > 0 or c.local_accesses > 0,
        f"takes {c.shared_bytes / 1024:.0f} KiB of shared memory": c.shared_bytes
        > 1024 * GPUS[c.capability].most_shared_kib,
        "does not fit a multiprocessor": c.programs < 1,
        f"loads 2 bytes at a time, {c.narrow_loads} times": c.narrow_loads > 0,
        "loads nothing 16 bytes wide": c.wide_loads + c.wide_copies == 0 and not c.name.startswith(READS_LITTLE),
        "matrix products wait for each other": c.serialized,
        "no tensor-core instruction": c.useful_ratio is not None and c.tensor_instructions == 0,
        "no load runs ahead": c.pipelined and c.wide_copies == 0,
        f"executes {c.useful_ratio or 0:.2f} times what is useful, at most {c.most_useful_ratio or 0:.2f} allowed": (
            c.useful_ratio or 0
        )
        > (c.most_useful_ratio or 0) + 1e-6,
    }
    return [f"{c.name} sm_{c.capability}: {what}" for what, is_so in broken.items() if is_so]


def record(compiled: Sequence[Compiled], folder: Path = RECORDS) -> None:
    """Keep what the installed Triton compiled as the state to compare with."""
    path = folder / f"compiled-{_release(version('triton'))}.json"
    temporary = path.with_name(path.name + ".partial")
    lines = ",\n  ".join(json.dumps(asdict(c)) for c in compiled)
    temporary.write_text(f'{{"triton": {json.dumps(version("triton"))}, "configurations": [\n  {lines}\n]}}\n')
    temporary.replace(path)


def recorded(folder: Path = RECORDS, by: str | None = None) -> list[Compiled]:
    """What a version of Triton compiled when it was looked at last; by: None: the newest that is recorded.

    Of a version that nobody recorded, nothing: another compiler writes other code, and 5 % say nothing then.
    """
    paths = {_numbers(path.stem.removeprefix("compiled-")): path for path in folder.glob("compiled-*.json")}
    path = paths.get(max(paths) if by is None else _numbers(_release(by)))
    return [] if path is None else [Compiled(**row) for row in json.loads(path.read_text())["configurations"]]


def _release(triton: str) -> str:
    """ "3.8" of "3.8.1"."""
    return ".".join(triton.split(".")[:2])


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(map(int, release.split(".")))


def regressions(now: Sequence[Compiled], before: Sequence[Compiled]) -> list[str]:
    """Which configurations are more than 5 % worse than recorded, or are not recorded."""
    known: Mapping[tuple[str, int], Compiled] = {(c.name, c.capability): c for c in before}
    found = []
    for c in now:
        where = f"{c.name} sm_{c.capability}"
        old = known.get((c.name, c.capability))
        if old is None:
            found.append(f"{where}: not recorded; look at it, then `ldm bench kernels --compile-only --record`")
            continue
        for what in ("registers", "shared_bytes", "loop_instructions"):
            if getattr(c, what) > WORSE * getattr(old, what):
                found.append(f"{where}: {what} {getattr(old, what)} -> {getattr(c, what)}")
        if c.programs < old.programs:
            found.append(f"{where}: programs {old.programs} -> {c.programs}")
    return found
