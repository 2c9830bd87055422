"""Files of the world's tools that are no SD1.5 model, or damaged: one line says what each is.

The rows of the table in ldm/checkpoint/README.md.
"""

import json
from pathlib import Path

import pytest
import torch
from ldm_tools.cli import main
from origin_files import ANY, UNET, made, prefixed, put, refused, shards
from test_origins import LOADED
from tiny_checkpoints import part, single, write_folder

import ldm.checkpoint
from ldm.checkpoint import CheckpointError, identify, layouts


def with_config(path, network, **fields):
    """A diffusers folder with these fields in one network's config.json."""
    write_folder(path)
    (path / layouts.FOLDERS[network] / "config.json").write_text(json.dumps(fields))
    return path


def folder_of(path, *names):
    """A folder with these files, empty JSON in each."""
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("{}")
    return path


def raw(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


ONNX = b"\x08\x08\x12\x07pytorch\x1a\x062.1.0:" + b"\0" * 32

# name -> (write, what the line says).
REFUSED = {
    "LCM U-Net": (
        lambda p: put(
            p / "a.safetensors", part("unet") | {"time_embedding.cond_proj.weight": torch.zeros(32, 256)}
        ),
        "an LCM or other distilled U-Net",
    ),
    "linear projections": (
        lambda p: put(
            p / "a.safetensors",
            {name: t[:, :, 0, 0] if ".proj_in.weight" in name else t for name, t in part("unet").items()},
        ),
        "use_linear_projection",
    ),
    "linear projections in config.json": (
        lambda p: with_config(p / "a", "unet", use_linear_projection=True),
        "use_linear_projection is True",
    ),
    "IP-Adapter": (
        lambda p: put(p / "a.safetensors", {"image_proj.proj.weight": ANY, "ip_adapter.1.to_k_ip.weight": ANY}),
        "an IP-Adapter",
    ),
    "ControlNet, CompVis": (
        lambda p: put(p / "a.safetensors", {"control_model.input_blocks.0.0.weight": ANY}),
        "a ControlNet",
    ),
    "ControlNet, diffusers folder": (
        lambda p: folder_of(
            raw(p / "config.json", b'{"_class_name": "ControlNetModel"}').parent,
            "diffusion_pytorch_model.safetensors",
        ),
        "a ControlNet",
    ),
    "T2I-Adapter": (
        lambda p: put(p / "a.safetensors", {"body.0.block1.weight": ANY, "conv_in.weight": ANY}),
        "a T2I-Adapter",
    ),
    "T2I-Adapter, diffusers": (
        lambda p: put(p / "a.safetensors", {"adapter.body.0.resnets.0.block1.weight": ANY}),
        "a T2I-Adapter",
    ),
    "PEFT folder": (
        lambda p: folder_of(p / "a", "adapter_config.json", "adapter_model.safetensors"),
        "a PEFT adapter, .*--lora",
    ),
    "LoRA folder of diffusers": (
        lambda p: folder_of(p / "a", "pytorch_lora_weights.safetensors"),
        "a LoRA, .*--lora",
    ),
    "LoRA": (
        lambda p: put(p / "a.safetensors", {"lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": ANY}),
        "a LoRA, .*--lora",
    ),
    "LyCORIS": (
        lambda p: put(p / "a.safetensors", {"lora_unet_mid_block_attentions_0_proj_in.hada_w1_a": ANY}),
        "a LyCORIS adapter",
    ),
    "motion module": (
        lambda p: put(p / "a.safetensors", {"down_blocks.0.motion_modules.0.temporal_transformer.norm.weight": ANY}),
        "a motion module",
    ),
    "motion module, diffusers folder": (
        lambda p: raw(p / "config.json", b'{"_class_name": "MotionAdapter"}').parent,
        "a motion module",
    ),
    "SDXL single file": (
        lambda p: put(p / "a.safetensors", {"conditioner.embedders.0.transformer.x": ANY}),
        "SDXL, another architecture",
    ),
    "SDXL folder": (lambda p: folder_of(p / "a", "text_encoder_2/config.json"), "SDXL"),
    "SDXL U-Net": (
        lambda p: put(p / "a.safetensors", {"down_blocks.1.a.attn2.to_k.weight": torch.zeros(2, 2048)}),
        "SDXL, its contexts are 2048 wide",
    ),
    "SDXL second text encoder": (
        lambda p: put(p / "a.safetensors", {"text_model.embeddings.token_embedding.weight": torch.zeros(3, 1280)}),
        "the second text encoder of SDXL",
    ),
    "SDXL embedding": (
        lambda p: put(p / "a.safetensors", {"clip_l": torch.zeros(1, 768), "clip_g": torch.zeros(1, 1280)}),
        "an embedding for SDXL",
    ),
    "SD2 single file": (
        lambda p: put(p / "a.safetensors", {"cond_stage_model.model.ln_final.weight": ANY, UNET + "out.2.bias": ANY}),
        "SD2, whose text encoder",
    ),
    "SD2 text encoder": (
        lambda p: put(p / "a.safetensors", {"text_model.embeddings.token_embedding.weight": torch.zeros(3, 1024)}),
        "the text encoder of SD2",
    ),
    "SD3 single file": (
        lambda p: put(p / "a.safetensors", {UNET + "joint_blocks.0.x": ANY}),
        "a diffusion transformer",
    ),
    "SD3 or Flux autoencoder": (
        lambda p: put(p / "a.safetensors", {"decoder.conv_in.weight": torch.zeros(8, 16, 3, 3)}),
        "the autoencoder of SD3 or Flux",
    ),
    "Flux transformer": (
        lambda p: put(p / "a.safetensors", {"double_blocks.0.img_attn.qkv.weight": ANY}),
        "a diffusion transformer",
    ),
    "Flux folder": (lambda p: folder_of(p / "a", "transformer/config.json"), "a diffusion transformer"),
    "T5 text encoder": (
        lambda p: put(p / "a.safetensors", {"encoder.block.0.layer.0.SelfAttention.q.weight": ANY}),
        "a T5 text encoder",
    ),
    "CLIP in OpenAI's names": (
        lambda p: put(p / "a.safetensors", {"transformer.resblocks.0.attn.in_proj_weight": ANY}),
        "a CLIP model in OpenAI's",
    ),
    "CLIP's image encoder": (
        lambda p: put(p / "a.safetensors", {"vision_model.embeddings.class_embedding": ANY}),
        "an encoder of images",
    ),
    "tiny autoencoder": (
        lambda p: put(p / "a.safetensors", {"encoder.layers.0.weight": ANY, "decoder.layers.1.weight": ANY}),
        "a tiny autoencoder",
    ),
    "upscaler": (
        lambda p: put(p / "a.safetensors", {"body.0.rdb1.conv1.weight": ANY}),
        "an upscaler of images",
    ),
    "safety checker": (
        lambda p: put(p / "a.safetensors", {"concept_embeds": torch.zeros(17, 768)}),
        "the safety checker",
    ),
    "4-bit weights": (
        lambda p: put(p / "a.safetensors", part("unet") | {"conv_in.weight.absmax": ANY}),
        "quantised to 4 or 8 bit",
    ),
    "embedding, A1111": (
        lambda p: put(p / "a.safetensors", {"emb_params": torch.zeros(2, 768)}),
        "a textual inversion embedding, .*--embedding",
    ),
    "embedding, diffusers": (
        lambda p: put(p / "a.safetensors", {"<cat-toy>": torch.zeros(1, 768)}),
        "a textual inversion embedding, .*--embedding",
    ),
    "embedding folder": (
        lambda p: folder_of(p / "a", "learned_embeds.safetensors"),
        "a textual inversion embedding",
    ),
    "inpainting model": (
        lambda p: put(
            p / "a.safetensors",
            {"diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 9, 3, 3),
             "diffusion_model.out.2.weight": torch.zeros(4, 8, 3, 3)},
        ),
        "an inpainting model",
    ),
    "ONNX file": (lambda p: raw(p / "model.onnx", ONNX), "an ONNX graph"),
    "ONNX under another name": (lambda p: raw(p / "model.safetensors", ONNX), "an ONNX graph"),
    "ONNX folder": (lambda p: folder_of(p / "a", "unet/model.onnx", "text_encoder/model.onnx"), "an ONNX pipeline"),
    "GGUF": (lambda p: raw(p / "a.gguf", b"GGUF\3" + b"\0" * 40), "a GGUF file"),
    "Flax": (lambda p: raw(p / "a.msgpack", b"\x83\xa4unet" + b"\0" * 40), "Flax weights"),
    "archive": (lambda p: raw(p / "a.zip", b"PK\x03\x04" + b"\0" * 40), "an archive: unpack it"),
    "unfinished download": (lambda p: raw(p / "a.safetensors.incomplete", b"\0" * 40), "not finished: fetch it again"),
    "scheduler's folder": (lambda p: folder_of(p / "a", "scheduler_config.json"), "settings of a scheduler"),
    "tokenizer's folder": (lambda p: folder_of(p / "a", "vocab.json", "merges.txt"), "a tokenizer and no weights"),
    "pipeline with a ControlNet": (
        lambda p: folder_of(write_folder(p / "a"), "controlnet/config.json"),
        "a pipeline with a ControlNet",
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", REFUSED)
def test_it_is_refused_by_name(tmp_path, row, capsys):
    write, message = REFUSED[row]
    path = write(made(tmp_path / "it"))
    refused(path, message)
    status = main(["inspect", str(path), "--no-hash"])
    captured = capsys.readouterr()
    assert status != 0
    assert len(captured.err.strip().splitlines()) == 1
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda index: (index.parent / "model-00002-of-00002.safetensors").unlink(), "1 of 2 shards are not there"),
        (lambda index: index.write_text("[]"), "not a configuration"),
        (lambda index: index.write_text("{}"), "no weight_map in it"),
        (
            lambda index: index.write_text(index.read_text().replace("model-00001", "../model-00001")),
            "expected files of its own folder",
        ),
        (
            lambda index: index.write_text(index.read_text().replace("00001-of", "00002-of", 1)),
            "says that .* lies in .*, and it does not",
        ),
    ],
)
def test_shards_that_do_not_go_together_are_refused(tmp_path, break_it, message):
    index = shards(tmp_path / "it", single(), "model")
    break_it(index)
    with pytest.raises(CheckpointError, match=message):
        identify(index)


def test_a_shard_alone_is_refused_with_what_is_missing(tmp_path):
    index = shards(tmp_path, single(), "model")
    refused(index.with_name("model-00001-of-00002.safetensors"), "missing")


def test_two_names_that_wrappers_made_of_one_are_refused(tmp_path):
    path = put(tmp_path / "a.safetensors", part("unet") | prefixed("_orig_mod.", part("unet")))
    refused(path, "holds two tensors of one name, .* keep one of them")


def test_the_document_has_a_row_for_each_of_these():
    lines = (Path(ldm.checkpoint.__file__).parent / "README.md").read_text().splitlines()
    told = {tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines if line.startswith("|")}
    assert {(name, description) for name, (_, description) in LOADED.items()} <= told
    assert set(REFUSED) <= {row[0] for row in told}
    assert len(LOADED) + len(REFUSED) >= 40
