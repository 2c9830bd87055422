"""`ldm`: finds the command, runs it, and turns bad input into one line and a non-zero exit."""

import argparse
import importlib
import logging
import sys

# command: (module, one line of help). Imported only when called, so that `ldm --help` is quick.
COMMANDS = {
    "demo": ("ldm_tools.demo", "the main job: trajectories on real skin and on phantoms, with the shipped models"),
    "generate": ("ldm_tools.generate", "images from prompts"),
    "traverse": ("ldm_tools.traverse", "trajectories: one noise, a neutral prompt, styles swapped in at many steps"),
    "invert": ("ldm_tools.invert", "from real images back to their noise, and how exactly it leads back"),
    "data": ("ldm_tools.data", "describe a folder of labelled images: labels, captions, splits, traps"),
    "finetune": ("ldm_tools.finetune", "teach the U-Net CheXpert, ISIC 2019 or phantoms from images and captions"),
    "classify": ("ldm_tools.classify", "train or evaluate the attribute classifiers"),
    "evaluate": (
        "ldm_tools.evaluate",
        "score trajectories: CFRT, LPIPS, ground truth; tables, figures, explorer",
    ),
    "bench": ("ldm_tools.bench", "what things cost here: samplers, networks, kernels, the traversal"),
    "phantom": ("ldm_tools.phantom", "draw a data set of phantoms in the files of CheXpert or ISIC 2019"),
    "train-phantom": ("ldm_tools.train_phantom", "train the shipped model anew"),
    "train-small": ("ldm_tools.train_small", "train a small model from scratch on folders of labelled images"),
    "judge-phantom": ("ldm_tools.judge_phantom", "count and look at what the shipped model draws when asked"),
    "inspect": ("ldm_tools.inspect", "what a checkpoint is, and what becomes of every key"),
    "convert": ("ldm_tools.convert", "write a checkpoint in another layout or precision"),
    "ablate": ("ldm_tools.ablate", "which part of the U-Net carries which attribute, and when"),
    "attend": (
        "ldm_tools.attend",
        "where each word of a prompt looks, per layer and step, and whether it is the right place",
    ),
    "hspace": (
        "ldm_tools.hspace",
        "the bottleneck along trajectories: are directions there straighter than in the latents",
    ),
    "traps": ("ldm_tools.traps", "every known mistake in re-implementing SD1.5, and what it looks like"),
    "doctor": ("ldm_tools.doctor", "what this machine is, what would be used on it, and whether that works"),
    "fetch-weights": ("ldm_tools.fetch_weights", "download the known SD1.5 files, checked by hash"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns 0; 1 when interrupted; 2 for bad input, explained in one line on stderr."""
    parser = argparse.ArgumentParser(prog="ldm", description="Stable Diffusion 1.5 from scratch, and its trajectories.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, line) in COMMANDS.items():
        commands.add_parser(name, help=line, add_help=False)
    words = arguments if arguments is not None else sys.argv[1:]
    first, rest = parser.parse_known_args(words)

    try:
        return run(first.command, words, rest)
    except KeyboardInterrupt:  # also while torch is imported, which takes seconds
        print(f"ldm {first.command}: interrupted; run it again to go on", file=sys.stderr)
        return 1


def run(name: str, words: list[str], rest: list[str]) -> int:
    """Run a command by its name, with its options. Returns what `main` does.

    words: the whole command line, which `ldm evaluate` gives to processes of its own.
    """
    importlib.import_module("ldm")  # before any command imports torch, which reads what ldm sets for it
    module = importlib.import_module(COMMANDS[name][0])
    command = argparse.ArgumentParser(prog=f"ldm {name}")
    module.add_arguments(command)
    args = command.parse_args(rest, argparse.Namespace(words=words))
    logging.basicConfig(format="%(message)s")
    for ours in ("ldm", "ldm_tools"):  # what other packages have to say below a warning is of no use here
        logging.getLogger(ours).setLevel(logging.INFO)
    try:
        module.run(args)
    except (ValueError, OSError) as error:
        print(f"ldm {name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):  # torch has no one class for it
            raise
        print(f"ldm {name}: out of memory; use a smaller --max-batch or --size", file=sys.stderr)
        return 2
    return 0
