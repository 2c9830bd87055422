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
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm import checkpoint
from ldm.data.images import load_with_remarks
from ldm.data.reading import AS_STORED, Reading
from ldm.files import write_json
from ldm.guidance import rows_a_latent
from ldm.images import from_uint8, load_pixels, save_image
from ldm.pipeline import StableDiffusion
from ldm.samplers import EpsFn
from ldm.traversal import figures
from ldm.traversal.plan import Traversal
from ldm.traversal.round_trip import Inversion, Method, Progress, bind, finite, invert, relative_error, retrace
from ldm.traversal.run_folder import model_record, read_record, versions
from ldm.traversal.run_images import image_path, remove_images, write_images
from ldm.traversal.sampling import bounded
from ldm.traversal.store import load_seed, run_seeds

log = logging.getLogger(__name__)

ENOUGH_DB = 27.0  # of an autoencoder; below, hair and ruler marks are gone

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
        """shape: (C, H, W) of the latents.  Raises ValueError for a damaged file."""
        _, height, width = shape
        scale = sd.config.vae.downscale
        self.sd, self.images = sd, images
        self.pixels = {}
        for seed, image in images.items():
            self.pixels[seed], remarks = load_with_remarks(image.file, (height * scale, width * scale), fit, reading)
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
        from skimage.metrics import peak_signal_noise_ratio  # half a second, and a traversal from noise needs none

        entries = {entry["seed"]: entry for entry in earlier.get("images", [])}
        rows = []
        for seed, image in self.images.items():
            if entries.get(seed, {}).get("sha256", image.sha256) != image.sha256:
                other = entries[seed]["file"]
                raise ValueError(
                    f"image: {image.file} has the number of {other}, another image; expected another folder"
                )
            kept = load_seed(latents, seed)
            error = relative_error(kept[retraced], kept["encoded"])
            entry = {"seed": seed, "file": str(image.file), "sha256": image.sha256, "round_trip_error": finite(error)}
            entry["noise_std"] = finite(kept["x_T"].std())  # of a sampler's noise: 1
            if image_path(out, seed, retraced).exists():
                original = self.pixels[seed]
                save_image(image_path(out, seed, "original"), original)
                encoded, back = (load_pixels(image_path(out, seed, name)) for name in ("encoded", retraced))
                entry["psnr_db"] = finite(peak_signal_noise_ratio(original, back))
                alone = finite(peak_signal_noise_ratio(original, encoded))
                entry["autoencoder_psnr_db"] = alone
                if alone is not None and alone < ENOUGH_DB:
                    log.warning("%s: %s", image.file, too_little(alone))
                rows.append([original, encoded, back, figures.difference(back, original)])
            if not error < LOST:  # NaN too
                log.warning("%s: lost, its latent comes back with a relative error of %.2g", image.file, error)
            entries[seed] = entry
        if rows:
            names = [image.file.name for image in self.images.values()]
            columns = ["original", "autoencoder", retraced, "change"]
            save_image(out / "comparison.png", figures.grid(rows, names, columns))
        return [entries[seed] for seed in sorted(entries)]


def too_little(psnr: float) -> str:
    """What an autoencoder's PSNR below ENOUGH_DB means."""
    return (
        f"the autoencoder alone brings it back to {psnr:.1f} dB; below {ENOUGH_DB:.0f} dB thin lines and "
        "colours are lost whatever is done to the latents: another model, or `ldm train-small` on such images"
    )


# ---- images into a folder --------------------------------------------------------------------------


