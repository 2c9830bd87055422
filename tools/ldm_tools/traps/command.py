"""`ldm traps`: every known mistake in re-implementing SD1.5, made on purpose: how far it leads, and what it looks like.

ldm traps --out out/traps
ldm traps --only pad_token_zero,final_alpha_one --out out/two
"""

import argparse
import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ldm.files import write_json
from ldm.images import from_uint8
from ldm.phantom.prompts import DOMAINS, GUIDANCE
from ldm.pipeline import PHANTOM_WEIGHTS
from ldm.study.report import table_formats
from ldm.study.report.plot_style import PAGE_WIDTH, SMALL, new_figure, save_figure
from ldm.traversal.plan import parse_integers
from ldm.traversal.round_trip import relative_error
from ldm_tools.options import add_model, load_model
from ldm_tools.traps import sampling, text, unet, vae
from ldm_tools.traps.conventions import Conventions, Job, Trap, decode, draw, encode

COLUMNS = 6  # of the figure


@dataclass(frozen=True)
class Known:
    """A mistake and where it was seen: another implementation, or an issue of one."""

    trap: Trap
    seen: str

    @property
    def what(self) -> str:
        """Its docstring, in one line."""
        return " ".join((inspect.getdoc(self.trap) or "").split())


TRAPS: dict[str, Known] = {
    "pad_token_zero": Known(text.pad_token_zero, "open_clip's tokenizer; diffusers#2201"),
    "penultimate_layer": Known(text.penultimate_layer, "diffusers#1863"),
    "no_final_norm": Known(text.no_final_norm, "forks that stop at the last layer"),
    "pooled": Known(text.pooled, "CompVis/stable-diffusion#806"),
    "exact_gelu_in_clip": Known(text.exact_gelu_in_clip, "open_clip's ViT-L-14 without -quickgelu"),
    "no_causal_mask": Known(text.no_causal_mask, "a text encoder written like BERT"),
    "no_positions": Known(text.no_positions, "position embeddings left out of a rename table"),
    "tanh_gelu": Known(unet.tanh_gelu, "frameworks whose GELU is approximate by default"),
    "gate_first": Known(unet.gate_first, "other GEGLUs gate with the first half"),
    "one_epsilon": Known(unet.one_epsilon, "one epsilon for all norms"),
    "sines_first": Known(unet.sines_first, "diffusers' flip_sin_to_cos=False"),
    "frequencies_to_the_end": Known(unet.frequencies_to_the_end, "diffusers' downscale_freq_shift=1"),
    "wrong_time": Known(unet.wrong_time, "a loop over step numbers"),
    "heads_of_width_8": Known(unet.heads_of_width_8, "diffusers#2011"),
    "heads_interleaved": Known(unet.heads_interleaved, "a reshape in the wrong order"),
    "skips_first": Known(unet.skips_first, "U-Nets that concatenate the other way"),
    "bilinear_upsampling": Known(unet.bilinear_upsampling, "another default of an interpolation"),
    "asymmetric_padding": Known(unet.asymmetric_padding, "one Downsample for both networks"),
    "symmetric_padding": Known(vae.symmetric_padding, "kjsman/stable-diffusion-pytorch#8"),
    "epsilon": Known(vae.epsilon, "torch's default"),
    "no_scale_in_decoding": Known(vae.no_scale_in_decoding, "the factor is in no weight file"),
    "no_scale_in_encoding": Known(vae.no_scale_in_encoding, "the factor is in no weight file"),
    "half_precision": Known(vae.half_precision, "prompt-to-prompt#30"),
    "posterior_sampled": Known(vae.posterior_sampled, "pipelines that sample in image-to-image"),
    "images_from_0_to_1": Known(vae.images_from_0_to_1, "torchvision's ToTensor alone"),
    "truncated_bytes": Known(vae.truncated_bytes, "CompVis/stable-diffusion's scripts"),
    "final_alpha_one": Known(sampling.final_alpha_one, "diffusers' set_alpha_to_one=True, its default"),
    "trailing_spacing": Known(sampling.trailing_spacing, "diffusers' timestep_spacing='trailing'"),
    "even_spacing": Known(sampling.even_spacing, "diffusers' timestep_spacing='linspace'"),
    "no_offset": Known(sampling.no_offset, "diffusers' steps_offset=0, its default"),
    "linear_betas": Known(sampling.linear_betas, "DDPM's schedule"),
    "clipped_x0": Known(sampling.clipped_x0, "diffusers' clip_sample=True, its default"),
    "output_as_v": Known(sampling.output_as_v, "SD2.1's prediction_type"),
    "scaled_noise": Known(sampling.scaled_noise, "init_noise_sigma of another sampler"),
    "one_generator": Known(sampling.one_generator, "CompVis#512, diffusers#2659, ComfyUI#922"),
    "swap_off_by_one": Known(sampling.swap_off_by_one, "AUTOMATIC1111#7279; the paper's own code"),
    "halves_swapped": Known(sampling.halves_swapped, "[cond, uncond] for [uncond, cond]"),
    "guidance_from_the_prompt": Known(sampling.guidance_from_the_prompt, "the guidance paper's w is g - 1"),
}


