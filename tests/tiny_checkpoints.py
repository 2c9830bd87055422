"""Tiny checkpoints in every published layout, written with the safetensors library rather than with our writer."""

import gzip
import json
import struct
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm.checkpoint import layouts
from ldm.checkpoint.loading import build
from ldm.config import CLIPConfig, Config, UNetConfig, VAEConfig

# SD1.5's structure at the smallest widths that its 32 groups and 8 heads allow: all of it shows in the shapes.
TINY = Config(
    CLIPConfig(vocabulary=60, tokens=9, width=64, layers=2, heads=1, mlp_width=96),
    VAEConfig(widths=(32, 64), resnets_per_level=1),
    UNetConfig(widths=(32, 64), resnets_per_level=1, attention=(True, False), context_width=64),
)
CONFIGS = {"clip": TINY.clip, "vae": TINY.vae, "unet": TINY.unet}
FORMAT = {"format": "pt"}

Tensors = dict[str, Tensor]


@cache
def manifest(name: str) -> dict[str, Any]:
    """Names, shapes and dtypes of a published file, or the mapping between two layouts."""
    path = Path(__file__).parent / "golden" / "manifests" / f"{name}.json.gz"
    return json.loads(gzip.decompress(path.read_bytes()))


def part(name: str, seed: int = 0) -> Tensors:
    """One network's weights under our names: other values for each name and seed. Not to be written into."""
    return dict(_part(name, seed))


@cache
def _part(name: str, seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    shapes = {key: tensor.shape for key, tensor in build(CONFIGS[name]).state_dict().items()}
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def single(ema: bool = False) -> Tensors:
    """A single file's tensors: weights, schedule buffers, position_ids, and on request the moving average."""
    tensors: Tensors = {}
    for name, config in CONFIGS.items():
        ours = part(name)
        depth = layouts.depth_of(config)
        for key, stored in layouts.to_single(name, ours, depth).items():
            tensor = ours[key]
            tensors[stored] = tensor[:, :, None, None] if layouts.is_vae_attention_weight(key) else tensor
    if ema:
        averages = part("unet", seed=1)
        for key, stored in layouts.to_single("unet", averages, layouts.depth_of(TINY.unet)).items():
            tensors[layouts.ema_key(stored)] = averages[key]
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(9)[None]
    tensors["betas"] = torch.linspace(0.1, 0.2, 1000)
    tensors["alphas_cumprod"] = torch.linspace(0.9, 0.1, 1000)
    tensors["model_ema.decay"] = torch.tensor(0.9999)
    tensors["model_ema.num_updates"] = torch.tensor(470000, dtype=torch.int32)
    return tensors


def write_single(path: Path, ema: bool = False) -> Path:
    save_file(single(ema), path, metadata=FORMAT)
    return path


def write_as_published(path: Path, tensors: Tensors) -> Path:
    """As the published single file was written: tensors by name, a header 4 bytes off a multiple of 8 (156444)."""
    fields: dict[str, Any] = {"__metadata__": FORMAT}
    codes, position, data = {torch.float32: "F32", torch.int64: "I64", torch.int32: "I32"}, 0, b""
    for name in sorted(tensors):
        raw = tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        offsets = [position, position + len(raw)]
        fields[name] = {
            "dtype": codes[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": offsets,
        }
        position, data = offsets[1], data + raw
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * ((4 - len(text)) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def write_folder(path: Path, *, old_names: bool = False, variant: str = "", dtype: torch.dtype | None = None) -> Path:
    """A diffusers folder. variant: ".fp16" in the names of the weight files."""
    to_old = {new: old for old, new in layouts.OLD_VAE_NAMES}
    for name, folder in layouts.FOLDERS.items():
        (path / folder).mkdir(parents=True)
        stem = "model" if name == "clip" else "diffusion_pytorch_model"
        tensors = {key: tensor.to(dtype or tensor.dtype) for key, tensor in part(name).items()}
        if name == "vae" and old_names:
            tensors = {layouts.rename(key, to_old) or key: tensor for key, tensor in tensors.items()}
        save_file(tensors, path / folder / f"{stem}{variant}.safetensors", metadata=FORMAT)
    return path
