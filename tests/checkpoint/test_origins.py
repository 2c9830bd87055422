"""Files as the world's tools write them: each loads and means the same.

The rows of the table in ldm/checkpoint/README.md, in its order: every file is written here, tiny, under the names that
the tool it stands for uses.
"""

from pathlib import Path

import pytest
import torch
from ldm_tools.cli import main
from origin_files import (
    CLIP,
    LOSS,
    REST_OF_CLIP,
    UNET,
    VAE,
    VAE_AVERAGE,
    bare,
    ema_only,
    fit,
    flat_text,
    folder_with,
    made,
    pipeline_file,
    prefixed,
    put,
    sharded_folder,
    shards,
    without,
)
from tiny_checkpoints import TINY, part, single, write_folder, write_single

from ldm.checkpoint import CheckpointError, convert, examine, identify, layouts, load_parts

# name -> (write, how it is described). All load, alone or over a base, with the values that they were given.
LOADED = {
    "CompVis single file": (lambda p: write_single(p / "a.safetensors"), "SD1.5 single file"),
    "CompVis single file with EMA": (
        lambda p: write_single(p / "a.safetensors", ema=True),
        "SD1.5 single file, with plain and EMA weights",
    ),
    "CompVis single file, EMA weights only": (
        lambda p: ema_only(p / "a.safetensors"),
        "SD1.5 single file, EMA weights only",
    ),
    "diffusers folder": (lambda p: write_folder(p / "a"), "diffusers folder (new autoencoder names)"),
    "diffusers folder before 0.18": (
        lambda p: write_folder(p / "a", old_names=True),
        "diffusers folder (old autoencoder names)",
    ),
    "diffusers folder, fp16 variant": (
        lambda p: write_folder(p / "a", variant=".fp16"),
        "diffusers folder (new autoencoder names)",
    ),
    "diffusers folder, bf16 variant": (
        lambda p: write_folder(p / "a", variant=".bf16"),
        "diffusers folder (new autoencoder names)",
    ),
    "diffusers folder, only non_ema U-Net": (
        lambda p: folder_with(p / "a", "unet", "diffusion_pytorch_model.non_ema.safetensors"),
        "diffusers folder (new autoencoder names)",
    ),
    "diffusers folder, sharded": (lambda p: sharded_folder(p / "a"), "diffusers folder (new autoencoder names)"),
    "diffusers folder, text encoder of transformers 5": (
        lambda p: folder_with(p / "a", "clip", tensors=flat_text()),
        "diffusers folder (new autoencoder names)",
    ),
    "diffusers folder, whole CLIP as text encoder": (
        lambda p: folder_with(p / "a", "clip", tensors=part("clip") | REST_OF_CLIP),
        "diffusers folder (new autoencoder names)",
    ),
    "diffusers folder, compiled U-Net": (
        lambda p: folder_with(p / "a", "unet", tensors=prefixed("_orig_mod.", part("unet"))),
        "diffusers folder (new autoencoder names)",
    ),
    "diffusers folder, data-parallel autoencoder": (
        lambda p: folder_with(p / "a", "vae", tensors=prefixed("module.", part("vae"))),
        "diffusers folder (new autoencoder names)",
    ),
    "diffusers folder, autoencoder in CompVis names": (
        lambda p: folder_with(p / "a", "vae", tensors=bare("vae")),
        "diffusers folder (new autoencoder names)",
    ),
    "index of a sharded single file": (lambda p: shards(p, single(), "model"), "SD1.5 single file"),
    "single file of a pipeline's networks": (lambda p: pipeline_file(p / "a.safetensors"), "SD1.5 single file"),
    "single file, text encoder without text_model": (
        lambda p: put(p / "a.safetensors", without(single(), CLIP) | prefixed(CLIP, flat_text())),
        "SD1.5 single file",
    ),
    "single file, compiled inside": (
        lambda p: put(
            p / "a.safetensors", {name.replace(UNET, UNET + "_orig_mod."): t for name, t in single().items()}
        ),
        "SD1.5 single file",
    ),
    "single file, data-parallel": (
        lambda p: put(p / "a.safetensors", prefixed("module.", single())),
        "SD1.5 single file",
    ),
    "single file in a Lightning module": (
        lambda p: put(p / "a.safetensors", prefixed("model.", single())),
        "SD1.5 single file",
    ),
    "single file with the rest of CLIP": (
        lambda p: put(p / "a.safetensors", single() | prefixed(CLIP, REST_OF_CLIP)),
        "SD1.5 single file",
    ),
    "single file with bundled embeddings": (
        lambda p: put(p / "a.safetensors", single() | {"bundle_emb.cat.string_to_param.*": torch.zeros(1, 64)}),
        "SD1.5 single file",
    ),
    "single file with the autoencoder's loss": (
        lambda p: put(p / "a.safetensors", single() | prefixed(VAE, LOSS)),
        "SD1.5 single file",
    ),
    "autoencoder alone, as vae-ft-mse": (
        lambda p: put(p / "a.safetensors", bare("vae") | LOSS | VAE_AVERAGE),
        "CompVis-layout file, only autoencoder",
    ),
    "autoencoder alone, in our names": (
        lambda p: put(p / "a.safetensors", part("vae")),
        "diffusers-layout file, only autoencoder",
    ),
    "U-Net alone, CompVis without prefix": (
        lambda p: put(p / "a.safetensors", bare("unet")),
        "CompVis-layout file, only U-Net",
    ),
    "U-Net alone, diffusion_model.": (
        lambda p: put(p / "a.safetensors", prefixed("diffusion_model.", bare("unet"))),
        "SD1.5 single file, only U-Net",
    ),
    "U-Net alone, model.diffusion_model.": (
        lambda p: put(p / "a.safetensors", prefixed(UNET, bare("unet"))),
        "SD1.5 single file, only U-Net",
    ),
    "U-Net alone, compiled and data-parallel": (
        lambda p: put(p / "a.safetensors", prefixed("module._orig_mod.", part("unet"))),
        "diffusers-layout file, only U-Net",
    ),
    "text encoder alone, as clip_l": (
        lambda p: put(p / "clip_l.safetensors", part("clip") | REST_OF_CLIP),
        "diffusers-layout file, only text encoder",
    ),
    "text encoder alone, flat": (
        lambda p: put(p / "a.safetensors", flat_text() | {"embeddings.position_ids": torch.arange(9)[None]}),
        "diffusers-layout file, only text encoder",
    ),
    "text encoder alone, ComfyUI": (
        lambda p: put(p / "a.safetensors", prefixed("text_encoders.clip_l.transformer.", part("clip"))),
        "SD1.5 single file, only text encoder",
    ),
    "the folder of one network": (lambda p: write_folder(p / "a") / "unet", "diffusers-layout file, only U-Net"),
    "the folder of a text encoder": (
        lambda p: write_folder(p / "a") / "text_encoder",
        "diffusers-layout file, only text encoder",
    ),
}


