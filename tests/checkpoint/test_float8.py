"""Weights in eight bits: read as the numbers that they stand for, written without scales."""

import pytest
import torch
from origin_files import UNET, put, refused
from safetensors.torch import load_file
from tiny_checkpoints import single

from ldm.checkpoint import convert, identify, load_parts


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
