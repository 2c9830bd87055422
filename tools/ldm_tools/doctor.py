"""`ldm doctor`: what this machine is, what would be used on it, and whether that works.

ldm doctor                  read it after an installation; exit status 2 where something is broken
ldm doctor --json           to go with a report of a kernel that was not used
"""

import argparse
import json
from typing import Any, get_args

from ldm import fast, pipeline
from ldm.bench import doctor
from ldm_tools.fetch_weights import KNOWN
from ldm_tools.options import DTYPES, device_of, dtype_of

SHIPPED = ("phantom", "real", "chest_classifier", "skin_classifier", "real_skin_classifier")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command to `parser`."""
    parser.description = (
        "Print what this machine is (processor, memory, GPUs, versions), which weights are here, what the commands "
        "would use, and whether it works: the shipped model against the CPU and, on a GPU, every kernel against torch, "
        "in a process of its own. Exit status 2 where something is broken."
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="as of the other commands")
    parser.add_argument("--backend", choices=get_args(fast.Backend), default="auto", help="as of the other commands")
    parser.add_argument(
        "--interpret",
        action="store_true",
        help="on a CPU: also run a few small kernels in Triton's interpreter, slowly",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead")


def run(args: argparse.Namespace) -> None:
    """Raises ValueError at the end, where something is broken."""
    device = device_of(args)
    if args.interpret and device.type != "cpu":
        raise ValueError(f"--interpret: got device {device}, expected --device cpu; a GPU runs the kernels themselves")
    dtype = dtype_of(args, device)
    report: dict[str, Any] = {
        "machine": doctor.machine(),
        "packages": doctor.packages(),
        "weights": weights(),
        "used": doctor.choices(device, dtype, args.backend),
        "checks": doctor.check(str(device), dtype, args.backend, args.interpret),
    }
    report["broken"] = doctor.broken(report)
    print(json.dumps(report, indent=1) if args.json else text(report))
    if report["broken"]:
        raise ValueError(f"{len(report['broken'])} broken: {'; '.join(report['broken'])}")


def weights() -> list[dict[str, Any]]:
    """The files that ship with the package, and those that `ldm fetch-weights` knows."""
    shipped = [(pipeline.WEIGHTS / f"{name}.safetensors", True) for name in SHIPPED]
    published = [(known.folder() / known.file, False) for known in KNOWN.values()]
    return [
        {"file": path.name, "path": str(path), "needed": needed, "found": path.exists()}
        for path, needed in (*shipped, *published)
    ]


def text(report: dict[str, Any]) -> str:
    """The report for reading."""
    machine, used, checks = report["machine"], report["used"], report["checks"]
    memory = (
        f"; {machine['memory_gib']:.1f} GiB memory, {machine['memory_free_gib']:.1f} free"
        if machine["memory_gib"]
        else ""
    )
    lines = [
        "machine",
        f"  cpu     {machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads for torch, "
        f"{' '.join(machine['features']) or 'no known vector units'}{memory}",
        *(
            f"  gpu {i}   {gpu['name']}, capability {gpu['capability']}, {gpu['memory_gib']:.1f} GiB, "
            f"{gpu['memory_free_gib']:.1f} free"
            for i, gpu in enumerate(machine["gpus"])
        ),
        *([] if machine["gpus"] else ["  gpu     none that torch can use"]),
        f"  system  {machine['system']}",
        "versions",
        *(
            f"  {of['name']:12}{of['version'] or 'missing':16}{of['allowed']:16}{'ok' if of['ok'] else 'NOT ALLOWED'}"
            for of in report["packages"]
        ),
        "weights",
        *(
            f"  {of['file']:38}{'here' if of['found'] else 'MISSING' if of['needed'] else 'not fetched'}"
            for of in report["weights"]
        ),
        "would be used",
        f"  {used['device']}, {used['dtype']}, backend {used['backend']}, "
        f"{'CUDA graphs' if used['cuda_graph'] else 'no CUDA graphs'}; of SD1.5 at 512 x 512 {used['rows_a_call']} "
        f"rows in a U-Net call, {used['images_a_call']} decoded at once",
        "checks",
        *(f"  {line}" for line in _checks(checks)),
        *(f"BROKEN: {line}" for line in report["broken"]),
    ]
    return "\n".join(lines if report["broken"] else [*lines, "nothing is broken"])


def _checks(checks: dict[str, Any]) -> list[str]:
    if "failed" in checks:
        return [f"failed: {checks['failed']}"]
    model, kernels = checks["model"], checks.get("kernels")
    graph = ", replayed as a CUDA graph" if model["cuda_graph_used"] else ""
    lines = [
        f"model    the shipped one by {model['backend']}{graph}: {model['error']:.1e} from plain float32 on the CPU "
        f"(at most {model['allowed']:.0e}), {model['ms']:.0f} ms a call of 2 rows"
    ]
    if kernels is None:
        return [*lines, "kernels  none run here (--interpret tries a few in Triton's interpreter)"]
    wrong = f", {len(kernels['refused'])} refused" if kernels["refused"] else ", each as right as torch"
    return [*lines, f"kernels  {kernels['checked']} checks by {kernels['by']} in {kernels['seconds']} s{wrong}"]
