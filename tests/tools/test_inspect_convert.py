"""The commands inspect and convert: what they print, and how they fail."""

import argparse
import json

import pytest
import torch
from ldm_tools import convert, inspect
from safetensors.torch import load_file, save_file
from tiny_checkpoints import manifest, single, write_folder, write_single

from ldm.checkpoint import CheckpointError, KeysDoNotFit, sha256
from ldm.checkpoint.container import Header, LazyTensor


def call(command, *arguments):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args([str(argument) for argument in arguments]))


def test_inspect_tells_the_published_file_from_its_header(tmp_path, capsys):
    # The published header over a hole: 4.3 GB that take no room, so hashing is left out.
    rows = manifest("single_file_v1-5-pruned-emaonly")
    tensors = {
        key: LazyTensor(key, tuple(row["shape"]), getattr(torch, row["dtype"]), lambda copy: torch.empty(0))
        for key, row in rows.items()
    }
    header = Header.build(tensors, {"format": "pt"})
    path = tmp_path / "v1-5-pruned-emaonly.safetensors"
    with path.open("wb") as file:
        file.write(len(header.text).to_bytes(8, "little") + header.text)
        file.truncate(header.file_bytes)
    call(inspect, path, "--no-hash")
    printed = capsys.readouterr().out
    assert f"{path}: SD1.5 single file\n" in printed
    assert "unet       859,520,964 parameters in 686 tensors of float32" in printed
    assert "vae         83,653,863 parameters in 248 tensors of float32" in printed
    assert "clip       123,060,480 parameters in 196 tensors of float32" in printed  # position_ids: no parameters
    assert "1130 used, 15 known and not needed, 0 missing, 0 unexpected, 0 of wrong shape" in printed
    assert "sha256" not in printed


def test_inspect_as_json(tmp_path, capsys):
    path = write_single(tmp_path / "a.safetensors", ema=True)
    call(inspect, path, "--json")
    facts = json.loads(capsys.readouterr().out)
    assert facts["fits"]
    assert facts["is"] == "SD1.5 single file, with plain and EMA weights"
    assert facts["files"][0]["sha256"] == sha256(path)
    assert facts["files"][0]["bytes"] == path.stat().st_size
    assert set(facts["parts"]) == {"clip", "vae", "unet", "unet_ema"}
    assert facts["parts"]["unet"]["config"]["attention"] == [True, False]
    assert facts["parts"]["unet"]["dtypes"] == {"float32": facts["parts"]["unet"]["tensors"]}
    assert len(facts["keys"]["used"]) + len(facts["keys"]["unneeded"]) == len(single(ema=True))


def test_inspect_a_folder_with_every_key(tmp_path, capsys):
    folder = write_folder(tmp_path / "a", old_names=True)
    call(inspect, folder, "--keys")
    printed = capsys.readouterr().out
    assert "diffusers folder (old autoencoder names)" in printed
    query = "encoder.mid_block.attentions.0"
    assert f"    {query}.query.weight [64, 64] float32 -> vae.{query}.to_q.weight" in printed
    for part in ("unet", "vae", "text_encoder"):
        assert printed.count(f"{folder / part}/") == 1


def test_inspect_says_what_does_not_fit_and_fails(tmp_path, capsys):
    path = tmp_path / "a.safetensors"
    tensors = {**single(), "first_stage_model.encoder.conv_out.bias": torch.zeros(3), "optimizer": torch.zeros(1)}
    tensors.pop("model.diffusion_model.out.2.bias")
    save_file(tensors, path)
    with pytest.raises(KeysDoNotFit, match="1 missing"):
        call(inspect, path)
    printed = capsys.readouterr().out
    assert "missing      unet.conv_out.bias\n" in printed
    assert "unexpected   optimizer\n" in printed
    assert "wrong shape  vae.encoder.conv_out.bias (3,), expected (8,)" in printed
    with pytest.raises(KeysDoNotFit):
        call(inspect, path, "--json")
    assert json.loads(capsys.readouterr().out)["fits"] is False


def test_inspect_refuses_what_is_no_model(tmp_path):
    with pytest.raises(CheckpointError, match="no such file or folder"):
        call(inspect, tmp_path / "nowhere")


def test_convert_there_and_back(tmp_path, capsys):
    source = write_single(tmp_path / "a.safetensors")
    folder, back = tmp_path / "folder", tmp_path / "back.safetensors"
    call(convert, source, folder, "--layout", "folder", "--vae-names", "old")
    assert (folder / "unet" / "config.json").exists()
    call(convert, folder, back, "--layout", "single")
    printed = capsys.readouterr().out
    assert f"{back}: {back.stat().st_size:,} bytes" in printed
    assert torch.equal(load_file(back)["betas"], single()["betas"])
    assert load_file(back).keys() == single().keys()


def test_convert_to_half_precision(tmp_path):
    source = write_folder(tmp_path / "a")
    call(convert, source, tmp_path / "b.safetensors", "--layout", "single", "--dtype", "fp16")
    assert {tensor.dtype for tensor in load_file(tmp_path / "b.safetensors").values()} == {torch.float16}


def test_convert_keeps_one_set_of_weights_on_request(tmp_path):
    source = write_single(tmp_path / "a.safetensors", ema=True)
    call(convert, source, tmp_path / "b.safetensors", "--layout", "single", "--ema", "ema")
    written, before = load_file(tmp_path / "b.safetensors"), single(ema=True)
    key = "model.diffusion_model.input_blocks.0.0.weight"
    assert torch.equal(written[key], before["model_ema.diffusion_modelinput_blocks00weight"])
    assert "model_ema.diffusion_modelinput_blocks00weight" not in written


def test_convert_overwrites_only_by_force(tmp_path):
    source = write_single(tmp_path / "a.safetensors")
    target = tmp_path / "b.safetensors"
    target.write_bytes(b"mine")
    with pytest.raises(CheckpointError, match="--force"):
        call(convert, source, target, "--layout", "single")
    assert target.read_bytes() == b"mine"
    call(convert, source, target, "--layout", "single", "--force")
    assert target.read_bytes() == source.read_bytes()
