"""`ldm bench`: what things cost here, each as a ratio to a named peer that was timed in turn with it in the same run.

ldm bench samplers|inversion|unet|vae|traverse|load|kernels|gpu
"""

import argparse
import importlib

# subject: (module, one line of help). Imported only when called.
SUBJECTS: dict[str, tuple[str, str]] = {
    "samplers": ("ldm_tools.bench.samplers", "which sampler and spacing follow the flow, for how many evaluations"),
    "inversion": ("ldm_tools.bench.inversion", "how exactly images come back from their noise"),
    "unet": ("ldm_tools.bench.unet", "one evaluation against the rate of a matrix product, and where its time goes"),
    "vae": ("ldm_tools.bench.vae", "the same of decoding an image"),
    "traverse": ("ldm_tools.bench.traverse", "the prompt tree against every branch run alone"),
    "load": ("ldm_tools.bench.load", "from disk to the first step, against reading the file"),
    "kernels": ("ldm_tools.bench.kernels", "the fused kernels: compiled, predicted, and on a GPU timed"),
    "gpu": ("ldm_tools.bench.gpu", "all that only a GPU can tell, by one command, into one file of tables"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command to `parser`: a subcommand for each subject, with options of its own."""
    parser.description = "Measure; JSON beside every table. Nothing here is asserted: correctness is checked first."
    subjects = parser.add_subparsers(dest="subject", required=True, metavar="SUBJECT")
    for name, (module, line) in SUBJECTS.items():
        subject = importlib.import_module(module)
        described = subjects.add_parser(name, help=line)
        subject.add_arguments(described)
        described.set_defaults(subject_run=subject.run)


def run(args: argparse.Namespace) -> None:
    """The subject that was asked for."""
    args.subject_run(args)