@dataclass(frozen=True, eq=False)
class Result:
    """What a recipe makes of a job, and of the right image of that job."""

    latents: Tensor  # (B, 4, h, w)
    images: NDArray[np.uint8]  # (B, H, W, 3)
    encoded: Tensor  # (B, 4, h, w), of the right images
    returned: NDArray[np.uint8]  # (B, H, W, 3): encoded and decoded


@dataclass(frozen=True)
class Drift:
    """How far a mistake leads. Latents: l2 of the difference over l2. Images: mean absolute difference, of 255 greys.

    latents, image: of a traversal from noise.  encoded, returned: of the right image, encoded and decoded again.
    """

    latents: float
    image: float
    encoded: float
    returned: float

    @classmethod
    def between(cls, wrong: Result, right: Result) -> "Drift":
        return cls(
            relative_error(wrong.latents, right.latents),
            _greys(wrong.images, right.images),
            relative_error(wrong.encoded, right.encoded),
            _greys(wrong.returned, right.returned),
        )


def _greys(wrong: NDArray[np.uint8], right: NDArray[np.uint8]) -> float:
    return float(np.abs(wrong.astype(np.int16) - right).mean())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command to `parser`."""
    parser.description = (
        "Make every known mistake in re-implementing SD1.5 and hold it against the right network: a traversal from "
        "noise (50 DDIM steps, the prompt swapped after 15), and an image encoded and decoded. Writes traps.json, "
        "traps.md and the figure traps.png. The switches are in this command; the library has none."
    )
    add_model(parser)
    parser.add_argument("--only", help="some of the mistakes, by name, with commas (default: all)")
    parser.add_argument("--seeds", default="0-1", help="images of each prompt (default %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps (default %(default)s)")
    parser.add_argument("--neutral", help="a prompt to start under, with --style (default: those of the phantoms)")
    parser.add_argument("--style", help="the prompt that is swapped in")
    parser.add_argument("--out", type=Path, default=Path("out/traps"), help="folder to write (default %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Raises ValueError for an unknown mistake, or prompts that do not come in pairs."""
    known = chosen(args.only)
    jobs = jobs_of(args)
    sd = load_model(args)
    if sd.dtype != torch.float32:
        raise ValueError(f"--dtype: got {args.dtype}, expected float32: smaller mistakes than rounding are measured")
    right_recipe = Conventions.right(sd)
    rights = {name: carried_out(right_recipe, job, None) for name, job in jobs.items()}
    wrongs: dict[str, dict[str, Result]] = {}
    for name, entry in tqdm(known.items(), disable=None, leave=False, desc="mistakes"):
        recipe = entry.trap(right_recipe)
        wrongs[name] = {job: carried_out(recipe, jobs[job], right.images) for job, right in rights.items()}
    drifts = {
        name: {job: Drift.between(result, rights[job]) for job, result in results.items()}
        for name, results in wrongs.items()
    }
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "traps.json", record(known, drifts, jobs, sd.weights_sha256()))
    table = drift_table(drifts)
    (args.out / "traps.md").write_text(table_formats.markdown(table))
    save_figure(figure(rights, wrongs, drifts), args.out / "traps")
    print(table_formats.markdown(table))
    print(f"look at {args.out / 'traps.png'}")


def chosen(only: str | None) -> Mapping[str, Known]:
    """The mistakes asked for. Raises ValueError for a name that is none."""
    if only is None:
        return TRAPS
    names = [name.strip() for name in only.split(",")]
    if unknown := [name for name in names if name not in TRAPS]:
        raise ValueError(f"--only: {', '.join(unknown)} unknown, expected some of {', '.join(TRAPS)}")
    return {name: TRAPS[name] for name in names}