def run_inversion(
    sd: StableDiffusion,
    how: Inversion,
    images: Mapping[int, RealImage],
    out: Path,
    *,
    latent_size: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Invert images and retrace them, into a folder; a run that was cut off there is continued.

    Args:    images: see `open_images`.  latent_size: height, width; None: as the model was trained.
    Returns: the content of run.json.
    Raises:  ValueError: an image that cannot be read, or a folder that holds inversions of other settings.
    """
    began = time.monotonic()
    shape = (sd.latent_shape[0], *(latent_size or sd.latent_shape[1:]))
    sd = bounded(sd, shape)
    earlier = read_record(out) if (out / "latents.safetensors").exists() else {}
    originals = Originals(sd, images, shape, how.fit, how.reading)
    settings = {**how.settings(), **model_record(sd, [how.prompt, how.negative]), "latent_size": shape[1:]}
    at_once = max(1, (sd.max_batch or 1) // rows_a_latent(how.guidance))
    eps_fn = bind(sd, how)
    with tqdm(total=2 * how.steps * len(images), desc="invert: steps", unit="step", mininterval=1) as bar:
        compute = partial(_there_and_back, originals, how, eps_fn, out, bar.update)
        path = run_seeds(compute, list(images), out, settings, at_once)

    decoded = write_images(sd, path, out, "invert")
    known = {entry["sha256"] for entry in earlier.get("images", [])}
    if not eps_fn.rows and not decoded and known >= {image.sha256 for image in images.values()}:
        return {**earlier, "unet_rows_this_run": 0}  # nothing was left to do
    record = {
        "unet_rows_this_run": eps_fn.rows,  # guidance's second half counted
        "seconds": round(earlier.get("seconds", 0) + time.monotonic() - began, 2),
        "images": originals.finish(path, out, "retraced", earlier),
        **settings,
        "backend": sd.backend,
        **({"engine": sd.engine} if sd.engine else {}),
        "device": str(sd.device),
        "max_batch": sd.max_batch,
        "weights": [str(file) for file in sd.files],
        **versions(),
    }
    write_json(out / "run.json", record)
    return record


def _there_and_back(
    originals: Originals, how: Inversion, eps_fn: EpsFn, out: Path, progress: Progress, seeds: list[int]
) -> dict[str, Tensor]:
    """All that is kept of some images: name -> (B, C, H, W)."""
    remove_images(out, seeds)
    sd = originals.sd
    x_0 = originals.encoded(seeds).to(sd.device)
    noise = invert(sd, how, eps_fn, x_0, progress)
    return {**noise.latents(), "encoded": x_0, "retraced": retrace(sd, how, eps_fn, noise, progress)}


class ImageStart:
    """Real images as the start of a traversal, see `ldm.traversal.run_folder.Start`.

    They are inverted at guidance 1 under the neutral prompt. So that the neutral branch retraces them at the plan's
    guidance, its negative prompt should be the neutral one; see `ldm.traversal.inversion`.
    """

    def __init__(
        self,
        sd: StableDiffusion,
        plan: Traversal,
        images: Mapping[int, RealImage],
        method: Method = "fixed-point",
        fit: str = "squash",
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
        self.sd = bounded(sd, shape)
        self.rows = 0  # U-Net rows evaluated

    @property
    def settings(self) -> dict[str, Any]:
        """In a folder that was started from noise these are absent, so neither is mistaken for the other."""
        settings = {"start": "images", "inversion": self.how.method, "fit": self.how.fit}
        return settings if self.how.reading == AS_STORED else {**settings, "reading": asdict(self.how.reading)}

    def latents(self, seeds: Sequence[int]) -> dict[str, Tensor]:
        """x_T and encoded: (B, C, H, W)."""
        eps_fn = bind(self.sd, self.how)
        x_0 = self.originals.encoded(seeds).to(self.sd.device)
        with tqdm(total=self.how.steps, desc="invert: steps", unit="step", leave=False, mininterval=1) as bar:
            noise = invert(self.sd, self.how, eps_fn, x_0, lambda _: bar.update(1))
        self.rows += eps_fn.rows
        return {**noise.latents(), "encoded": x_0}

    def record(self, latents: Path, out: Path, earlier: Mapping[str, Any]) -> dict[str, Any]:
        """The settings, and what became of each image."""
        images = self.originals.finish(latents, out, "neutral", earlier)
        return {**self.settings, "images": images, "inversion_rows_this_run": self.rows}