@pytest.mark.parametrize("row", LOADED)
def test_it_loads_and_means_the_same(tmp_path, row):
    write, description = LOADED[row]
    path = write(made(tmp_path / "it"))
    checkpoint = identify(path)
    assert checkpoint.describe() == description
    base = write_single(tmp_path / "base.safetensors") if checkpoint.missing_parts else None
    two_sets = "unet_ema" in checkpoint.parts
    loaded = load_parts(path, base=base, ema="ema" if two_sets else None)
    assert loaded.config == TINY
    for name, network in (("clip", loaded.clip), ("vae", loaded.vae), ("unet", loaded.unet)):
        expected = part(name, seed=1 if name == "unet" and (two_sets or checkpoint.ema_only) else 0)
        for key, tensor in network.state_dict().items():
            assert torch.equal(tensor, expected[key]), key


@pytest.mark.parametrize("row", LOADED)
def test_every_key_is_explained_and_what_is_converted_is_read_again(tmp_path, row):
    write, _ = LOADED[row]
    path = write(made(tmp_path / "it"))
    examined = examine(identify(path))
    fit(path)
    names = [name for file in examined.checkpoint.files for name in file.header.entries]
    assert len(examined.report.used) + len(examined.report.unneeded) == len(names)
    convert(path, tmp_path / "single.safetensors", layout="single")
    convert(tmp_path / "single.safetensors", tmp_path / "folder", layout="folder")
    again = identify(tmp_path / "folder")
    for part_name, tensors in examined.checkpoint.parts.items():
        for key, tensor in tensors.items():
            if key in again.parts[part_name]:
                assert torch.equal(tensor.fetch(True), again.parts[part_name][key].fetch(True))
            else:
                assert layouts.UNNEEDED.fullmatch(key), key


@pytest.mark.parametrize("row", LOADED)
def test_inspect_says_in_a_few_lines_what_it_is(tmp_path, row, capsys):
    write, description = LOADED[row]
    path = write(made(tmp_path / "it"))
    assert main(["inspect", str(path), "--no-hash"]) in (None, 0)
    printed = capsys.readouterr().out
    assert printed.startswith(f"{path}") or path.is_dir()
    assert description in printed.splitlines()[0]
    assert "0 missing, 0 unexpected, 0 of wrong shape" in printed


def test_a_variant_of_unknown_name_is_taken_when_it_is_the_only_one(tmp_path):
    folder = folder_with(tmp_path / "a", "unet", "diffusion_pytorch_model.mine.safetensors")
    assert Path(load_parts(folder).files[2]).name == "diffusion_pytorch_model.mine.safetensors"
    put(folder / "unet" / "diffusion_pytorch_model.yours.safetensors", part("unet"))
    refused_at = folder / "unet"
    with pytest.raises(CheckpointError, match=r"which of .*mine.*, .*yours.*\?") as error:
        identify(folder)
    assert str(refused_at) in str(error.value)
