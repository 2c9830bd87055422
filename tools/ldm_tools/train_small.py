"""`ldm train-small`: a small model from scratch on labelled folders of images, from the files to the checkpoint.

Each stage restarts where it stopped: decoding, autoencoder, decoder, text encoder, U-Net, samples and what they repeat.
"""

import argparse
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ldm import checkpoint, conditioning, guidance, pipeline, samplers
from ldm.config import PHANTOM, Config
from ldm.data import images, splits
from ldm.data.labelled import LabelledImages
from ldm.files import write_json
from ldm.images import save_image, to_uint8
from ldm.pipeline import StableDiffusion
from ldm.tokenizer import Tokenizer
from ldm.train import autoencoder, folder_set, memorisation, small_model
from ldm.train.folder_set import FolderSet, domain_of
from ldm.train.learner import Recipe
from ldm.train.small_model import Draw, Networks, Round
from ldm.train.text_encoder import CaptionTokens
from ldm.traversal.figures import grid
from ldm.traversal.real_images import ENOUGH_DB
from ldm_tools import reading

log = logging.getLogger(__name__)

AUTOENCODER = Recipe(steps=5500, lr=2e-3, weight_decay=0.0)
DECODER = Recipe(steps=1500, lr=8e-4, warmup=50, weight_decay=0.0)
TEXT_ENCODER = Recipe(steps=600, lr=5e-4, weight_decay=0.0)
UNET = Recipe(steps=4000, lr=1e-3, warmup=100, ema_decay=0.998)
BATCHES = {"autoencoder": 4, "text": 128, "unet": 32}
SIZE_MULTIPLE = 32  # the autoencoder halves three times, the U-Net twice more
SAMPLE_STEPS, SAMPLE_GUIDANCE = 25, 3.0
SHEET_COLUMNS = 8


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
    group.add_argument("--autoencoder-steps", type=int, default=AUTOENCODER.steps, help="default %(default)s")
    group.add_argument(
        "--decoder-steps",
        type=int,
        default=DECODER.steps,
        help="of the autoencoder's second half alone, once latents are what they are (default %(default)s)",
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


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for options that make no sense whatever the data; fills in --work."""
    for name in ("size", "latent_channels", "autoencoder_steps", "text_steps", "threads"):
        if (value := getattr(args, name)) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: got {value}, expected 1 or more")
    for name in ("seed", "min_snr", "samples", "max_bad", "balance", "decoder_steps"):
        if (value := getattr(args, name)) < 0:
            raise ValueError(f"--{name.replace('_', '-')}: got {value}, expected 0 or more")
    if min(args.unet_steps) < 1:
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


def read(folder: Path, args: argparse.Namespace) -> LabelledImages:
    """The images of a folder that there is a caption for, that --only lets through, and that can be decoded."""
    data = reading.read(folder, args)
    if args.attributes:
        data = data.saying(data.attributes)
    for note in data.notes:
        log.info("%s: %s", folder, note)
    known = [label for label in args.only if label in data.observations]
    if known:
        data = data.select((data.observations[known] == 1).any(axis=1).to_numpy())
    if not len(data):
        raise ValueError(f"--only: no image of {folder} shows {' or '.join(known)}")
    data = data.select(images.usable(data.files, args.max_bad, reading=data.reading))
    log.info("%s: %d images", folder, len(data))
    return data


def shares_of(parts: Sequence[LabelledImages], args: argparse.Namespace) -> dict[str, float]:
    """How often images of each kind of folder are drawn. Raises ValueError for an --only that no folder knows."""
    for label in args.only:
        if not any(label in part.observations for part in parts):
            raise ValueError(f"--only: no folder has a label {label!r}")
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
        "balance",
        "latent_channels",
        "autoencoder_steps",
        "decoder_steps",
        "text_steps",
        "min_snr",
    )
    chosen = {name: getattr(args, name) for name in names}
    start = None if args.start is None else checkpoint.sha256(args.start)
    counts = {str(folder.name): len(part) for folder, part in zip(args.folders, parts, strict=True)}
    return chosen | {"boost": boosts_of(args), "shares": shares, "start": start, "images": counts}


def sets(parts: Sequence[LabelledImages], args: argparse.Namespace) -> tuple[FolderSet, FolderSet]:
    """What is learned, in all positions, and what is held out, as it is."""
    learned, unseen = [], []
    for part in parts:
        split = splits.grouped(part)
        learned.append(part.select(np.sort(np.concatenate([split.train, split.validation]))))
        unseen.append(part.select(split.test))
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

    recipe = replace(AUTOENCODER, steps=args.autoencoder_steps)
    latents = small_model.train_autoencoder(
        vae, training, draw(as_they_come, "autoencoder"), recipe, args.work, args.seed, 16, args.threads
    )
    if args.decoder_steps:
        recipe = replace(DECODER, steps=args.decoder_steps)
        views = draw(as_they_come, "autoencoder")
        small_model.train_decoder(vae, training, latents, views, recipe, args.work, args.seed, args.threads)
    fidelity = psnr_by_domain(networks, held_out)
    recipe = replace(TEXT_ENCODER, steps=args.text_steps)
    small_model.train_text_encoder(clip, latents, tokens, draw(balanced, "text"), recipe, args.work, args.seed)
    rounds = [
        Round(f"unet{i}_{steps}", replace(UNET, steps=steps), draw(boosted, "unet"))
        for i, steps in enumerate(args.unet_steps, start=1)
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


def look_for_copies(
    args: argparse.Namespace, parts: Sequence[LabelledImages], training: FolderSet, held_out: FolderSet
) -> dict[str, dict[str, float]]:
    """Draw every prompt, save the sheets, and measure how near the samples come to the training images.

    Returns: for each domain what `memorisation.report` says.
    """
    sd = pipeline.load(args.out, args.device)
    found = {}
    for domain, prompts in prompts_of(parts).items():
        rows = [sample(sd, prompt, range(args.samples)) for prompt in tqdm(prompts, desc=f"sampling {domain}")]
        bank_rows, unseen_rows = (np.flatnonzero(of.domains[of.image] == domain) for of in (training, held_out))
        bank = in_batches(lambda rows: memorisation.fingerprint(training.batch(rows)), bank_rows)
        near = memorisation.nearest(memorisation.fingerprint(torch.cat(rows)), bank)
        unseen = in_batches(lambda rows: memorisation.fingerprint(held_out.batch(rows)), unseen_rows)
        found[domain] = memorisation.report(near, memorisation.nearest(unseen, bank))
        save_sheets(args.work, domain, prompts, rows, near, training, bank_rows)
    return found


def prompts_of(parts: Sequence[LabelledImages]) -> dict[str, list[str]]:
    """domain -> the neutral prompts and those of every label."""
    prompts: dict[str, list[str]] = {}
    for part in parts:
        known = prompts.setdefault(domain_of(part), [])
        known += [prompt for prompt in part.prompts() if prompt not in known]
    return prompts


@torch.no_grad()
def sample(sd: StableDiffusion, prompt: str, seeds: Sequence[int]) -> Tensor:
    """What the model draws for a prompt: (B, 3, S, S) in [-1, 1], one image a seed."""
    context, empty = sd.encode_prompts([prompt, ""])[:, None]
    eps_fn = guidance.guided(sd.unet, conditioning.constant(context, SAMPLE_STEPS), SAMPLE_GUIDANCE, empty)
    noise = samplers.initial_noise(list(seeds), sd.latent_shape).to(sd.device)
    *_, last = samplers.ddim(eps_fn, noise, sd.schedule, SAMPLE_STEPS)
    return sd.decode_latents(last.x_t).clamp(-1, 1).float().cpu()


def in_batches(of: Callable[[NDArray[np.int64]], Tensor], rows: NDArray[np.int64], batch: int = 256) -> Tensor:
    """`of` some rows, not all at once."""
    return torch.cat([of(rows[i : i + batch]) for i in range(0, len(rows), batch)])


def save_sheets(
    work: Path,
    domain: str,
    prompts: Sequence[str],
    rows: Sequence[Tensor],
    near: memorisation.Nearest,
    training: FolderSet,
    bank_rows: NDArray[np.int64],
) -> None:
    """samples_DOMAIN.png, a row a prompt; nearest_DOMAIN.png, the samples most like a training image beside it."""
    save_image(
        work / f"samples_{domain}.png", grid([list(to_uint8(row)) for row in rows], list(prompts), [""] * len(rows[0]))
    )
    worst = np.argsort(near.ratio)[:SHEET_COLUMNS]
    shown = to_uint8(torch.cat(list(rows))[worst])
    beside = to_uint8(training.batch(bank_rows[near.index[worst]]))
    columns = [f"{ratio:.2f}" for ratio in near.ratio[worst]]
    save_image(work / f"nearest_{domain}.png", grid([list(shown), list(beside)], ["sample", "nearest"], columns))
