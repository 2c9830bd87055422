"""Real images as starting points: read, encoded, inverted to noise, and retraced from it.

    OUT/latents.safetensors                    seed0123456789/x_T, .../encoded, .../retraced (EDICT: .../y_T)
    OUT/images/seed0123456789/original.png     as the autoencoder was given it
    OUT/images/seed0123456789/encoded.png      encoded and decoded: what the autoencoder alone loses
    OUT/images/seed0123456789/retraced.png     inverted and sampled back
    OUT/comparison.png, run.json

An image takes the place of a seed, under a number that is made of its bytes: whatever else is in a folder or on the
command line, one image has one number, another image another, and a folder is continued or grown as with seeds.

Letters: B images, C H W of a latent.
"""

from __future__ import annotations

import logging
import math
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from skimage.metrics import peak_signal_noise_ratio
from torch import Tensor
from tqdm import tqdm

from ldm import checkpoint
from ldm.conditioning import constant
from ldm.data.images import FITS, load_with_remarks
from ldm.data.reading import AS_STORED, Reading
from ldm.files import write_json
from ldm.guidance import GuidedEps, guided, rows_a_latent
from ldm.images import from_uint8, load_pixels, save_image
from ldm.pipeline import StableDiffusion
from ldm.samplers import Step, ddim
from ldm.schedule import SPACINGS, TRAIN_STEPS
from ldm.traversal import figures
from ldm.traversal.inversion import ddim_inversion, edict, edict_inversion, fixed_point_inversion
from ldm.traversal.plan import Traversal
from ldm.traversal.run_folder import default_max_batch, image_path, read_record, write_images
from ldm.traversal.store import load_seed, run_seeds

log = logging.getLogger(__name__)

Method = Literal["naive", "fixed-point", "edict"]
METHODS: dict[Method, Callable[..., Iterator[Step]]] = {
    "naive": ddim_inversion,
    "fixed-point": fixed_point_inversion,
    "edict": edict_inversion,
}
LOST = 0.05  # relative error of a latent from which on its round trip is worth a warning: it can be seen


@dataclass(frozen=True)
class RealImage:
    """An image file and the number that it goes by."""

    file: Path
    sha256: str  # of the file's bytes

    @property
    def seed(self) -> int:
        """0 .. 2^32-1, the first 32 bits of the hash: it takes a seed's place in names."""
        return int(self.sha256[:8], 16)


def open_images(files: Sequence[Path]) -> dict[int, RealImage]:
    """Each image by its number, in the order given.

    Raises: OSError for a file that cannot be read; ValueError for a folder, or two files of the same bytes.
    """
    images: dict[int, RealImage] = {}
    for file in files:
        if file.is_dir():
            raise ValueError(f"image: {file} is a folder, expected an image file")
        image = RealImage(file, checkpoint.sha256(file))
        if (other := images.setdefault(image.seed, image)) is not image:
            raise ValueError(f"image: {other.file} and {file} hold the same bytes, name one of them")
    return images


@dataclass(frozen=True, kw_only=True)
class Inversion:
    """How images become noise, and how they are retraced."""

    prompt: str
    method: Method = "fixed-point"
    steps: int = 50
    spacing: str = "leading"  # one of ldm.schedule.SPACINGS
    guidance: float = 1.0  # see `ldm.inversion`
    negative: str = ""
    fit: str = "squash"  # how an image is made square
    reading: Reading = AS_STORED  # how its file becomes pixels

    def settings(self) -> dict[str, Any]:
        """For run.json: a reading as usual is not mentioned, so that older folders can be grown."""
        entries = asdict(self)
        if self.reading == AS_STORED:
            del entries["reading"]
        return entries

    def __post_init__(self) -> None:
        """Everything that can be wrong before a network is at hand."""
        if not self.prompt.strip():
            raise ValueError("prompt: none given, expected what the image shows; it is retraced under this prompt")
        if self.method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {self.method!r}")
        if not 1 <= self.steps <= TRAIN_STEPS:
            raise ValueError(f"steps: expected 1..{TRAIN_STEPS}, got {self.steps}")
        if self.spacing not in SPACINGS:
            raise ValueError(f"spacing: expected one of {', '.join(SPACINGS)}, got {self.spacing!r}")
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance: expected a finite number, got {self.guidance}")
        if self.fit not in FITS:
            raise ValueError(f"fit: expected one of {', '.join(FITS)}, got {self.fit!r}")


