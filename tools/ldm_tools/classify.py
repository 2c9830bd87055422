"""`ldm classify train | eval`: the attribute classifiers of the experiment. [paper, Table 1]

ldm classify train data/CheXpert --out weights/chexpert.safetensors
ldm classify eval weights/chexpert.safetensors data/CheXpert
"""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from ldm import checkpoint, pipeline
from ldm.data import images, splits
from ldm.data.labelled import LabelledImages
from ldm.files import write_json
from ldm.study import classifier
from ldm.train import scores
from ldm.train.classifier import TRAININGS, Training, checkpoint_path, predict, require_both_classes, train
from ldm.vae import AutoencoderKL
from ldm_tools import reading
from ldm_tools.reading import FOLDER, add_reading, listed

log = logging.getLogger(__name__)

SMALL = 128  # px; of more, a CPU is warned
SPLITS = {
    "grouped": splits.grouped,
    "stratified": splits.stratified,
    "official": splits.official,
    "paper": splits.paper,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command to `parser`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="train | eval")
    training = actions.add_parser("train", help="train a classifier on a folder of labelled images")
    training.description = (
        "Train one network with an output for each attribute. What is not given is as the authors had it: "
        "chests 10 epochs at 2e-4, skin 20 at 1e-4. Stopped runs go on when started again."
    )
    training.add_argument("folder", type=Path, help=FOLDER)
    training.add_argument("--out", type=Path, required=True, help="NAME.safetensors to write, NAME.json beside it")
    training.add_argument("--model", default=Training.model, help="any of timm's networks (default %(default)s)")
    training.add_argument("--size", type=int, default=Training.size, help="side in pixels (default %(default)s)")
    training.add_argument("--epochs", type=int, help="times that every image is seen")
    training.add_argument("--batch", type=int, default=Training.batch, help="images a step (default %(default)s)")
    training.add_argument("--lr", type=float, help="learning rate of the first step")
    training.add_argument("--weight-decay", type=float, help="AdamW's")
    training.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation (default 0)")
    training.add_argument("--from-scratch", action="store_true", help="leave ImageNet weights alone")
    training.add_argument(
        "--start",
        type=Path,
        metavar="FILE.safetensors",
        help="weights of the same network to start from, such as ImageNet's from elsewhere, or a classifier's",
    )
    training.add_argument("--float16", action="store_true", help="store the weights in half the bytes")
    training.add_argument(
        "--soften", action="store_true", help="blur and noise training images too, for images made by an autoencoder"
    )
    training.add_argument(
        "--through",
        type=Path,
        metavar="MODEL",
        help="show every image a second time as this model's autoencoder returns it, for a judge of what it draws; "
        "the test is of both",
    )
    training.add_argument(
        "--enlarge",
        type=int,
        metavar="SIDE",
        help="enlarge images to this side for the network: what is a pixel wide fits one that learned on larger images",
    )
    training.add_argument(
        "--no-cache", action="store_true", help="decode the images in every epoch instead of once, to save disk space"
    )
    training.add_argument("--test", type=Path, help="a held-out folder to test on instead of the split's test part")
    _add_data(training)

    evaluation = actions.add_parser("eval", help="Table 1 of a classifier")
    evaluation.add_argument("file", type=Path, help="NAME.safetensors, with NAME.json beside it")
    evaluation.add_argument("folder", type=Path, help=FOLDER)
    evaluation.add_argument(
        "--part", choices=(*splits.PARTS, "all"), default="test", help="of the split; all: every image (default test)"
    )
    evaluation.add_argument(
        "--through", type=Path, metavar="MODEL", help="score the images as this model's autoencoder returns them"
    )
    evaluation.add_argument("--out", type=Path, help="a .json to write the figures to, with the reliability tables")
    _add_data(evaluation)


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--split",
        choices=SPLITS,
        default="grouped",
        help="grouped (default): no patient or lesion in two parts; stratified: and each part with its share of every "
        "label; official: the data set's own; paper: the paper's, which leaks",
    )
    parser.add_argument("--max-bad", type=int, default=0, help="image files that may be broken (default %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default %(default)s")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images (default %(default)s)")
    add_reading(parser, "which to learn or score (default: the data set's usual ones)")


def run(args: argparse.Namespace) -> None:
    """Raises ValueError for data and options that do not fit each other."""
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: torch cannot use {args.device!r} here; expected cpu, cuda or cuda:N") from error
    run_training(args) if args.action == "train" else run_evaluation(args)


