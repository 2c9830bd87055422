"""`ldm invert` and `ldm traverse --image`, run as a user runs them, on a tiny random model."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from ldm_tools.cli import main
from PIL import Image
from safetensors.torch import load_file
from skimage.metrics import peak_signal_noise_ratio
from tiny_model import write_tiny_model

import ldm
from ldm.conditioning import constant
from ldm.guidance import guided
from ldm.samplers import ddim
from ldm.traversal import real_images, sampling
from ldm.traversal.inversion import fixed_point_inversion

PROMPT = "a chest"
# A random network in a few large steps hardly contracts, so a change of 1e-5 can be a hundred times that from the fixed
# point; the naive inversion is off by 1.
SETTLED = 1e-2


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


def picture(path: Path, seed: int, size: tuple[int, int] = (16, 16)) -> Path:
    """An image file (width, height) of random pixels; the ending chooses the format."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def number(image: Path) -> int:
    return int(hashlib.sha256(image.read_bytes()).hexdigest()[:8], 16)


def name(image: Path) -> str:
    return f"seed{number(image):04d}"


def invert(weights: Path, out: Path, *options: object) -> int:
    fixed = ["--weights", weights, "--prompt", PROMPT, "--device", "cpu", "--steps", "4", "--out", out]
    return main(["invert", *map(str, (*fixed, *options))])


def traverse(weights: Path, out: Path, *options: object) -> int:
    fixed = ["--weights", weights, "--neutral", PROMPT, "--style", "effusion=a chest with effusion", "--device", "cpu"]
    fast = ["--steps", "6", "--swap-steps", "2,4", "--bezier-points", "3", "--out", out]
    return main(["traverse", *map(str, (*fixed, *fast, *options))])


def record(out: Path) -> dict:
    return json.loads((out / "run.json").read_text())


# ---- ldm invert ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["naive", "fixed-point", "edict"])
def test_invert_writes_what_it_promises(weights: Path, tmp_path: Path, method: str) -> None:
    first, second = picture(tmp_path / "a.png", 0), picture(tmp_path / "b.bmp", 1)
    out = tmp_path / "out"
    assert invert(weights, out, first, second, "--method", method) == 0
    latents = load_file(out / "latents.safetensors")
    found = record(out)
    assert (found["method"], found["guidance"], found["prompt"]) == (method, 1.0, PROMPT)
    assert [entry["seed"] for entry in found["images"]] == sorted([number(first), number(second)])
    for entry in found["images"]:
        image = {number(first): first, number(second): second}[entry["seed"]]
        assert (entry["file"], entry["sha256"]) == (str(image), hashlib.sha256(image.read_bytes()).hexdigest())
        x_0, back = latents[f"{name(image)}/encoded"], latents[f"{name(image)}/retraced"]
        assert entry["round_trip_error"] == pytest.approx(float((back - x_0).norm() / x_0.norm()))
        assert entry["noise_std"] == pytest.approx(float(latents[f"{name(image)}/x_T"].std()))
        assert (f"{name(image)}/y_T" in latents) == (method == "edict")
        pictures = {of: np.array(Image.open(out / "images" / name(image) / f"{of}.png")) for of in
                    ("original", "encoded", "retraced")}  # fmt: skip
        assert np.array_equal(pictures["original"], np.array(Image.open(image)))
        assert entry["psnr_db"] == pytest.approx(peak_signal_noise_ratio(pictures["original"], pictures["retraced"]))
        assert len(list((out / "images" / name(image)).iterdir())) == 3  # noises are not decoded
    assert Image.open(out / "comparison.png").width > 4 * 16
    assert not list(out.rglob("*.partial"))
    assert not (out / "partial").exists()


def test_images_that_are_not_square_are_taken_as_they_are(weights: Path, tmp_path: Path) -> None:
    image = picture(tmp_path / "a.png", 0, size=(32, 16))
    out = tmp_path / "inverted"
    assert invert(weights, out, image, "--size", "32x16") == 0
    assert load_file(out / "latents.safetensors")[f"{name(image)}/encoded"].shape == (4, 8, 16)
    original = Image.open(out / "images" / name(image) / "original.png")
    assert np.array_equal(np.array(original), np.array(Image.open(image)))  # neither squashed nor turned
    out = tmp_path / "traversed"
    assert traverse(weights, out, "--image", image, "--size", "32x16") == 0
    assert Image.open(out / "images" / name(image) / "effusion" / "s02.png").size == (32, 16)