@dataclass(frozen=True, eq=False)
class Noise:
    """What latents were inverted to."""

    x_T: Tensor  # (B, C, H, W)
    y_T: Tensor | None = None  # its partner, of EDICT

    def latents(self) -> dict[str, Tensor]:
        """By the names that they are saved under."""
        return {"x_T": self.x_T} if self.y_T is None else {"x_T": self.x_T, "y_T": self.y_T}


Progress = Callable[[int], object]
"""Called after every step with the number of images that it was taken for."""


def bind(sd: StableDiffusion, how: Inversion, max_batch: int | None = None) -> GuidedEps:
    """The network under the inversion's prompts; see `ldm.guidance.guided`."""
    prompt, negative = sd.encode_prompts([how.prompt, how.negative])[:, None]
    return guided(sd.unet, constant(prompt, how.steps), how.guidance, negative, max_batch=max_batch)


@torch.no_grad()
def invert(sd: StableDiffusion, how: Inversion, eps_fn: GuidedEps, x_0: Tensor, progress: Progress = int) -> Noise:
    """Latents (B, C, H, W), float32, to noise by the chosen method; eps_fn: see `bind`."""
    timesteps = SPACINGS[how.spacing](how.steps, sd.schedule)
    for step in METHODS[how.method](eps_fn, x_0, sd.schedule, how.steps, timesteps=timesteps):
        progress(len(step.x_t))
    return Noise(step.x_t, *step.history)


@torch.no_grad()
def retrace(sd: StableDiffusion, how: Inversion, eps_fn: GuidedEps, noise: Noise, progress: Progress = int) -> Tensor:
    """The way down again, by the sampler that the method inverts: latents (B, C, H, W)."""
    timesteps = SPACINGS[how.spacing](how.steps, sd.schedule)
    if noise.y_T is None:
        run = ddim(eps_fn, noise.x_T, sd.schedule, how.steps, timesteps=timesteps)
    else:
        run = edict(eps_fn, noise.x_T, sd.schedule, how.steps, history=(noise.y_T,), timesteps=timesteps)
    for step in run:
        progress(len(step.x_prev))
    return step.x_prev


def relative_error(x: Tensor, reference: Tensor) -> float:
    """|x - reference| / |reference|"""
    return float((x - reference).norm() / reference.norm())


def finite(value: float | Tensor) -> float | None:
    """A number as JSON can hold it: None for infinity and NaN, where a latent was lost."""
    return float(value) if math.isfinite(value) else None


