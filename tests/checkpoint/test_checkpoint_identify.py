"""What a path holds: the layouts that are read, and one clear line for everything else."""

import json

import pytest
import torch
from safetensors.torch import save_file
from tiny_checkpoints import FORMAT, part, single, write_folder, write_single

from ldm.checkpoint import CheckpointError, identify, load_parts

ANY = torch.zeros(1)
CONV = "model.diffusion_model.input_blocks.0.0.weight"
LAST = "model.diffusion_model.out.2.weight"
CONTEXT = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"
PICKLED = b"\x80\x02}q\x00." + b"\0" * 32
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4265146304\n"


@pytest.mark.parametrize(
    ("write", "description"),
    [
        (lambda path: write_single(path / "a.safetensors"), "SD1.5 single file"),
        (lambda path: write_single(path / "a.safetensors", ema=True), "SD1.5 single file, with plain and EMA weights"),
        (lambda path: write_folder(path / "a"), "diffusers folder (new autoencoder names)"),
        (lambda path: write_folder(path / "a", old_names=True), "diffusers folder (old autoencoder names)"),
        (lambda path: write_folder(path / "a", variant=".fp16"), "diffusers folder (new autoencoder names)"),
    ],
)
def test_known_layouts_are_told_apart(tmp_path, write, description):
    checkpoint = identify(write(tmp_path))
    assert checkpoint.describe() == description
    assert not checkpoint.missing_parts
    assert not checkpoint.unexpected


def test_one_network_is_told_by_its_names(tmp_path):
    for name, words in (("unet", "U-Net"), ("vae", "autoencoder"), ("clip", "text encoder")):
        save_file(part(name), tmp_path / f"{name}.safetensors")
        checkpoint = identify(tmp_path / f"{name}.safetensors")
        assert checkpoint.describe() == f"diffusers-layout file, only {words}"
    unet = {key: tensor for key, tensor in single().items() if key.startswith("model.diffusion_model.")}
    save_file(unet, tmp_path / "prefixed.safetensors")
    assert identify(tmp_path / "prefixed.safetensors").describe() == "SD1.5 single file, only U-Net"


def test_the_folder_of_one_network_is_that_network(tmp_path):
    write_folder(tmp_path / "a", variant=".fp16")
    assert identify(tmp_path / "a" / "unet").missing_parts == ("clip", "vae")


