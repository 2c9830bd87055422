"""The commands generate, traverse and demo, run as a user runs them, on a tiny random model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from ldm_tools.cli import main
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import ldm
from ldm import checkpoint
from ldm.clip import CLIPTextEncoder
from ldm.config import CLIPConfig, UNetConfig, VAEConfig
from ldm.images import load_pixels
from ldm.traversal import bezier, figures, sampling
from ldm.traversal.plan import Traversal, parse_integers
from ldm.unet import UNet
from ldm.vae import AutoencoderKL

STYLE = ["--style", "effusion=a chest with effusion", "--style", "devices=a chest with devices"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model of random weights, 16 x 16 pixels, in the single-file layout."""
    torch.manual_seed(0)
    parts = {
        "clip": CLIPTextEncoder(CLIPConfig(width=16, layers=1, heads=2, mlp_width=32)),
        "vae": AutoencoderKL(VAEConfig(widths=(8, 8), resnets_per_level=1, norm_groups=4)),
        "unet": UNet(
            UNetConfig(
                sample_size=8,
                widths=(16, 16),
                resnets_per_level=1,
                attention=(True, False),
                heads=2,
                context_width=16,
                norm_groups=8,
            )
        ),
    }
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    checkpoint.save(path, parts)
    return path


def traverse(weights: Path, out: Path, *options: str) -> int:
    arguments = ["traverse", "--weights", str(weights), "--neutral", "a chest", *STYLE, "--device", "cpu"]
    fast = ["--steps", "10", "--swap-steps", "2,5,8", "--bezier-points", "5", "--guidance", "2"]
    return main([*arguments, *fast, "--out", str(out), *options])


def test_traverse_writes_what_it_promises(weights: Path, tmp_path: Path) -> None:
    assert traverse(weights, tmp_path, "--seeds", "0,3") == 0
    record = json.loads((tmp_path / "run.json").read_text())
    # Each style forks after 2, 5 and 8 of 10 steps: 8 + 5 + 2 rows, and the neutral path's 10.
    assert record["unet_rows"] == record["unet_rows_this_run"] == 2 * (10 + 2 * (8 + 5 + 2))
    assert record["unet_rows_separate"] == 2 * 10 * (1 + 2 * 3)
    assert record["seeds"] == [0, 3]
    assert (record["backend"], record["dtype"]) == ("torch", "float32")
    assert record["weights_sha256"] == checkpoint.sha256(weights)
    assert record["seconds"] > 0

    latents = load_file(tmp_path / "latents.safetensors")
    for seed in ("seed0000", "seed0003"):
        curve = latents[f"{seed}/effusion/bezier"]
        assert curve.shape == (5, 4, 8, 8)
        # B(0) is the neutral latent and B(1) the strongest edit: the end points of a Bezier curve are exact.
        assert torch.equal(curve[0], latents[f"{seed}/neutral"])
        assert torch.equal(curve[-1], latents[f"{seed}/effusion/s02"])
        control = torch.stack(
            [latents[f"{seed}/{name}"] for name in ("neutral", *(f"effusion/s0{s}" for s in (8, 5, 2)))]
        )
        assert torch.equal(curve, bezier.evaluate(control, torch.linspace(0, 1, 5)))
        for name in ("neutral", "effusion/s02", "devices/s08", "devices/bezier_00", "devices/bezier_04"):
            assert Image.open(tmp_path / "images" / seed / f"{name}.png").size == (16, 16)
    assert Image.open(tmp_path / "figure.png").width > 4 * 16
    assert Image.open(tmp_path / "curve.gif").n_frames == 5 + 3  # there and back
    assert not list(tmp_path.rglob("*.partial"))


def test_images_are_the_decoded_latents(weights: Path, tmp_path: Path) -> None:
    traverse(weights, tmp_path)
    sd = ldm.load(weights)
    latent = load_file(tmp_path / "latents.safetensors")["seed0000/devices/s05"]
    expected = ldm.pipeline.to_uint8(sd.decode_latents(latent[None]))[0]
    found = load_pixels(tmp_path / "images/seed0000/devices/s05.png")
    # Decoded in another batch size: sums in another order may cross a rounding boundary, by one grey level.
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1


def test_a_seed_does_not_depend_on_the_others_or_the_batch(weights: Path, tmp_path: Path) -> None:
    traverse(weights, tmp_path / "alone", "--seeds", "3", "--max-batch", "1")
    traverse(weights, tmp_path / "among", "--seeds", "0-3", "--max-batch", "1")
    traverse(weights, tmp_path / "batch", "--seeds", "2-3", "--max-batch", "64")
    alone, among, batch = (load_file(tmp_path / run / "latents.safetensors") for run in ("alone", "among", "batch"))
    for key, latent in alone.items():
        assert torch.equal(latent, among[key]), key
        # Float32 sums of another order: 1e-7 a step, which ten steps of a random network and guidance 2 amplify.
        torch.testing.assert_close(latent, batch[key], rtol=1e-4, atol=1e-4)


