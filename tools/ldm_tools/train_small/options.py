"""The options of `ldm train-small`, and what is wrong with them whatever the data."""

import argparse
from pathlib import Path

from ldm.train.learner import Recipe
from ldm_tools import reading

AUTOENCODER = Recipe(steps=5500, lr=2e-3, weight_decay=0.0)
DECODER = Recipe(steps=1500, lr=8e-4, warmup=50, weight_decay=0.0)
TEXT_ENCODER = Recipe(steps=600, lr=5e-4, weight_decay=0.0)
UNET = Recipe(steps=4000, lr=1e-3, warmup=100, ema_decay=0.998)
SIZE_MULTIPLE = 32  # the autoencoder halves three times, the U-Net twice more


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command to `parser`."""
    parser.description = (
        "Train a small Stable Diffusion from scratch on one or more labelled folders (those that `ldm data` reads): "
        "the autoencoder, the text encoder and the U-Net one after the other, then one checkpoint in the single-file "
        "layout of SD1.5, which every command takes as --weights. About two hours on two idle cores; run the same "
        "command again to go on after a stop. Dermoscopies are turned and mirrored, radiographs never. Of a split by "
        "patient or lesion the train and validation parts are learned and the test part is held out: on it the "
        "autoencoder is measured, and how near samples come to training images is compared with how near it comes."
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help=f"{reading.FOLDER}; as many as wanted")
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint to write, NAME.safetensors")
    parser.add_argument(
        "--work", type=Path, help="folder of decoded images, checkpoints, logs (default: NAME-training)"
    )
    parser.add_argument("--force", action="store_true", help="replace --out where it exists")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and noise (default %(default)s)")
    parser.add_argument("--device", default="cpu", help="what the networks train on (default %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=1, help="parts of a batch that are computed side by side (default %(default)s)"
    )
    _add_data(parser.add_argument_group("the data"))
    reading.add_reading(parser, "what captions say")
    _add_recipe(parser.add_argument_group("the recipe"))


def _add_data(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--size", type=int, default=128, help="side of the images in pixels (default %(default)s)")
    group.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="LABEL",
        help="of a folder that knows it: images that show it; repeated: that show any of them",
    )
    group.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="LABEL",
        help="leave out images that show it, such as what no caption speaks of; may be repeated",
    )
    group.add_argument(
        "--shares", type=float, nargs="+", help="how often each FOLDER is drawn, relative (default: all the same)"
    )
    group.add_argument(
        "--balance",
        type=float,
        default=0.5,
        help="of captions in the U-Net's batches: 1 draws each as often as it comes, 0 all alike (default %(default)s)",
    )
    group.add_argument(
        "--boost",
        action="append",
        default=[],
        metavar="TEXT=FACTOR",
        help="draw images whose caption holds TEXT so many times as often for the U-Net; may be repeated",
    )
    group.add_argument("--max-bad", type=int, default=0, help="image files that may be broken (default %(default)s)")


def _add_recipe(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--start", type=Path, help="a model of which to take over what fits, such as weights/phantom.safetensors"
    )
    group.add_argument(
        "--latent-channels", type=int, default=8, help="more keep more detail and cost the U-Net (default %(default)s)"
    )
    group.add_argument(
        "--autoencoder-steps",
        type=int,
        default=AUTOENCODER.steps,
        help="0: keep that of --start, as 0 does for the text encoder and the U-Net (default %(default)s)",
    )
    group.add_argument(
        "--decoder-steps",
        type=int,
        default=DECODER.steps,
        help="of the autoencoder's second half alone, once latents are what they are (default %(default)s)",
    )
    group.add_argument(
        "--perceptual",
        type=Path,
        metavar="CLASSIFIER",
        help="the autoencoder shall also look alike to the first layers of a classifier of `ldm classify train`, such "
        "as weights/real_skin_classifier.safetensors: sharper texture",
    )
    group.add_argument(
        "--kl",
        type=float,
        default=5e-4,
        metavar="WEIGHT",
        help="of the autoencoder's pull towards noise: less keeps more detail in latents that are less regular, too "
        "much leaves channels unused (default %(default)s)",
    )
    group.add_argument("--text-steps", type=int, default=TEXT_ENCODER.steps, help="default %(default)s")
    group.add_argument(
        "--unet-steps",
        type=int,
        nargs="+",
        default=[UNET.steps],
        help="several: rounds, each with a learning rate that falls to nothing; a round more goes on with a model that "
        "is done (default %(default)s)",
    )
    group.add_argument(
        "--min-snr",
        type=float,
        default=5.0,
        metavar="GAMMA",
        help="weights the loss by time; 0: no (default %(default)s)",
    )
    group.add_argument(
        "--samples",
        type=int,
        default=16,
        help="of each prompt, to look for repeated images (default %(default)s, 0: none)",
    )


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for options that make no sense whatever the data; fills in --work."""
    for name in ("size", "latent_channels", "threads"):
        if (value := getattr(args, name)) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: got {value}, expected 1 or more")
    for name in ("autoencoder_steps", "text_steps", "unet_steps"):
        if getattr(args, name) in (0, [0]) and args.start is None:
            raise ValueError(f"--{name.replace('_', '-')}: got 0 without --start, expected a model to keep it of")
    for name in (
        "seed",
        "min_snr",
        "samples",
        "max_bad",
        "balance",
        "autoencoder_steps",
        "decoder_steps",
        "text_steps",
    ):
        if (value := getattr(args, name)) < 0:
            raise ValueError(f"--{name.replace('_', '-')}: got {value}, expected 0 or more")
    if min(args.unet_steps) < 1 and args.unet_steps != [0]:
        raise ValueError(f"--unet-steps: got {args.unet_steps}, expected 1 or more of each round")
    if args.size % SIZE_MULTIPLE:
        raise ValueError(f"--size: got {args.size}, expected a multiple of {SIZE_MULTIPLE}")
    if args.out.suffix != ".safetensors":
        raise ValueError(f"--out: got {args.out}, expected NAME.safetensors")
    if args.out.exists() and not args.force:
        raise ValueError(f"--out: {args.out} exists; pass --force to replace it once training is done")
    if args.shares is not None and (len(args.shares) != len(args.folders) or min(args.shares) <= 0):
        raise ValueError(f"--shares: got {args.shares}, expected {len(args.folders)} numbers above 0, one a folder")
    boosts_of(args)
    args.work = args.work or args.out.with_name(f"{args.out.stem}-training")


def boosts_of(args: argparse.Namespace) -> dict[str, float]:
    """What --boost was given, TEXT=FACTOR each: text -> factor."""
    boosts = {}
    for given in args.boost:
        text, _, factor = given.rpartition("=")
        try:
            boosts[text] = float(factor)
        except ValueError:
            boosts[text] = 0.0
        if not text or not boosts[text] > 0:
            raise ValueError(f"--boost: got {given!r}, expected TEXT=FACTOR with a factor above 0")
    return boosts
