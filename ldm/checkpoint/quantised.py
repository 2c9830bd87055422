"""Weights in eight bits: read back to numbers that the networks compute with.

float8 comes in two kinds. Unscaled, every value is one of float16's too, so float16 holds it exactly. Scaled, the file
keeps beside `X.weight` one factor, weight = factor * stored; the product is formed in float32.
"""

from collections.abc import Mapping

import torch

from ldm.checkpoint.container import CheckpointError, LazyTensor

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)

_WEIGHT_SCALES = ("scale_weight", "weight_scale")  # ComfyUI's older and newer name
_OTHERS = ("scale_input", "input_scale", "scaled_fp8")  # of activations; and a tensor that says only "scaled"


def dequantised(tensors: Mapping[str, LazyTensor]) -> tuple[dict[str, LazyTensor], dict[str, LazyTensor]]:
    """One network's tensors in dtypes that it computes with, and what of them was used up as scales.

    Raises: CheckpointError when a scale is not one number, or one a row of its weight.
    """
    if not any(tensor.dtype in FLOAT8 for tensor in tensors.values()):
        return dict(tensors), {}
    used = {name: t for name, t in tensors.items() if name.rpartition(".")[2] in (*_WEIGHT_SCALES, *_OTHERS)}
    plain = {}
    for name, tensor in tensors.items():
        if name in used:
            continue
        module = name.removesuffix("weight")
        scales = [tensors[module + scale] for scale in _WEIGHT_SCALES if module + scale in tensors]
        if tensor.dtype in FLOAT8:
            scaled = scales and name.endswith(".weight")
            plain[name] = _scaled(tensor, scales[0]) if scaled else tensor.cast(torch.float16)
        else:
            plain[name] = tensor
    return plain, used


def _scaled(tensor: LazyTensor, scale: LazyTensor) -> LazyTensor:
    rows = tensor.shape[:1]
    if scale.shape not in ((), (1,), rows, (*rows, 1)):
        raise CheckpointError(
            f"{scale.key} has shape {scale.shape}, expected one number, or one a row of {tensor.shape}: "
            "get a file in fp16"
        )
    per_row = scale.shape not in ((), (1,)) or rows == (1,)
    shape = (rows[0], *[1] * (len(tensor.shape) - 1)) if per_row else ()

    def fetch(copy: bool) -> torch.Tensor:
        return tensor.fetch(True).float() * scale.fetch(True).float().reshape(shape)

    return LazyTensor(tensor.key, tensor.shape, torch.float32, fetch)