def test_an_interrupted_run_goes_on_where_it_stopped(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traverse(weights, tmp_path / "whole", "--seeds", "0-2", "--max-batch", "1")

    inner, calls = sampling.traverse_tree, []

    def second_call_fails(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return inner(*args, **kwargs)

    monkeypatch.setattr(sampling, "traverse_tree", second_call_fails)
    assert traverse(weights, tmp_path / "cut", "--seeds", "0-2", "--max-batch", "1") == 1
    monkeypatch.undo()
    assert traverse(weights, tmp_path / "cut", "--seeds", "0-2", "--max-batch", "1") == 0

    record = json.loads((tmp_path / "cut" / "run.json").read_text())
    assert record["unet_rows_this_run"] == record["unet_rows"] * 2 // 3  # the first seed was there already
    whole, cut = (load_file(tmp_path / run / "latents.safetensors") for run in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    for path in (tmp_path / "whole" / "images").rglob("*.png"):
        assert path.read_bytes() == (tmp_path / "cut" / path.relative_to(tmp_path / "whole")).read_bytes()


def test_a_folder_of_other_settings_is_refused(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert traverse(weights, tmp_path) == 0
    before = (tmp_path / "latents.safetensors").read_bytes()
    assert traverse(weights, tmp_path, "--guidance", "3") == 2
    assert "guidance" in capsys.readouterr().err
    assert (tmp_path / "latents.safetensors").read_bytes() == before


def test_a_finished_run_is_left_alone_and_can_grow(weights: Path, tmp_path: Path) -> None:
    assert traverse(weights, tmp_path, "--seeds", "1") == 0
    before = (tmp_path / "run.json").read_bytes()
    assert traverse(weights, tmp_path, "--seeds", "1") == 0
    assert (tmp_path / "run.json").read_bytes() == before
    assert traverse(weights, tmp_path, "--seeds", "0") == 0
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["seeds"] == [0, 1]  # as in latents.safetensors
    assert record["unet_rows"] == 2 * record["unet_rows_this_run"]


def test_images_of_other_latents_are_not_kept(weights: Path, tmp_path: Path) -> None:
    traverse(weights, tmp_path)
    image = tmp_path / "images/seed0000/effusion/s02.png"
    before = image.read_bytes()
    (tmp_path / "latents.safetensors").unlink()
    assert traverse(weights, tmp_path, "--guidance", "7") == 0
    assert image.read_bytes() != before


def test_kept_steps_are_saved(weights: Path, tmp_path: Path) -> None:
    traverse(weights, tmp_path, "--keep", "x_t,x0_pred")
    latents = load_file(tmp_path / "latents.safetensors")
    assert latents["seed0000/neutral/x0_pred"].shape == (10, 4, 8, 8)
    assert latents["seed0000/effusion/s08/x_t"].shape == (2, 4, 8, 8)  # its own steps
    assert torch.equal(latents["seed0000/effusion/s08/x_t"][-1], latents["seed0000/effusion/s08"])


def test_generate(weights: Path, tmp_path: Path) -> None:
    options = ["--prompt", "a chest", "--seeds", "0-4", "--steps", "4", "--size", "32x16", "--guidance", "1"]
    assert main(["generate", "--weights", str(weights), *options, "--out", str(tmp_path)]) == 0
    assert Image.open(tmp_path / "images/seed0004/image.png").size == (32, 16)
    assert json.loads((tmp_path / "run.json").read_text())["unet_rows"] == 5 * 4
    with safe_open(tmp_path / "latents.safetensors", framework="pt") as file:
        assert "seed0000/image" in file.keys()  # noqa: SIM118  (not a dict)
    assert (tmp_path / "contact_sheet.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "3-1"], "--seeds"),
        (["--seeds", "one"], "--seeds"),
        (["--swap-steps", "5,11"], "11"),
        (["--swap-steps", "10", "--indexing", "authors"], "10"),
        (["--bezier-points", "1"], "bezier points"),
        (["--style", "no-prompt"], "--style"),
        (["--style", "../up=a chest"], "names a folder"),
        (["--size", "17"], "multiples of 4 pixels; the nearest are 16 or 20 for 17"),
        (["--size", "16x18"], "the nearest are 16 or 20 for 18"),
        (["--keep", "noise"], "keep"),
        (["--keep", "x_t,x_t"], "keep"),
        (["--guidance", "nan"], "guidance"),
        (["--steps", "1001"], "steps"),
        (["--max-batch", "0"], "--max-batch"),
        (["--seeds", "0-999999999999"], "--seeds"),
        (["--seeds", "4294967296"], "seeds"),
        (["--style", "Effusion=a chest"], "case"),
        (["--eta", "2"], "eta"),
        (["--device", "nowhere"], "--device"),
        (["--weights", "nowhere.safetensors"], "nowhere.safetensors"),
    ],
)
def test_bad_options_end_in_one_line(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert traverse(weights, tmp_path / "out", *options) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ldm traverse:")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "out").exists()


def test_parse_integers() -> None:
    assert parse_integers("0-3,8", "--seeds") == (0, 1, 2, 3, 8)
    with pytest.raises(ValueError, match="--seeds: got ''"):
        parse_integers("", "--seeds")


def test_a_style_cannot_be_called_neutral() -> None:
    with pytest.raises(ValueError, match="neutral"):
        Traversal(neutral="a", styles={"neutral": "b"}, seeds=(0,))


def test_difference_is_white_where_nothing_changed() -> None:
    neutral = np.full((2, 2, 3), 100, np.uint8)
    changed = neutral.copy()
    changed[0, 0], changed[1, 1] = 150, 50
    picture = figures.difference(changed, neutral)
    assert (picture[0, 1] == 255).all()
    assert picture[0, 0, 0] > picture[0, 0, 2]  # brighter: red
    assert picture[1, 1, 2] > picture[1, 1, 0]  # darker: blue
