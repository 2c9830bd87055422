"""NaN and Inf: named where they first show, with the tensor they come from, and never a black image."""

import copy
import logging

import pytest
import torch
from ldm_tools.cli import main
from safetensors.torch import load_file, save_file
from tiny_model import write_tiny_model

import ldm
from ldm.checkpoint import CheckpointError, convert, load_parts
from ldm.finite import NotFinite, Watch

BROKEN = {
    "U-Net": "model.diffusion_model.middle_block.0.in_layers.2.weight",
    "text encoder": "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
    "autoencoder": "first_stage_model.decoder.conv_in.weight",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("whole") / "tiny.safetensors")


def broken(whole, path, key, value):
    """A copy of the tiny model's file with one bad number in one tensor."""
    from safetensors import safe_open

    with safe_open(whole, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(whole)
    tensors[key] = tensors[key].clone()
    tensors[key].view(-1)[3] = value
    save_file(tensors, path, metadata=metadata)
    return path


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("network", BROKEN)
def test_one_bad_number_is_named_and_no_image_is_written(whole, tmp_path, network, value, capsys):
    path = broken(whole, tmp_path / "bad.safetensors", BROKEN[network], value)
    out = tmp_path / "out"
    arguments = ["--weights", str(path), "--steps", "3", "--guidance", "2", "--out", str(out)]
    assert main(["generate", "--prompt", "a", *arguments]) == 2
    error = capsys.readouterr().err
    assert f"the {network}'s output is not finite" in error
    assert "1 of its weights are not, the first: " in error
    assert ("at step 0" in error) == (network == "U-Net")
    assert not list(out.rglob("*.png"))


def test_traverse_says_so_too(whole, tmp_path, capsys):
    path = broken(whole, tmp_path / "bad.safetensors", BROKEN["U-Net"], float("nan"))
    prompts = ["--neutral", "a", "--style", "b=c", "--swap-steps", "1,2", "--steps", "3"]
    assert main(["traverse", "--weights", str(path), *prompts, "--out", str(tmp_path / "out")]) == 2
    assert "the U-Net's output is not finite at step 0" in capsys.readouterr().err


def test_inspect_counts_such_tensors(whole, tmp_path, capsys):
    path = broken(whole, tmp_path / "bad.safetensors", BROKEN["U-Net"], float("nan"))
    assert main(["inspect", str(path)]) == 0
    assert f"unet: 1 tensors hold NaN or Inf, the first {BROKEN['U-Net']}" in capsys.readouterr().out
    assert main(["inspect", str(whole)]) == 0
    assert "NaN" not in capsys.readouterr().out


def test_a_weight_beyond_float16_is_not_converted_and_is_said_when_loaded(whole, tmp_path, caplog):
    path = broken(whole, tmp_path / "large.safetensors", BROKEN["U-Net"], 1e5)
    message = r"1 tensors are beyond float16's 65504 and would be Inf, the first unet\.mid_block\.resnets\.0"
    for layout in ("single", "folder"):
        with pytest.raises(CheckpointError, match=message):
            convert(path, tmp_path / "out", layout=layout, dtype=torch.float16)
        assert not (tmp_path / "out").exists()
    convert(path, tmp_path / "bf16.safetensors", layout="single", dtype=torch.bfloat16)
    with caplog.at_level(logging.WARNING):
        load_parts(path, dtype=torch.float16, vae_dtype=torch.float32)
    assert "1 tensors are beyond float16's 65504, the first unet.mid_block.resnets.0.conv1.weight" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        load_parts(path, dtype=torch.bfloat16)
        load_parts(whole, dtype=torch.float16)
    assert caplog.text == ""


def test_sound_weights_that_overflow_are_told_from_broken_ones(whole):
    sd = ldm.load(whole, backend="torch")
    contexts = sd.encode_prompts(["a"])
    far = torch.full((1, *sd.latent_shape), 1e38)
    with pytest.raises(NotFinite, match=r"at step 0, in float32: its weights are, so its input lies far outside"):
        list(sd.sample(contexts, [0], steps=2, guidance_scale=1.0, x_T=far))
    with pytest.raises(NotFinite, match="latents: got NaN or Inf in them"):
        sd.decode_latents(torch.full((1, *sd.latent_shape), torch.nan))


def test_the_first_bad_step_is_kept_until_the_last(whole):
    sd = ldm.load(whole, backend="torch")
    watch = Watch(copy.deepcopy(sd.unet))
    good, bad = torch.zeros(2), torch.tensor([0.0, torch.nan])
    watch(0, good, last=False)
    with pytest.raises(NotFinite, match="at step 1"):
        watch(1, bad, last=False)


def test_a_sound_run_is_watched_without_a_word(whole):
    sd = ldm.load(whole, backend="torch")
    *_, last = sd.sample(sd.encode_prompts(["a"]), [0], steps=3, guidance_scale=2.0)
    assert sd.decode_latents(last.x_prev).isfinite().all()
