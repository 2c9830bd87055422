"""Files as the world's tools write them: each loads and means the same, or one line says what it is and what to do.

The rows of the table in ldm/checkpoint/README.md, in its order: every file is written here, tiny, under the names that
the tool it stands for uses.
"""

import json
from pathlib import Path

import pytest
import torch
from ldm_tools.cli import main
from safetensors.torch import load_file, save_file
from tiny_checkpoints import FORMAT, TINY, part, single, write_folder, write_single

import ldm.checkpoint
from ldm.checkpoint import CheckpointError, convert, examine, identify, layouts, load_parts
from ldm.checkpoint.report import require_fit

ANY = torch.zeros(1)
CLIP, VAE, UNET = layouts.SINGLE_PREFIXES.values()


def put(path, tensors, **others):
    """The path, with these tensors in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()},
        path,
        metadata=FORMAT,
        **others,
    )
    return path


def made(folder):
    folder.mkdir()
    return folder


def prefixed(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def bare(network):
    """One network in CompVis names without a prefix."""
    prefix = layouts.SINGLE_PREFIXES[network]
    return {name.removeprefix(prefix): tensor for name, tensor in single().items() if name.startswith(prefix)}


def flat_text():
    return {name.removeprefix("text_model."): tensor for name, tensor in part("clip").items()}


def without(tensors, *prefixes):
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefixes)}


REST_OF_CLIP = {
    "logit_scale": torch.tensor(4.6),
    "text_projection.weight": torch.zeros(64, 64),
    "visual_projection.weight": torch.zeros(64, 96),
    "vision_model.embeddings.class_embedding": torch.zeros(96),
    "text_model.embeddings.position_ids": torch.arange(9)[None],
}
LOSS = {"loss.logvar": ANY, "loss.discriminator.main.0.weight": torch.zeros(4, 3, 4, 4)}
VAE_AVERAGE = {"model_ema.decay": ANY, "model_ema.encoderconv_inweight": torch.zeros(32, 3, 3, 3)}


def shards(folder, tensors, stem):
    """Two shards and their index."""
    names = sorted(tensors)
    halves = {f"{stem}-0000{i}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
    for file, half in halves.items():
        put(folder / file, {name: tensors[name] for name in half})
    places = {name: file for file, half in halves.items() for name in half}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder / f"{stem}.safetensors.index.json"


def folder_with(path, network, rename=None, tensors=None):
    """A diffusers folder in which one network's weights have another file name, or other tensors."""
    write_folder(path)
    file = next((path / layouts.FOLDERS[network]).glob("*.safetensors"))
    put(file, tensors if tensors is not None else part(network))
    if rename:
        file.rename(file.with_name(rename))
    return path


def sharded_folder(path):
    write_folder(path)
    file = path / "unet" / "diffusion_pytorch_model.safetensors"
    shards(path / "unet", load_file(file), "diffusion_pytorch_model")
    file.unlink()
    return path


def ema_only(path):
    tensors = {name: t for name, t in single(ema=True).items() if not name.startswith(UNET)}
    return put(path, tensors)


def pipeline_file(path):
    names = {"clip": "text_encoder.", "vae": "vae.", "unet": "unet."}
    return put(path, {front + name: t for network, front in names.items() for name, t in part(network).items()})


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


# ---------------------------------------------------------------------------------------------------------- eight bits


def in_float8(dtype, scaled=False):
    """A single file whose matrices are in eight bits; with a scale each where asked."""
    tensors = {}
    for name, tensor in single().items():
        if tensor.ndim < 2 or not tensor.is_floating_point():
            tensors[name] = tensor
            continue
        scale = tensor.abs().max() / 448 if scaled else torch.tensor(1.0)
        tensors[name] = (tensor / scale).to(dtype)
        if scaled:
            tensors[name.removesuffix("weight") + "scale_weight"] = scale.reshape(1)
    if scaled:
        tensors[UNET + "scaled_fp8"] = torch.zeros(2).to(dtype)
    return tensors


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("asked", [None, torch.float32, torch.bfloat16])
def test_float8_is_read_as_the_numbers_it_stands_for(tmp_path, dtype, scaled, asked):
    stored = in_float8(dtype, scaled)
    path = put(tmp_path / "a.safetensors", stored)
    assert ", in float8 " + ("with scales" if scaled else "read as float16") in identify(path).describe()
    loaded = load_parts(path, dtype=asked)
    assert not loaded.mapped
    key = UNET + "input_blocks.1.1.proj_in.weight"
    scale = stored[key.replace("weight", "scale_weight")] if scaled else 1
    expected = stored[key].float() * scale
    weight = loaded.unet.down_blocks[0].attentions[0].proj_in.weight
    assert weight.dtype == (asked or (torch.float32 if scaled else torch.float16))
    assert torch.equal(weight.float(), expected if asked is not torch.bfloat16 else expected.bfloat16().float())
    assert len(loaded.report.used) + len(loaded.report.unneeded) == len(stored)


def test_float8_is_converted_and_leaves_no_scales(tmp_path):
    path = put(tmp_path / "a.safetensors", in_float8(torch.float8_e4m3fn, scaled=True))
    convert(path, tmp_path / "b.safetensors", layout="single", dtype=torch.float16)
    written = load_file(tmp_path / "b.safetensors")
    assert set(written) == set(single())
    assert {t.dtype for name, t in written.items() if name.startswith(UNET)} == {torch.float16}
    error = written[UNET + "out.2.weight"].float() - single()[UNET + "out.2.weight"]
    assert error.abs().max() < 0.07 * single()[UNET + "out.2.weight"].abs().max()  # half a step of e4m3: 2^-4


def test_a_scale_of_another_shape_is_refused(tmp_path):
    tensors = in_float8(torch.float8_e4m3fn, scaled=True)
    tensors[UNET + "out.2.scale_weight"] = torch.ones(3)
    refused(put(tmp_path / "a.safetensors", tensors), r"scale_weight has shape \(3,\), expected one number")


# ------------------------------------------------------------------------------------------------------------ refusals


def fit(path):
    examined = examine(identify(path))
    require_fit(examined.checkpoint, examined.report)


def refused(path, message):
    """The refusal is one line, of our class, and names the path."""
    with pytest.raises(CheckpointError, match=message) as error:
        fit(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


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


def test_a_variant_of_unknown_name_is_taken_when_it_is_the_only_one(tmp_path):
    folder = folder_with(tmp_path / "a", "unet", "diffusion_pytorch_model.mine.safetensors")
    assert Path(load_parts(folder).files[2]).name == "diffusion_pytorch_model.mine.safetensors"
    put(folder / "unet" / "diffusion_pytorch_model.yours.safetensors", part("unet"))
    refused_at = folder / "unet"
    with pytest.raises(CheckpointError, match=r"which of .*mine.*, .*yours.*\?") as error:
        identify(folder)
    assert str(refused_at) in str(error.value)


def test_the_document_has_a_row_for_each_of_these():
    lines = (Path(ldm.checkpoint.__file__).parent / "README.md").read_text().splitlines()
    told = {tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines if line.startswith("|")}
    assert {(name, description) for name, (_, description) in LOADED.items()} <= told
    assert set(REFUSED) <= {row[0] for row in told}
    assert len(LOADED) + len(REFUSED) >= 40