def test_the_noise_is_that_of_the_library_and_leads_back(weights: Path, tmp_path: Path) -> None:
    image = picture(tmp_path / "a.png", 0)
    assert invert(weights, tmp_path / "out", image) == 0
    latents = load_file(tmp_path / "out" / "latents.safetensors")
    sd = ldm.load(weights)
    pixels = torch.from_numpy(np.array(Image.open(image))).permute(2, 0, 1)[None].float() / 127.5 - 1
    x_0 = sd.encode_image(pixels)
    assert torch.equal(latents[f"{name(image)}/encoded"], x_0[0])
    eps_fn = guided(sd.unet, constant(sd.encode_prompts([PROMPT]), 4), 1)
    with torch.no_grad():
        *_, up = fixed_point_inversion(eps_fn, x_0, sd.schedule, 4)
        *_, down = ddim(eps_fn, up.x_t, sd.schedule, 4)
    assert torch.equal(latents[f"{name(image)}/x_T"], up.x_t[0])
    assert torch.equal(latents[f"{name(image)}/retraced"], down.x_prev[0])
    assert record(tmp_path / "out")["images"][0]["round_trip_error"] < SETTLED


@pytest.mark.parametrize("method", ["fixed-point", "edict"])
def test_an_image_does_not_depend_on_the_others(weights: Path, tmp_path: Path, method: str) -> None:
    images = [picture(tmp_path / f"{i}.png", i) for i in range(2)]
    options = ["--method", method, "--guidance", "2"]
    assert invert(weights, tmp_path / "alone", images[1], *options, "--max-batch", "1") == 0
    assert invert(weights, tmp_path / "among", *images[::-1], *options, "--max-batch", "1") == 0
    assert invert(weights, tmp_path / "batch", *images, *options) == 0
    alone, among, batch = (load_file(tmp_path / run / "latents.safetensors") for run in ("alone", "among", "batch"))
    for key, latent in alone.items():
        assert torch.equal(latent, among[key]), key
        # Float32 sums of another order; a fixed point is only settled to 1e-5 a step.
        torch.testing.assert_close(latent, batch[key], rtol=1e-3, atol=1e-3)


