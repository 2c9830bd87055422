"""The images that a classifier learns from: decoded once, seen through an autoencoder, enlarged."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from classifier_training import SIZE, TINY
from ldm_tools import cli
from torch.nn import functional as F

from ldm import pipeline
from ldm.data.labelled import LabelledImages
from ldm.data.reading import Reading
from ldm.files import read_json
from ldm.images import from_uint8, to_uint8
from ldm.study import classifier
from ldm.train.classifier import predict, train
from ldm.train.classifier_images import Decoded, keep_decoded, labelled_pixels
from ldm.vae import AutoencoderKL

CPU = torch.device("cpu")
MODEL = Path(__file__).parents[2] / "weights" / "phantom.safetensors"


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return pipeline.load(MODEL).vae


def test_images_are_decoded_once(parts: tuple[LabelledImages, LabelledImages], tmp_path: Path) -> None:
    """And what is kept is what is decoded, as the folder was told to be read; afterwards it is gone."""
    images = replace(parts[0], reading=Reading(invert=True))
    kept = keep_decoded(images, SIZE, tmp_path / "kept")
    assert kept is not None
    for i in (0, len(images) - 1):
        assert torch.equal(Decoded(images, SIZE, kept)[i][0], Decoded(images, SIZE)[i][0])
    plain = keep_decoded(parts[0], SIZE, tmp_path / "kept")
    assert plain is not None
    assert (plain == 255 - np.asarray(kept)).all()
    out, device = tmp_path / "x.safetensors", CPU
    once, anew = (train(*parts, TINY, out, device, cached=cached) for cached in (True, False))
    assert once.report["validation_loss"] == anew.report["validation_loss"]
    assert not (tmp_path / "x.decoded").exists()


def test_a_folder_that_does_not_fit_on_the_disk_is_decoded_anew(
    parts: tuple[LabelledImages, LabelledImages], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert keep_decoded(parts[0], 1_000_000, tmp_path) is None
    assert "images are decoded in every epoch" in caplog.text


def test_through_an_autoencoder_every_image_is_there_twice(
    parts: tuple[LabelledImages, LabelledImages], vae: AutoencoderKL, tmp_path: Path
) -> None:
    images = parts[0].select(range(20))  # more than one call of the autoencoder takes
    both, own = labelled_pixels(images, SIZE, tmp_path, vae=vae), Decoded(images, SIZE)
    assert len(both) == 2 * len(images)  # type: ignore[arg-type]
    for i in range(len(images)):
        assert torch.equal(both[i][0], own[i][0])
        torch.testing.assert_close(both[len(images) + i][1], own[i][1], equal_nan=True)
    seen = torch.stack([own[i][0] for i in range(16)])  # as it is called, for another batch moves last bits
    with torch.no_grad():
        expected = to_uint8(vae.decode(vae.encode(from_uint8(seen)).mean))
    assert all(np.array_equal(both[len(images) + i][0], expected[i]) for i in range(16))
    assert not np.array_equal(expected, seen)


def test_what_another_autoencoder_returned_is_not_taken_for_this_ones(
    parts: tuple[LabelledImages, LabelledImages], vae: AutoencoderKL, tmp_path: Path
) -> None:
    """A run that was stopped leaves its files, and may be begun anew through another model."""
    few, other = parts[1].select(range(2)), copy.deepcopy(vae)
    torch.nn.init.zeros_(other.post_quant_conv.weight)
    first, second = (labelled_pixels(few, SIZE, tmp_path, vae=one) for one in (vae, other))
    assert torch.equal(first[0][0], second[0][0])
    assert not torch.equal(first[2][0], second[2][0])


def test_an_autoencoder_needs_images_that_are_kept(
    parts: tuple[LabelledImages, LabelledImages], vae: AutoencoderKL, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="--no-cache or a full disk forbids"):
        labelled_pixels(parts[0], SIZE, None, vae=vae)
    with pytest.raises(ValueError, match="--no-cache or a full disk forbids"):
        labelled_pixels(parts[0], 1_000_000, tmp_path, vae=vae)


def test_the_network_sees_enlarged_images(parts: tuple[LabelledImages, LabelledImages], tmp_path: Path) -> None:
    """In training, where it is validated, and by whoever loads the file."""
    out = tmp_path / "x.safetensors"
    sides = set()
    trained = train(*parts, replace(TINY, seen_size=48, epochs=1), out, CPU)
    trained.network.register_forward_pre_hook(lambda _, inputs: sides.add(inputs[0].shape[-1]))
    classifier.save(out, trained)
    again = classifier.load(out)
    images = from_uint8(torch.stack([Decoded(parts[1], SIZE)[i][0] for i in range(4)]))
    large = F.interpolate(images, size=(48, 48), mode="bilinear")
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (trained.mean, trained.std))
    expected = trained.network((large * 0.5 + 0.5 - mean) / std).sigmoid()
    for one in (trained, again):
        torch.testing.assert_close(one.probabilities(images), expected, rtol=1e-4, atol=1e-5)
    assert sides == {48}
    with pytest.raises(ValueError, match=r"expected \(B, 3, 32, 32\)"):
        again.probabilities(large)


def test_the_command(chest: Path, vae: AutoencoderKL, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both tests are in the report, and `eval` repeats either."""
    out, scores = tmp_path / "x.safetensors", tmp_path / "scores.json"
    train_it = ["classify", "train", chest, "--out", out, "--model", "test_efficientnet", "--size", SIZE, "--epochs", 1]
    options = ["--batch", 16, "--from-scratch", "--through", MODEL, "--enlarge", 48]
    assert cli.main([str(word) for word in [*train_it, *options]]) == 0
    assert "as the autoencoder of phantom.safetensors returns them" in capsys.readouterr().out
    report = classifier.load(out).report
    assert report["training"]["seen_size"] == 48  # type: ignore[index]
    assert len(report["training"]["through"]) == 64  # type: ignore[index]
    for option, part in (([], "test"), (["--through", MODEL], "test_through")):
        command = ["classify", "eval", out, chest, "--out", scores, *option]
        assert cli.main([str(word) for word in command]) == 0
        assert read_json(scores)["scores"] == report[part]
    assert report["test"] != report["test_through"]


def test_predictions_through_an_autoencoder(
    parts: tuple[LabelledImages, LabelledImages], vae: AutoencoderKL, tmp_path: Path
) -> None:
    trained = train(*parts, replace(TINY, epochs=1), tmp_path / "x.safetensors", CPU)
    few = parts[1].select(range(5))
    both = labelled_pixels(few, SIZE, tmp_path / "kept", vae=vae)
    expected = trained.probabilities(from_uint8(torch.stack([both[5 + i][0] for i in range(5)])))
    np.testing.assert_allclose(predict(trained, few, vae=vae), expected.numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--enlarge", "32"), "--enlarge: got 32, expected more than --size, which is 32"),
        (("--through", str(MODEL), "--no-cache"), "--through: not with --no-cache"),
        (("--through", str(MODEL), "--size", "36"), "takes images of a multiple of 8, but --size is 36"),
        (("--through", "none.safetensors"), "none.safetensors"),
    ],
)
def test_what_is_refused(
    chest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], complaint: str
) -> None:
    out = tmp_path / "x.safetensors"
    command = ["classify", "train", str(chest), "--out", str(out), "--size", "32", "--from-scratch", *options]
    assert cli.main(command) == 2
    assert complaint in capsys.readouterr().err
    assert not out.exists()