def run_training(args: argparse.Namespace) -> None:
    """Train, test, and save both the classifier and what the test said."""
    if classifier.checked_name(args.out).exists():
        raise ValueError(f"--out: {args.out} exists; remove it or choose another name")
    if args.start is not None and args.from_scratch:
        raise ValueError("--start: not with --from-scratch; leave one of them out")
    for name in ("size", "epochs", "batch", "lr"):
        if (value := getattr(args, name)) is not None and not value > 0:
            raise ValueError(f"--{name}: got {value}, expected more than 0")
    if args.enlarge is not None and args.enlarge <= args.size:
        raise ValueError(f"--enlarge: got {args.enlarge}, expected more than --size, which is {args.size}")
    if args.through is not None and args.no_cache:
        raise ValueError("--through: not with --no-cache; what the autoencoder returns is kept on disk")
    data = read(args.folder, None, args)
    split = SPLITS[args.split](data)
    test = data.select(split.test) if args.test is None else read(args.test, data.attributes, args)
    require_both_classes(test.labels, data.attributes, "test images")  # found out now, not after hours
    default = TRAININGS[data.kind or "chest"]
    for sentence in splits.uneven(data, split):
        log.warning("%s", sentence)
    training = replace(
        default,
        model=args.model,
        size=args.size,
        batch=args.batch,
        seed=args.seed,
        epochs=default.epochs if args.epochs is None else args.epochs,
        lr=default.lr if args.lr is None else args.lr,
        weight_decay=default.weight_decay if args.weight_decay is None else args.weight_decay,
        augmentation=replace(default.augmentation, soften=args.soften),
        pretrained=not args.from_scratch and args.start is None,
        start="" if args.start is None else checkpoint.sha256(args.start),
        seen_size=args.enlarge or 0,
        through="" if args.through is None else checkpoint.sha256(args.through),
    )
    if args.device == "cpu" and (side := max(training.size, training.seen_size)) > SMALL:
        times = (side / SMALL) ** 2
        log.warning("%s at %d px on a CPU: --size %d has %.0f times fewer pixels", args.model, side, SMALL, times)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    learned, unseen = data.select(split.train), data.select(split.validation)
    device, initial = torch.device(args.device), None if args.start is None else load_file(args.start)
    vae = None if args.through is None else autoencoder_of(args.through, training.size, device)
    trained = train(learned, unseen, training, args.out, device, args.workers, not args.no_cache, initial, vae)
    if args.float16:
        trained.network.half().float()  # tested as it will be read
    rows = scores.scores(predict(trained, test, args.workers), test.labels, test.groups, data.attributes)
    report = {
        "data_set": data.name,
        "phantoms": (args.folder / "phantom.csv").exists(),
        "split": args.split,
        "images": {"train": len(learned), "validation": len(unseen), "test": len(test)},
        "test_images": "of the split" if args.test is None else "of a folder of their own",
        **trained.report,
        "test": scores.to_json(rows),
    }
    if vae is not None:
        through = scores.scores(predict(trained, test, args.workers, vae), test.labels, test.groups, data.attributes)
        report["test_through"] = scores.to_json(through)
    stored = torch.float16 if args.float16 else torch.float32
    classifier.save(args.out, replace(trained, report=report), stored)
    checkpoint_path(args.out).unlink()
    print(scores.table(rows))
    if vae is not None:
        print(f"\nThe same images, as the autoencoder of {args.through.name} returns them:\n\n{scores.table(through)}")


def autoencoder_of(path: Path, size: int, device: torch.device) -> AutoencoderKL:
    """That of a model, for images of a size. Raises ValueError for a size that it cannot halve often enough."""
    vae = pipeline.load(path, device).vae
    if size % vae.config.downscale:
        multiple = vae.config.downscale
        raise ValueError(f"--through: {path.name} takes images of a multiple of {multiple}, but --size is {size}")
    return vae


def run_evaluation(args: argparse.Namespace) -> None:
    """Print Table 1 of a classifier, and write it where --out says."""
    trained = classifier.load(args.file, args.device)
    wanted = listed(args.attributes) or list(trained.attributes)
    columns = classifier.columns(trained.attributes, wanted, f"the classifier {args.file.name}")
    data = read(args.folder, wanted, args)
    if args.part != "all":
        data = data.select(SPLITS[args.split](data).parts()[args.part])
    device = torch.device(args.device)
    vae = None if args.through is None else autoencoder_of(args.through, trained.input_size, device)
    rows = scores.scores(predict(trained, data, args.workers, vae)[:, columns], data.labels, data.groups, wanted)
    if args.out is not None:
        write_json(args.out, {"part": args.part, "split": args.split, "scores": scores.to_json(rows)})
    print(scores.table(rows))


def read(folder: Path, attributes: Sequence[str] | None, args: argparse.Namespace) -> LabelledImages:
    """The images of a folder with the attributes given, or those of the options; broken files left out."""
    data = reading.read(folder, args)
    for note in data.notes:
        log.info("%s: %s", folder, note)
    if attributes is not None:
        data = data.with_attributes(attributes)
    return data.select(images.usable(data.files, args.max_bad, max(1, args.workers), reading=data.reading))
