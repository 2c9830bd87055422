"""`ldm train-small`: a small model from scratch on labelled folders of images, from the files to the checkpoint.

Each stage restarts where it stopped: decoding, autoencoder, decoder, text encoder, U-Net, samples and what they repeat.
"""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ldm import checkpoint
from ldm.config import PHANTOM, Config
from ldm.data import images, splits
from ldm.data.labelled import LabelledImages
from ldm.files import write_json
from ldm.tokenizer import Tokenizer
from ldm.train import autoencoder, folder_set, perceptual, small_model
from ldm.train.folder_set import FolderSet, domain_of
from ldm.train.small_model import Draw, Networks, Round
from ldm.train.text_encoder import CaptionTokens
from ldm.traversal.real_images import ENOUGH_DB
from ldm_tools import reading
from ldm_tools.train_small.copies import look_for_copies
from ldm_tools.train_small.options import AUTOENCODER, DECODER, TEXT_ENCODER, UNET, boosts_of, check

log = logging.getLogger(__name__)

BATCHES = {"autoencoder": 4, "text": 128, "unet": 32}


def run(args: argparse.Namespace) -> None:
    """All stages. Raises ValueError for folders and options that do not fit each other."""
    check(args)
    parts = [read(folder, args) for folder in args.folders]
    shares = shares_of(parts, args)
    args.work.mkdir(parents=True, exist_ok=True)
    small_model.continue_only(args.work / "recipe.json", settings_of(args, parts, shares))
    training, held_out = sets(parts, args)
    config = config_of(args.size, args.latent_channels)
    networks = small_model.build(config, args.seed, args.device)
    if args.start is not None:
        start_from(args.start, networks)
    fidelity = train(networks, training, held_out, shares, args)
    checkpoint.save(args.out, networks._asdict(), dtype=torch.float16, overwrite=args.force)
    log.info("wrote %s", args.out)
    record = {"settings": settings_of(args, parts, shares), "unet_steps": args.unet_steps, "psnr": fidelity}
    if args.samples:
        record["memorisation"] = look_for_copies(args, parts, training, held_out)
    write_json(args.work / "report.json", record)
    print(f"see {args.out}, {args.work / 'report.json'} and the sheets beside it")


def read(folder: Path, args: argparse.Namespace) -> LabelledImages:
    """The images of a folder that there is a caption for, that were chosen, and that can be decoded."""
    data = reading.read(folder, args)
    if args.attributes:
        data = data.saying(data.attributes)
    for note in data.notes:
        log.info("%s: %s", folder, note)
    data = chosen(folder, data, args.only, args.without)
    data = data.select(images.usable(data.files, args.max_bad, reading=data.reading))
    log.info("%s: %d images", folder, len(data))
    return data


def chosen(folder: Path, data: LabelledImages, only: Sequence[str], without: Sequence[str]) -> LabelledImages:
    """The images that show any of `only`, if the folder knows such a label. ValueError: none, or none once without."""
    if known := [label for label in only if label in data.observations]:
        data = data.select(shows_any(data, known))
    if not len(data):
        raise ValueError(f"--only: no image of {folder} shows {' or '.join(known)}")
    if (out := shows_any(data, without)).all():
        raise ValueError(f"--without: every image of {folder} shows {' or '.join(without)}")
    if out.any():
        log.info("%s: %d of %d images are left out, which show %s", folder, out.sum(), len(out), " or ".join(without))
    return data


def shows_any(data: LabelledImages, labels: Sequence[str]) -> NDArray[np.bool_]:
    """Whether an image is said to show one of the labels that its folder knows: (N,)."""
    known = [label for label in labels if label in data.observations]
    return (data.observations[known] == 1).any(axis=1).to_numpy()


def shares_of(parts: Sequence[LabelledImages], args: argparse.Namespace) -> dict[str, float]:
    """How often images of each kind of folder are drawn. Raises ValueError for a label that no folder knows."""
    for option in ("only", "without"):
        for label in getattr(args, option):
            if not any(label in part.observations for part in parts):
                raise ValueError(f"--{option}: no folder has a label {label!r}")
    given = args.shares or [1.0] * len(parts)
    shares: dict[str, float] = {}
    for part, share in zip(parts, given, strict=True):
        shares[domain_of(part)] = shares.get(domain_of(part), 0.0) + share
    return shares


def settings_of(
    args: argparse.Namespace, parts: Sequence[LabelledImages], shares: dict[str, float]
) -> dict[str, object]:
    """All that decides the weights but the rounds of the U-Net, whose number may grow."""
    names = (
        "seed",
        "size",
        "only",
        "without",
        "balance",
        "latent_channels",
        "autoencoder_steps",
        "decoder_steps",
        "text_steps",
        "min_snr",
        "kl",
    )
    chosen = {name: getattr(args, name) for name in names}
    start = None if args.start is None else checkpoint.sha256(args.start)
    seen = None if args.perceptual is None else checkpoint.sha256(args.perceptual)
    counts = {str(folder.name): len(part) for folder, part in zip(args.folders, parts, strict=True)}
    return chosen | {"boost": boosts_of(args), "shares": shares, "start": start, "perceptual": seen, "images": counts}


