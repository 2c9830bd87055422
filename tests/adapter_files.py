"""LoRA files as each tool names them, over the small reference networks: other values for each module, the same names.

The vectors of tests/golden/adapters.npz were computed by diffusers and peft from exactly these tensors (see its @meta).
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from networks import SMALL
from reference import bell
from torch import Tensor

from ldm.checkpoint import layouts
from ldm.checkpoint.loading import build

Tensors = dict[str, Tensor]


class Pair(NamedTuple):
    down: Tensor
    up: Tensor


def weight_shapes(part: str) -> dict[str, tuple[int, ...]]:
    """Module -> the shape of its weight, for those of one small network that a LoRA may change."""
    state = build({"unet": SMALL.unet, "clip": SMALL.clip}[part]).state_dict()
    shapes = {n.removesuffix(".weight"): tuple(t.shape) for n, t in state.items() if n.endswith(".weight")}
    return {name: shape for name, shape in shapes.items() if len(shape) > 1 and "embedding" not in name}


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
LINEAR = (*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "fc1", "fc2")
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj")


def targets(part: str, kinds: Iterable[str]) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in weight_shapes(part).items() if name.endswith(tuple(kinds))}


def rank_of(name: str) -> int:
    """By layer: 2 in feed-forwards, 3 in convolutions, 4 elsewhere."""
    return 2 if "ff.net" in name or ".fc" in name else 3 if name.endswith(CONVOLUTIONS) else 4


def pair(name: str, shape: tuple[int, ...], rank: int) -> Pair:
    """down (r, in, ...) and up (out, r, ...): a change about a fifth as large as a weight of this shape."""
    ones = (1,) * (len(shape) - 2)
    down = bell(f"lora/{name}.down", (rank, *shape[1:]), 1 / math.sqrt(math.prod(shape[1:])), 0.0)
    up = bell(f"lora/{name}.up", (shape[0], rank, *ones), 0.2 / math.sqrt(rank), 0.0)
    return Pair(torch.from_numpy(down), torch.from_numpy(up))


def kohya(
    alpha: float | None = 3.0, convolutions: bool = True, compvis: bool = False, rank: int | None = None
) -> Tensors:
    """lora_unet_.., lora_te_..: alpha beside each pair where given; convolutions as LoCon and LoRA-C3Lier have them."""
    tensors: Tensors = {}
    for part, front in (("unet", "lora_unet_"), ("clip", "lora_te_")):
        singles = layouts.unet_table(layouts.depth_of(SMALL.unet)) if compvis and part == "unet" else []
        table = {ours: single for single, ours in singles}
        kinds = (*LINEAR, *CONVOLUTIONS) if convolutions else LINEAR
        for name, shape in targets(part, kinds).items():
            module = (layouts.rename(name, table) or name) if table else name
            stored = front + module.replace(".", "_")
            tensors[f"{stored}.lora_down.weight"], tensors[f"{stored}.lora_up.weight"] = pair(
                name, shape, rank or rank_of(name)
            )
            if alpha is not None:
                tensors[f"{stored}.alpha"] = torch.tensor(alpha)
    return tensors


FRONTS = {"unet": "unet.", "clip": "text_encoder."}


def diffusers_peft(alpha: float | None = None) -> Tensors:
    """unet...lora_A.weight, as diffusers saves them since 0.22; a value `.alpha` beside each where given."""
    tensors: Tensors = {}
    for part, front in FRONTS.items():
        for name, shape in targets(part, LINEAR).items():
            down, up = pair(name, shape, rank_of(name))
            tensors[f"{front}{name}.lora_A.weight"], tensors[f"{front}{name}.lora_B.weight"] = down, up
            if alpha is not None:
                tensors[f"{front}{name}.alpha"] = torch.tensor(alpha)
    return tensors


def diffusers_old() -> Tensors:
    """unet...processor.to_q_lora.down.weight and ..lora_linear_layer.., as before 0.22: attention only."""
    tensors: Tensors = {}
    for part, front in FRONTS.items():
        for name, shape in targets(part, ATTENTION).items():
            parent, _, leaf = name.removesuffix(".0").rpartition(".")
            middle = f"{parent}.processor.{leaf}_lora" if part == "unet" else f"{parent}.{leaf}.lora_linear_layer"
            down, up = pair(name, shape, rank_of(name))
            tensors[f"{front}{middle}.down.weight"], tensors[f"{front}{middle}.up.weight"] = down, up
    return tensors


def peft_unet(rank: int = 4, pattern: dict[str, int] | None = None) -> Tensors:
    """base_model.model...lora_A.weight of a U-Net, as PeftModel.save_pretrained writes adapter_model.safetensors."""
    tensors: Tensors = {}
    for name, shape in targets("unet", ("to_q", "to_v", "proj_in", "conv1")).items():
        own = next((r for end, r in (pattern or {}).items() if name.endswith(end)), rank)
        down, up = pair(name, shape, own)
        tensors[f"base_model.model.{name}.lora_A.weight"], tensors[f"base_model.model.{name}.lora_B.weight"] = down, up
    return tensors