def test_full_precision_goes_before_the_fp16_variant(tmp_path):
    write_folder(tmp_path / "a")
    for folder in ("unet", "vae"):
        name = "diffusion_pytorch_model.fp16.safetensors"
        save_file({key: tensor.half() for key, tensor in part(folder).items()}, tmp_path / "a" / folder / name)
    assert {file.path.name for file in identify(tmp_path / "a").files} == {
        "model.safetensors",
        "diffusion_pytorch_model.safetensors",
    }


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"conditioner.embedders.0.transformer.x": ANY, CONV: ANY}, "SDXL, another architecture"),
        ({"model.diffusion_model.label_emb.0.0.weight": ANY}, "SDXL, another architecture"),
        ({"add_embedding.linear_1.weight": ANY, "conv_in.weight": ANY}, "SDXL, another architecture"),
        ({CONTEXT: torch.zeros(2, 2048)}, "SDXL, its contexts"),
        ({"cond_stage_model.model.ln_final.weight": ANY, CONV: ANY}, "SD2, whose text encoder"),
        ({CONTEXT: torch.zeros(2, 1024)}, "SD2, its contexts are 1024"),
        ({"model.diffusion_model.joint_blocks.0.x": ANY}, "diffusion transformer"),
        ({"double_blocks.0.img_attn.qkv.weight": ANY}, "diffusion transformer"),
        ({"transformer_blocks.0.attn.to_q.weight": ANY}, "diffusion transformer"),
        ({CONV: torch.zeros(8, 9, 3, 3), LAST: torch.zeros(4, 8, 3, 3)}, "an inpainting model, its U-Net takes 9"),
        ({"conv_in.weight": torch.zeros(8, 8, 3, 3), "conv_out.weight": torch.zeros(4, 8, 3, 3)}, "InstructPix2Pix"),
        ({CONV: torch.zeros(8, 6, 3, 3), LAST: torch.zeros(4, 8, 3, 3)}, "another model, its U-Net takes 6"),
        ({"control_model.input_blocks.0.0.weight": ANY}, "a ControlNet"),
        ({"controlnet_cond_embedding.conv_in.weight": ANY, "conv_in.weight": ANY}, "a ControlNet"),
        ({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight": ANY}, "a LoRA"),
        ({"unet.down_blocks.0.attentions.0.to_q.lora_A.weight": ANY}, "a LoRA"),
        ({"down_blocks.0.motion_modules.0.x": ANY}, "a motion module"),
        ({"emb_params": ANY}, "a textual inversion embedding"),
        ({"fc.weight": ANY, "fc.bias": ANY}, r"none of its 2 tensors is SD1.5's \(the first: fc"),
        ({}, "none of its 0 tensors"),
    ],
)  # fmt: skip
def test_other_models_are_refused_by_name(tmp_path, tensors, message):
    path = tmp_path / "a.safetensors"
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata=FORMAT)
    refused(path, message)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.ckpt", b"PK\x03\x04" + b"\0" * 32, "a .ckpt file is a pickle: never read here"),
        ("a.pt", PICKLED, "a .pt file is a pickle"),
        ("a.pth", PICKLED, "a .pth file is a pickle"),
        ("a.safetensors", PICKLED, "a pickle: never read here"),
        ("a.safetensors", b"PK\x03\x04" + b"\0" * 32, "a pickle: never read here"),
        ("a.safetensors", LFS, "Git LFS pointer"),
        ("a.safetensors", b"\n<!DOCTYPE html><html><body>Log in</body></html>", "a web page, not weights"),
        ("a.safetensors", b'{"error": "Repository not found"}', "a text file, not weights"),
        ("a.gguf", b"GGUF\x03\0\0\0" + b"\0" * 32, "a GGUF file"),
        ("a.h5", b"\x89HDF\r\n\x1a\n" + b"\0" * 32, "an HDF5 file"),
        ("a.safetensors", b"", "empty, 0 bytes"),
        ("a.safetensors", bytes(range(1, 200)), "not a safetensors file"),
    ],
)  # fmt: skip
def test_other_formats_are_refused_by_name(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    refused(path, message)


def test_a_pickle_is_never_executed(tmp_path):
    # Unpickling this would call print; whatever reads it for its first bytes only does not.
    path = tmp_path / "a.ckpt"
    path.write_bytes(b"cbuiltins\nexit\n(I3\ntR.")
    refused(path, "a pickle")


def test_nothing_there(tmp_path):
    refused(tmp_path / "nowhere.safetensors", "no such file or folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "an empty folder")


def test_folders_without_a_model_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing here")
    refused(tmp_path, r"none of unet/, vae/, text_encoder/ in this folder \(it has notes.txt\)$")
    write_single(tmp_path / "a.safetensors")
    refused(tmp_path, r"give one of its files: a.safetensors$")


def test_folders_of_other_models_are_refused(tmp_path):
    for folder, message in (("text_encoder_2", "SDXL"), ("transformer", "diffusion transformer")):
        write_folder(tmp_path / folder)
        (tmp_path / folder / folder).mkdir()
        refused(tmp_path / folder, message)


def test_a_missing_part_is_named(tmp_path):
    write_folder(tmp_path / "a")
    vae = tmp_path / "a" / "vae"
    (vae / "diffusion_pytorch_model.safetensors").rename(vae / "diffusion_pytorch_model.bin")
    refused(tmp_path / "a", r"only pickled weights \(diffusion_pytorch_model.bin\)")
    (vae / "diffusion_pytorch_model.bin").unlink()
    refused(tmp_path / "a", r"vae: no diffusion_pytorch_model.safetensors and no variant of it \(it has nothing\)")
    vae.rmdir()
    with pytest.raises(CheckpointError, match=r"but no autoencoder \(no vae/\): give a whole model"):
        load_parts(tmp_path / "a")


@pytest.mark.parametrize(
    ("part_folder", "fields", "message"),
    [
        ("text_encoder", '{"hidden_act": "gelu"}', "hidden_act is 'gelu', SD1.5 has 'quick_gelu'"),
        ("vae", "{broken", "not a configuration"),
    ],
)
def test_a_config_json_that_is_not_sd15s_is_refused(tmp_path, part_folder, fields, message):
    write_folder(tmp_path / "a")
    (tmp_path / "a" / part_folder / "config.json").write_text(fields)
    refused(tmp_path / "a", message)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"ldm.config": json.dumps([1])}, "its metadata 'ldm.config' is no configuration"),
        ({"ldm.header.unet": "{"}, "its header is not one of safetensors"),
    ],
)
def test_broken_metadata_of_our_own_is_refused(tmp_path, metadata, message):
    path = tmp_path / "a.safetensors"
    save_file(single(), path, metadata=metadata)
    refused(path, message)


def refused(path, message):
    """The refusal is one line, of our class, and names the path."""
    with pytest.raises(CheckpointError, match=message) as error:
        identify(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
