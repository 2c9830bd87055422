"""`ldm judge-phantom`: does the phantom model do what it is told? The figures and contact sheets of its model card."""

import argparse
from pathlib import Path

import torch

import ldm
from ldm import pipeline
from ldm.files import write_json
from ldm.images import load_pixels, save_image
from ldm.phantom.prompts import DOMAINS, GUIDANCE
from ldm.train import autoencoder, judge
from ldm.train.phantom_set import PhantomSet
from ldm.traversal import figures
from ldm.traversal.plan import Traversal, parse_integers
from ldm.traversal.run_folder import run_traversal
from ldm.traversal.run_images import image_path
from ldm.traversal.sampling import swap_name
from ldm.traversal.store import load_latents

TRAIN_SEED, TEST_SEED = 2_000_000, 3_000_000  # of the probe's images; the model was trained on seeds from 1,000,000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command to `parser`."""
    parser.description = (
        "Sample both domains' prompts, count with a small probe trained on rendered phantoms how often each attribute "
        "appears when asked for and how often the neutral prompt gives a clean image, and write contact sheets to look "
        "at. About half an hour on two CPU cores; writes judge.json and sheets/."
    )
    parser.add_argument("--weights", type=Path, default=pipeline.PHANTOM_WEIGHTS, help="the phantom model to judge")
    parser.add_argument("--out", type=Path, default=Path("out/judge"), help="folder to write (default %(default)s)")
    parser.add_argument("--seeds", default="0-63", help="of the samples (default %(default)s)")
    parser.add_argument("--swap-steps", default="0,10,25,40", help="0 is the style prompt alone (default %(default)s)")
    parser.add_argument("--guidance", type=float, default=GUIDANCE, help="guidance scale (default %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Raises ValueError when the weights do not fit the phantoms."""
    seeds, swap_steps = parse_integers(args.seeds, "--seeds"), parse_integers(args.swap_steps, "--swap-steps")
    sd = ldm.load(args.weights)
    size = sd.config.unet.sample_size * sd.config.vae.downscale
    sets = []
    for name, count, seed in (("train", 4000, TRAIN_SEED), ("test", 500, TEST_SEED)):
        folder = args.out / name
        folder.mkdir(parents=True, exist_ok=True)
        data = PhantomSet(folder, count, seed, size)
        sets.append((autoencoder.encode_all(sd.vae, data)[:, : sd.config.vae.latent_channels], data))
    probe = judge.train_probe(*sets[0], args.out)
    report: dict[str, object] = {"guidance": args.guidance, "probe accuracy": judge.accuracy(probe, *sets[1])}

    for domain, cell in DOMAINS.items():
        out = args.out / domain
        plan = Traversal(
            neutral=cell.neutral,
            styles=cell.styles,
            seeds=seeds,
            swap_steps=swap_steps,
            guidance=args.guidance,
            bezier_points=0,
        )
        run_traversal(sd, plan, out, label=domain)
        latents = load_latents(out / "latents.safetensors").latents
        styled = {name: {s: latents[swap_name(name, s)] for s in swap_steps} for name in cell.styles}
        with torch.no_grad():
            report[domain] = judge.verdict(probe, domain, latents["neutral"], styled)
        for name in ("neutral", *(swap_name(style, min(swap_steps)) for style in cell.styles)):
            images = [load_pixels(image_path(out, seed, name)) for seed in seeds]
            rows = [images[i : i + 8] for i in range(0, len(images), 8)]
            sheet = figures.grid(rows, [""] * len(rows), [""] * 8, f"{domain}: {name}")
            save_image(args.out / "sheets" / f"{domain}_{name.replace('/', '_')}.png", sheet)
    write_json(args.out / "judge.json", report)
    print(f"see {args.out / 'judge.json'} and {args.out / 'sheets'}")
