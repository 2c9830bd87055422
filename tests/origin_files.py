"""Pieces of which the files of the world's tools are made, tiny, and the question whether such a file loads."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import FORMAT, part, single, write_folder

from ldm.checkpoint import CheckpointError, examine, identify, layouts
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


def fit(path):
    examined = examine(identify(path))
    require_fit(examined.checkpoint, examined.report)


def refused(path, message):
    """The refusal is one line, of our class, and names the path."""
    with pytest.raises(CheckpointError, match=message) as error:
        fit(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