def jobs_of(args: argparse.Namespace) -> dict[str, Job]:
    """What is drawn. Raises ValueError when a prompt has no partner, or fits no phantom model."""
    seeds = tuple(parse_integers(args.seeds, "--seeds"))
    if args.steps < 16:
        raise ValueError(f"--steps: got {args.steps}, expected 16 or more: the prompt is swapped after 15")
    if (args.neutral is None) != (args.style is None):
        raise ValueError("--neutral, --style: expected both, or neither for the phantoms' prompts")
    if args.neutral is not None:
        return {"prompts": Job(seeds, args.neutral, args.style, steps=args.steps, guidance=7.5)}
    if args.weights != PHANTOM_WEIGHTS:
        raise ValueError("--neutral, --style: expected two prompts that this model knows")
    styles = {"chest": "pleural_effusion", "skin": "hair"}
    return {
        domain: Job(seeds, DOMAINS[domain].neutral, DOMAINS[domain].styles[style], steps=args.steps, guidance=GUIDANCE)
        for domain, style in styles.items()
    }


def carried_out(recipe: Conventions, job: Job, images: NDArray[np.uint8] | None) -> Result:
    """A job under a recipe; images: what is encoded and decoded, None: the images just drawn."""
    latents = draw(recipe, job)
    drawn = decode(recipe, latents)
    source = from_uint8(drawn if images is None else images)
    encoded = encode(recipe, source)
    return Result(latents, drawn, encoded, decode(recipe, encoded))


def record(
    known: Mapping[str, Known],
    drifts: Mapping[str, Mapping[str, Drift]],
    jobs: Mapping[str, Job],
    weights: str,
) -> dict[str, Any]:
    """Everything, for JSON."""
    return {
        "weights_sha256": weights,
        "jobs": {name: asdict(job) for name, job in jobs.items()},
        "traps": {
            name: {"what": entry.what, "seen": entry.seen}
            | {"drift": {job: asdict(drift) for job, drift in drifts[name].items()}}
            for name, entry in known.items()
        },
    }


def mean(drifts: Mapping[str, Drift]) -> Drift:
    """Over the jobs."""
    rows = [asdict(drift) for drift in drifts.values()]
    return Drift(**{name: sum(row[name] for row in rows) / len(rows) for name in rows[0]})


def drift_table(drifts: Mapping[str, Mapping[str, Drift]]) -> table_formats.Table:
    """A row for each mistake, the mean over the jobs, the worst first."""
    means = sorted(
        ((name, mean(by_job)) for name, by_job in drifts.items()),
        key=lambda pair: -max(pair[1].image, pair[1].returned),
    )
    return table_formats.Table(
        "How far each mistake leads",
        ("mistake", "latents", "image", "encoded", "returned"),
        tuple((name, d.latents, d.image, d.encoded, d.returned) for name, d in means),
        "latents, encoded: l2 of the difference over l2; image, returned: mean absolute difference of 255 grey levels. "
        "latents and image: a traversal from noise; encoded and returned: the right image, encoded and decoded again.",
    )


def figure(
    rights: Mapping[str, Result], wrongs: Mapping[str, Mapping[str, Result]], drifts: Mapping[str, Mapping[str, Drift]]
) -> Figure:
    """A cell for each mistake, the right images first; of a mistake that only images met, the image returned."""
    cells = [("right", [right.images[-1] for right in rights.values()], "")]
    for name, results in wrongs.items():
        drift = mean(drifts[name])
        drawn = drift.image >= drift.returned
        images = [(result.images if drawn else result.returned)[-1] for result in results.values()]
        greys = drift.image if drawn else drift.returned
        cells.append((name, images, f"{greys:.1f} greys" + ("" if drawn else ", encoded and back")))
    rows = -(-len(cells) // COLUMNS)
    side = PAGE_WIDTH / COLUMNS
    sheet = new_figure(PAGE_WIDTH, rows * (side / len(rights) + 0.36))
    for panel, (name, images, note) in zip(sheet.subplots(rows, COLUMNS).flat, cells, strict=False):
        panel.imshow(np.concatenate(images, axis=1))
        panel.set_title(f"{name.replace('_', ' ')}\n{note}", fontsize=SMALL - 2)
    for panel in sheet.axes:
        panel.axis("off")
    return sheet
