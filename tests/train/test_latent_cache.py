"""Posteriors on disk: the same as encoding anew, computed once, and never half a shard."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from ldm.config import VAEConfig
from ldm.train import latent_cache
from ldm.train.latent_cache import Interrupted, Preprocessing, Uncached, build, encode, fingerprint, mirror
from ldm.vae import AutoencoderKL

PREPROCESSING = Preprocessing(size=16)
MIRRORED = Preprocessing(size=16, flip=True)
# One image or several at a time: convolutions sum in another order, some ulps of values around 1.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(VAEConfig(widths=(32, 64), resnets_per_level=1)).eval()


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NDArray[np.str_]:
    """Seven images, in shards of three."""
    monkeypatch.setattr(latent_cache, "SHARD", 3)
    random = np.random.default_rng(0)
    for i in range(7):
        Image.fromarray(random.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    return np.array([str(tmp_path / f"{i}.png") for i in range(7)])


def shards(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_what_is_stored_is_what_the_encoder_says(tmp_path, files, vae):
    cache = build(tmp_path / "latents", files, MIRRORED, vae)
    fresh = Uncached(files, MIRRORED, vae)
    rows, flipped = np.array([6, 0, 3, 3]), [False, True, False, True]
    assert cache.moments(rows, flipped).shape == (4, 8, 8, 8)
    torch.testing.assert_close(cache.moments(rows, flipped), fresh.moments(rows, flipped), **CLOSE)


def test_mean_and_log_variance_are_the_encoders(vae):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        posterior = vae.encode(image)
    torch.testing.assert_close(encode(vae, [pixels])[:, :4], posterior.mean, **CLOSE)
    torch.testing.assert_close(encode(vae, [pixels])[:, 4:], posterior.logvar, **CLOSE)


def test_a_mirror_image_is_one():
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert mirror(pixels)[0, 0].tolist() == [3, 4, 5]
    assert mirror(pixels)[1, 1].tolist() == [6, 7, 8]


def test_nothing_is_computed_twice(tmp_path, files, vae):
    folder = tmp_path / "latents"
    build(folder, files, PREPROCESSING, vae)
    before = shards(folder)
    assert len(before) == 3
    build(folder, files, PREPROCESSING, vae)
    assert shards(folder) == before


def test_a_changed_image_asks_for_its_own_shard_only(tmp_path, files, vae):
    folder = tmp_path / "latents"
    build(folder, files, PREPROCESSING, vae)
    before = shards(folder)
    Image.new("RGB", (20, 24), "red").save(files[4])
    os.utime(files[4], ns=(1, 1))  # another time, however coarse the file system's clock
    cache = build(folder, files, PREPROCESSING, vae)
    after = shards(folder)
    assert len(after.keys() - before.keys()) == 1
    red = Uncached(files, PREPROCESSING, vae).moments(np.array([4]), [False])
    torch.testing.assert_close(cache.moments(np.array([4]), [False]), red, **CLOSE)


@pytest.mark.parametrize("other", [Preprocessing(size=32), Preprocessing(size=16, fit="crop"), MIRRORED])
def test_another_preprocessing_has_other_shards(tmp_path, files, vae, other):
    folder = tmp_path / "latents"
    build(folder, files[:2], PREPROCESSING, vae)
    build(folder, files[:2], other, vae)
    assert len(shards(folder)) == 2


def test_another_encoder_has_other_shards(tmp_path, files, vae):
    folder = tmp_path / "latents"
    build(folder, files[:2], PREPROCESSING, vae)
    torch.manual_seed(1)
    build(folder, files[:2], PREPROCESSING, AutoencoderKL(vae.config).eval())
    assert len(shards(folder)) == 2


def test_a_damaged_shard_is_computed_again(tmp_path, files, vae):
    folder = tmp_path / "latents"
    wanted = build(folder, files, PREPROCESSING, vae).moments(np.arange(7), [False] * 7)
    for path, size in zip(sorted(folder.iterdir()), (0, 100, 1000), strict=True):
        os.truncate(path, size)
    again = build(folder, files, PREPROCESSING, vae).moments(np.arange(7), [False] * 7)
    assert torch.equal(again, wanted)


def test_a_stopped_build_keeps_whole_shards_and_goes_on(tmp_path, files, vae):
    folder = tmp_path / "latents"
    asked = iter([False, True])  # a shard of three is one call of the encoder
    with pytest.raises(Interrupted):
        build(folder, files, PREPROCESSING, vae, stop=lambda: next(asked))
    first = shards(folder)
    assert len(first) == 1
    build(folder, files, PREPROCESSING, vae)
    assert first.items() <= shards(folder).items()


def test_a_disk_too_small_is_found_out_first(tmp_path, files, vae, monkeypatch):
    monkeypatch.setattr(latent_cache.shutil, "disk_usage", lambda path: _Free(1000))
    with pytest.raises(ValueError, match=r"latents need 0\.00 GB.*--no-cache"):
        build(tmp_path / "latents", files, PREPROCESSING, vae)
    assert shards(tmp_path / "latents") == {}


class _Free:
    def __init__(self, free: int) -> None:
        self.free = free


def test_a_fingerprint_changes_with_one_weight(vae):
    before = fingerprint(vae)
    assert fingerprint(vae) == before
    with torch.no_grad():
        vae.quant_conv.bias[0] += 1
    assert fingerprint(vae) != before
    with torch.no_grad():
        vae.quant_conv.bias[0] -= 1