def test_an_interrupted_inversion_goes_on_and_a_finished_one_grows(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [picture(tmp_path / f"{i}.png", i) for i in range(3)]
    assert invert(weights, tmp_path / "whole", *images, "--max-batch", "1") == 0

    inner, calls = real_images.invert, []

    def second_call_fails(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return inner(*args, **kwargs)

    monkeypatch.setattr(real_images, "invert", second_call_fails)
    cut = tmp_path / "cut"
    assert invert(weights, cut, *images[:2], "--max-batch", "1") == 1
    monkeypatch.undo()
    assert not (cut / "run.json").exists()
    assert invert(weights, cut, *images[:2], "--max-batch", "1") == 0
    assert len(record(cut)["images"]) == 2
    finished = (cut / "run.json").read_bytes()
    assert invert(weights, cut, *images[:2], "--max-batch", "1") == 0
    assert (cut / "run.json").read_bytes() == finished
    assert invert(weights, cut, images[2], "--max-batch", "1") == 0
    assert (cut / "latents.safetensors").read_bytes() == (tmp_path / "whole" / "latents.safetensors").read_bytes()
    assert record(cut)["images"] == record(tmp_path / "whole")["images"]


def test_fit_and_size(weights: Path, tmp_path: Path) -> None:
    image = picture(tmp_path / "wide.png", 0, (40, 20))
    assert invert(weights, tmp_path / "out", image, "--fit", "pad", "--size", "32") == 0
    original = np.array(Image.open(tmp_path / "out" / "images" / name(image) / "original.png"))
    assert original.shape == (32, 32, 3)
    assert (original[:8] == 0).all()
    assert original[8:24].any()


def test_what_is_lost_is_said(weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image = picture(tmp_path / "a.png", 0)
    assert invert(weights, tmp_path / "fine", image) == 0
    assert "a.png: lost" not in caplog.text  # of a tiny model the autoencoder alone loses it, which is said, too
    assert invert(weights, tmp_path / "lost", image, "--method", "naive", "--steps", "2", "--guidance", "300") == 0
    assert "a.png: lost" in caplog.text
    assert record(tmp_path / "lost")["images"][0]["round_trip_error"] > real_images.LOST


def refused(capsys: pytest.CaptureFixture[str], command: str, message: str) -> None:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"ldm {command}:")]
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", " "], "prompt: none given"),
        (["--steps", "0"], "steps: expected 1..1000"),
        (["--guidance", "inf"], "guidance: expected a finite number"),
        (["--size", "17"], "--size: got '17'"),
        (["--max-batch", "0"], "--max-batch"),
        (["--weights", "nowhere.safetensors"], "nowhere.safetensors"),
    ],
)
def test_bad_options_are_refused(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert invert(weights, tmp_path / "out", picture(tmp_path / "a.png", 0), *options) == 2
    refused(capsys, "invert", message)
    assert not (tmp_path / "out").exists()


def test_bad_images_are_refused_before_anything_is_written(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fine = picture(tmp_path / "fine.png", 0)
    text, cut, copy = tmp_path / "text.png", tmp_path / "cut.png", tmp_path / "copy.png"
    text.write_text("no image")
    cut.write_bytes(fine.read_bytes()[:200])
    copy.write_bytes(fine.read_bytes())
    for bad, message in [
        ([tmp_path / "missing.png"], "missing.png"),
        ([tmp_path], "is a folder, expected an image file"),
        ([text], "cannot identify image file"),
        ([cut], "cut.png: "),
        ([copy], "hold the same bytes"),
    ]:
        assert invert(weights, tmp_path / "out", fine, *bad) == 2
        refused(capsys, "invert", message)
        assert not (tmp_path / "out").exists()


def test_a_folder_of_other_settings_or_of_another_image_is_refused(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, out = picture(tmp_path / "a.png", 0), tmp_path / "out"
    assert invert(weights, out, image) == 0
    before = (out / "latents.safetensors").read_bytes()
    assert invert(weights, out, image, "--method", "naive") == 2
    refused(capsys, "invert", "method was fixed-point, is naive")
    of_another = record(out)  # whose hash begins alike
    of_another["images"][0] |= {"sha256": of_another["images"][0]["sha256"][:8] + "0" * 56, "file": "b.png"}
    (out / "run.json").write_text(json.dumps(of_another))
    assert invert(weights, out, image) == 2
    refused(capsys, "invert", "has the number of b.png, another image")
    assert (out / "latents.safetensors").read_bytes() == before


# ---- ldm traverse --image --------------------------------------------------------------------------


def test_a_traversal_starts_from_the_inverted_image_and_retraces_it(weights: Path, tmp_path: Path) -> None:
    images, out = [picture(tmp_path / f"{i}.png", i) for i in range(2)], tmp_path / "out"
    assert traverse(weights, out, "--image", *images, "--guidance", "7.5") == 0
    found, latents = record(out), load_file(out / "latents.safetensors")
    assert (found["negative"], found["inversion"], found["start"]) == (PROMPT, "fixed-point", "images")
    assert found["seeds"] == [entry["seed"] for entry in found["images"]] == sorted(map(number, images))
    for entry, image in zip(found["images"], sorted(images, key=number), strict=True):
        assert entry["sha256"] == hashlib.sha256(image.read_bytes()).hexdigest()
        x_0, neutral = latents[f"{name(image)}/encoded"], latents[f"{name(image)}/neutral"]
        assert (neutral - x_0).norm() / x_0.norm() < SETTLED
        assert not torch.allclose(latents[f"{name(image)}/effusion/s02"], x_0, atol=1e-2)
        for of in ("original", "encoded", "neutral", "effusion/s02", "effusion/bezier_02"):
            assert (out / "images" / name(image) / f"{of}.png").exists()
    assert (out / "comparison.png").exists()
    assert (out / "figure.png").exists()


def test_a_traversal_of_images_is_continued_grown_and_not_mixed_with_noise(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [picture(tmp_path / f"{i}.png", i) for i in range(2)]
    assert traverse(weights, tmp_path / "whole", "--image", *images, "--max-batch", "1") == 0

    inner, calls = sampling.traverse_tree, []

    def second_call_fails(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return inner(*args, **kwargs)

    monkeypatch.setattr(sampling, "traverse_tree", second_call_fails)
    cut = tmp_path / "cut"
    assert traverse(weights, cut, "--image", *images, "--max-batch", "1") == 1
    monkeypatch.undo()
    assert traverse(weights, cut, "--image", images[0], "--max-batch", "1") == 0
    assert traverse(weights, cut, "--image", images[1], "--max-batch", "1") == 0
    assert (cut / "latents.safetensors").read_bytes() == (tmp_path / "whole" / "latents.safetensors").read_bytes()
    assert record(cut)["images"] == record(tmp_path / "whole")["images"]

    capsys.readouterr()
    assert traverse(weights, cut, "--seeds", "1", "--negative", PROMPT) == 2
    refused(capsys, "traverse", "start was images, is (absent)")
    assert traverse(weights, cut, "--image", images[0], "--inversion", "naive") == 2
    refused(capsys, "traverse", "inversion was fixed-point, is naive")


def test_without_images_latents_alone_are_measured(weights: Path, tmp_path: Path) -> None:
    image = picture(tmp_path / "a.png", 0)
    assert traverse(weights, tmp_path / "out", "--image", image, "--no-images", "--guidance", "1") == 0
    (entry,) = record(tmp_path / "out")["images"]
    assert "psnr_db" not in entry
    assert entry["round_trip_error"] < SETTLED


def test_another_negative_prompt_is_allowed_and_its_loss_said(
    weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = picture(tmp_path / "a.png", 0)
    assert traverse(weights, tmp_path / "out", "--image", image, "--negative", "") == 0
    assert "will not retrace the original" in caplog.text
    assert record(tmp_path / "out")["negative"] == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "0-3"], "--seeds: got '0-3' beside --image"),
        (["--eta", "1"], "ddim with eta 0"),
        (["--sampler", "euler"], "by ddim with eta 0, naive or fixed-point, got euler"),
    ],
)
def test_what_no_image_can_start_is_refused(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    image = picture(tmp_path / "a.png", 0)
    assert traverse(weights, tmp_path / "out", "--image", image, *options) == 2
    refused(capsys, "traverse", message)
    assert not (tmp_path / "out").exists()


def test_a_negative_of_twelve_bits_is_read_as_told(weights, tmp_path, caplog):
    """Inverted and scaled by the bits that it uses, which is said; run.json remembers what was not as usual."""
    values = np.random.default_rng(0).integers(0, 4096, (16, 16)).astype(np.uint16)
    values[0, 0] = 4095
    Image.fromarray(values).save(tmp_path / "a.png")
    assert invert(weights, tmp_path / "out", tmp_path / "a.png", "--invert") == 0
    original = Image.open(tmp_path / "out/images" / name(tmp_path / "a.png") / "original.png").convert("L")
    np.testing.assert_array_equal(np.asarray(original), 255 - np.rint(values / 4095 * 255).astype(int))
    assert "a.png: grey: 12 of 16 bits are used, 0 to 4095 became 0 to 255" in caplog.text
    record = json.loads((tmp_path / "out/run.json").read_text())
    assert record["reading"] == {"invert": True, "grey_range": "bits", "background": 0}
    assert invert(weights, tmp_path / "out", tmp_path / "a.png") == 2  # another reading of it is another run
    assert traverse(weights, tmp_path / "walk", "--image", tmp_path / "a.png", "--range", "type") == 0
    assert json.loads((tmp_path / "walk/run.json").read_text())["reading"]["grey_range"] == "type"