class Originals:
    """The pixels of some images, brought to the latents' size; all are read before any is inverted."""

    def __init__(
        self,
        sd: StableDiffusion,
        images: Mapping[int, RealImage],
        shape: Sequence[int],
        fit: str,
        reading: Reading = AS_STORED,
    ) -> None:
        """shape: (C, H, W) of the latents.  Raises ValueError for a size that is not square, or a damaged file."""
        _, height, width = shape
        scale = sd.config.vae.downscale
        if height != width:
            raise ValueError(f"size: got {width * scale}x{height * scale}, expected a square: images are made square")
        self.sd, self.images = sd, images
        self.pixels = {}
        for seed, image in images.items():
            self.pixels[seed], remarks = load_with_remarks(image.file, height * scale, fit, reading)
            for remark in remarks:
                log.warning("%s: %s", image.file, remark)

    def encoded(self, seeds: Sequence[int]) -> Tensor:
        """Their latents (B, C, H, W), float32; one at a time, so that none depends on the others."""
        return torch.cat([self.sd.encode_image(from_uint8(self.pixels[seed])[None]).float() for seed in seeds])

    def finish(self, latents: Path, out: Path, retraced: str, earlier: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What became of each image, for run.json; what `earlier` says of others is kept.

        Where the latents were decoded, there is a PSNR too, original.png is written beside the other images, and
        OUT/comparison.png: a row an image, from the original to the retraced one and what differs.

        Args:    retraced: the name of the latent and the image that retrace the original.
        Raises:  ValueError: the folder's image of the same number is another one; one pair in 4 billion is so.
        """
        entries = {entry["seed"]: entry for entry in earlier.get("images", [])}
        rows = []
        for seed, image in self.images.items():
            if entries.get(seed, {}).get("sha256", image.sha256) != image.sha256:
                other = entries[seed]["file"]
                raise ValueError(
                    f"image: {image.file} has the number of {other}, another image; expected another folder"
                )
            of = load_seed(latents, seed)
            error = relative_error(of[retraced], of["encoded"])
            entry = {"seed": seed, "file": str(image.file), "sha256": image.sha256, "round_trip_error": finite(error)}
            entry["noise_std"] = finite(of["x_T"].std())  # of a sampler's noise: 1
            if image_path(out, seed, retraced).exists():
                original = self.pixels[seed]
                save_image(image_path(out, seed, "original"), original)
                encoded, back = (load_pixels(image_path(out, seed, name)) for name in ("encoded", retraced))
                entry["psnr_db"] = finite(peak_signal_noise_ratio(original, back))
                entry["autoencoder_psnr_db"] = finite(peak_signal_noise_ratio(original, encoded))
                rows.append([original, encoded, back, figures.difference(back, original)])
            if not error < LOST:  # NaN too
                log.warning("%s: lost, its latent comes back with a relative error of %.2g", image.file, error)
            entries[seed] = entry
        if rows:
            names = [image.file.name for image in self.images.values()]
            columns = ["original", "autoencoder", retraced, "change"]
            save_image(out / "comparison.png", figures.grid(rows, names, columns))
        return [entries[seed] for seed in sorted(entries)]


# ---- images into a folder --------------------------------------------------------------------------


def run_inversion(
    sd: StableDiffusion,
    how: Inversion,
    images: Mapping[int, RealImage],
    out: Path,
    *,
    latent_size: tuple[int, int] | None = None,
    max_batch: int | None = None,
) -> dict[str, Any]:
    """Invert images and retrace them, into a folder; a run that was cut off there is continued.

    Args:    images: see `open_images`.  latent_size: height, width; None: as the model was trained.
             max_batch: see `ldm.traversal.run_folder.run_traversal`.
    Returns: the content of run.json.
    Raises:  ValueError: an image that cannot be read, or a folder that holds inversions of other settings.
    """
    began = time.monotonic()
    shape = (sd.latent_shape[0], *(latent_size or sd.latent_shape[1:]))
    max_batch = default_max_batch(shape) if max_batch is None else max_batch
    earlier = read_record(out) if (out / "latents.safetensors").exists() else {}
    originals = Originals(sd, images, shape, how.fit, how.reading)
    dtype = str(sd.dtype).removeprefix("torch.")
    model = {"weights_sha256": sd.weights_sha256(), "weight_set": sd.weight_set, "dtype": dtype}
    eps_fn = bind(sd, how, max_batch)

    with tqdm(total=2 * how.steps * len(images), desc="invert: steps", unit="step", mininterval=1) as bar:

        def compute(seeds: list[int]) -> dict[str, Tensor]:
            for seed in seeds:  # whatever lies there was decoded from other latents
                shutil.rmtree(image_path(out, seed, "").parent, ignore_errors=True)
            x_0 = originals.encoded(seeds).to(sd.device)
            noise = invert(sd, how, eps_fn, x_0, bar.update)
            return {**noise.latents(), "encoded": x_0, "retraced": retrace(sd, how, eps_fn, noise, bar.update)}

        settings = {**how.settings(), **model, "latent_size": shape[1:]}
        path = run_seeds(compute, list(images), out, settings, max(1, max_batch // rows_a_latent(how.guidance)))

    decoded = write_images(sd, path, out, "invert")
    known = {entry["sha256"] for entry in earlier.get("images", [])}
    if not eps_fn.rows and not decoded and known >= {image.sha256 for image in images.values()}:
        return {**earlier, "unet_rows_this_run": 0}  # nothing was left to do
    record = {
        "unet_rows_this_run": eps_fn.rows,  # guidance's second half counted
        "seconds": round(earlier.get("seconds", 0) + time.monotonic() - began, 2),
        "images": originals.finish(path, out, "retraced", earlier),
        **how.settings(),
        **model,
        "backend": sd.backend,
        "device": str(sd.device),
        "max_batch": max_batch,
        "weights": [str(file) for file in sd.files],
        "latent_size": shape[1:],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    write_json(out / "run.json", record)
    return record


class ImageStart:
    """Real images as the start of a traversal, see `ldm.traversal.run_folder.Start`.

    They are inverted at guidance 1 under the neutral prompt. So that the neutral branch retraces them at the plan's
    guidance, its negative prompt should be the neutral one; see `ldm.inversion`.
    """

    def __init__(
        self,
        sd: StableDiffusion,
        plan: Traversal,
        images: Mapping[int, RealImage],
        method: Method = "fixed-point",
        fit: str = "squash",
        max_batch: int | None = None,
        reading: Reading = AS_STORED,
    ) -> None:
        """Reads the images; `images`: those of the plan's seeds.

        Raises: ValueError: a plan whose sampler has no inversion here, or an image that cannot be read.
        """
        if plan.sampler != "ddim" or plan.eta or method == "edict":
            got = f"{plan.sampler} with eta {plan.eta}, inverted by {method}"
            raise ValueError(f"image: a traversal retraces images by ddim with eta 0, naive or fixed-point, got {got}")
        if plan.guidance != 1 and plan.negative != plan.neutral:
            log.warning("the negative prompt is not the neutral one: the neutral image will not retrace the original")
        shape = (sd.latent_shape[0], *(plan.latent_size or sd.latent_shape[1:]))
        self.how = Inversion(
            prompt=plan.neutral, method=method, steps=plan.steps, spacing=plan.spacing, fit=fit, reading=reading
        )
        self.originals = Originals(sd, images, shape, fit, reading)
        self.sd, self.max_batch = sd, default_max_batch(shape) if max_batch is None else max_batch
        self.rows = 0  # U-Net rows evaluated

    @property
    def settings(self) -> dict[str, Any]:
        """In a folder that was started from noise these are absent, so neither is mistaken for the other."""
        settings = {"start": "images", "inversion": self.how.method, "fit": self.how.fit}
        return settings if self.how.reading == AS_STORED else {**settings, "reading": asdict(self.how.reading)}

    def latents(self, seeds: Sequence[int]) -> dict[str, Tensor]:
        """x_T and encoded: (B, C, H, W)."""
        eps_fn = bind(self.sd, self.how, self.max_batch)
        x_0 = self.originals.encoded(seeds).to(self.sd.device)
        with tqdm(total=self.how.steps, desc="invert: steps", unit="step", leave=False, mininterval=1) as bar:
            noise = invert(self.sd, self.how, eps_fn, x_0, lambda _: bar.update(1))
        self.rows += eps_fn.rows
        return {**noise.latents(), "encoded": x_0}

    def record(self, latents: Path, out: Path, earlier: Mapping[str, Any]) -> dict[str, Any]:
        """The settings, and what became of each image."""
        images = self.originals.finish(latents, out, "neutral", earlier)
        return {**self.settings, "images": images, "inversion_rows_this_run": self.rows}