def sets(parts: Sequence[LabelledImages], args: argparse.Namespace) -> tuple[FolderSet, FolderSet]:
    """What is learned, in all positions, and what is held out, as it is; the split is the same whatever is left out."""
    learned, unseen = [], []
    for part in parts:
        split, kept = splits.grouped(part), ~shows_any(part, args.without)
        rows = np.sort(np.concatenate([split.train, split.validation]))
        learned.append(part.select(rows[kept[rows]]))
        unseen.append(part.select(split.test[kept[split.test]]))
    training = folder_set.build(learned, args.size, args.work / "train.npy", turned=True)
    return training, folder_set.build(unseen, args.size, args.work / "held.npy", turned=False)


def config_of(size: int, latent_channels: int) -> Config:
    """The phantom model's numbers at another size and with more latent channels."""
    vae = replace(PHANTOM.vae, latent_channels=latent_channels)
    return replace(
        PHANTOM,
        vae=vae,
        unet=replace(PHANTOM.unet, latent_channels=latent_channels, sample_size=size // vae.downscale),
    )


def start_from(path: Path, networks: Networks) -> None:
    """Take over from another model what fits."""
    loaded = checkpoint.load_parts(path)
    for name, network in networks._asdict().items():
        count = small_model.start_from(network, getattr(loaded, name).state_dict())
        log.info("%s: %d of %d tensors of %s taken over", path.name, count, len(network.state_dict()), name)


def train(
    networks: Networks, training: FolderSet, held_out: FolderSet, shares: dict[str, float], args: argparse.Namespace
) -> dict[str, float]:
    """The three stages. Returns the autoencoder's mean PSNR on the held-out images of each domain, in dB."""
    clip, vae, unet = networks
    tokenizer = Tokenizer()
    tokens = CaptionTokens(training.captions, tokenizer)
    as_they_come = training.chances(shares)
    balanced = training.chances(shares, args.balance)
    boosted = training.chances(shares, args.balance, boosts_of(args))

    def draw(chances: NDArray[np.float64], stage: str) -> Draw:
        return lambda step: folder_set.draw_views(chances, args.seed, step, BATCHES[stage])

    seen = None if args.perceptual is None else perceptual.load(args.perceptual, args.device)
    recipe = replace(AUTOENCODER, steps=args.autoencoder_steps)
    latents = small_model.train_autoencoder(
        vae, training, draw(as_they_come, "autoencoder"), recipe, args.work, args.seed, 16, args.threads, seen, args.kl
    )
    if args.decoder_steps:
        recipe = replace(DECODER, steps=args.decoder_steps)
        views = draw(as_they_come, "autoencoder")
        small_model.train_decoder(vae, training, latents, views, recipe, args.work, args.seed, args.threads, seen)
    fidelity = psnr_by_domain(networks, held_out)
    recipe = replace(TEXT_ENCODER, steps=args.text_steps)
    small_model.train_text_encoder(clip, latents, tokens, draw(balanced, "text"), recipe, args.work, args.seed)
    rounds = [
        Round(f"unet{i}_{steps}", replace(UNET, steps=steps), draw(boosted, "unet"))
        for i, steps in enumerate(args.unet_steps, start=1)
        if steps
    ]
    contexts = small_model.contexts_of(clip, tokens.ids, tokenizer([""]))
    small_model.train_unet(unet, latents, contexts, tokens, rounds, args.work, args.seed, args.min_snr, args.threads)
    return fidelity


@torch.no_grad()
def psnr_by_domain(networks: Networks, data: FolderSet, batch: int = 16) -> dict[str, float]:
    """Of an autoencoder, the mean over a set's images, in dB; a warning where it is too little."""
    device = networks.vae.quant_conv.weight.device
    each = [
        autoencoder.reconstruction_psnr(networks.vae, data.batch(range(i, min(i + batch, len(data)))).to(device)).cpu()
        for i in range(0, len(data), batch)
    ]
    psnr, domains = torch.cat(each).numpy(), data.domains[data.image]
    means = {str(domain): float(psnr[domains == domain].mean()) for domain in np.unique(domains)}
    for domain, mean in means.items():
        enough = "" if mean >= ENOUGH_DB else f"; below {ENOUGH_DB:.0f} dB thin lines are lost: train it longer"
        log.info("autoencoder: %.1f dB on the held-out images of %s%s", mean, domain, enough)
    return means
