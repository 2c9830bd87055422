"""The trace of shapes and costs: every line by hand, totals as torch counts them, and the command that prints it."""

import argparse
import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from ldm_tools import inspect
from networks import SMALL
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ldm import checkpoint
from ldm.blocks import Attention, ResnetBlock
from ldm.checkpoint.loading import build
from ldm.config import PHANTOM, SD15
from ldm.pipeline import PHANTOM_WEIGHTS
from ldm.probe.trace import Cost, block_modules, by_part, trace, trace_model, trace_unet
from ldm.unet import UNet


def call(*arguments: object) -> None:
    parser = argparse.ArgumentParser()
    inspect.add_arguments(parser)
    inspect.run(parser.parse_args([str(argument) for argument in arguments]))


# ---- by hand ---------------------------------------------------------------------------------------


def test_a_convolution_by_hand():
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)).to("meta")
    (block,) = trace(network, lambda: network(torch.empty(2, 3, 8, 6, device="meta", requires_grad=True)))
    assert (block.input, block.output) == ((2, 3, 8, 6), (2, 4, 8, 6))
    assert block.parameters == 4 * 3 * 9 + 4
    assert block.flops == 2 * (2 * 4 * 8 * 6) * (3 * 9)  # each output value: 27 products, each with an addition
    assert block.kept_bytes == 4 * (2 * 3 * 8 * 6)  # its input, for the gradient of the weight


def test_a_resnet_by_hand():
    network = nn.ModuleDict({"resnets": nn.ModuleList([ResnetBlock(8, 12, 4, 1e-5)])}).to("meta")
    x = torch.empty(1, 8, 4, 4, device="meta", requires_grad=True)
    (block,) = trace(network, lambda: network["resnets"][0](x))
    assert block.flops == 2 * 16 * 12 * (8 * 9 + 12 * 9 + 8)  # two convolutions and the shortcut


def test_fused_attention_by_hand():
    network = nn.ModuleDict({"layers": nn.ModuleList([Attention(8, heads=2, context_width=6)])}).to("meta")
    x, context = torch.empty(3, 10, 8, device="meta"), torch.empty(3, 7, 6, device="meta")
    (block,) = trace(network, lambda: network["layers"][0](x, context))
    projections = 3 * (10 * 8 * 8 * 2 + 7 * 6 * 8 * 2)
    products = 3 * (10 * 7 * 8 * 2)  # q k^T and the probabilities times v
    assert block.flops == 2 * (projections + products)
    # x, the context; q, k, v and the output of the attention; one number for each row and head. Not the scores.
    assert block.kept_bytes == 4 * 3 * (10 * 8 + 7 * 6 + 2 * 10 * 8 + 2 * 7 * 8 + 2 * 10)


# ---- totals ----------------------------------------------------------------------------------------


traced = cache(trace_model)  # at the configuration's own size: 512 x 512 for all but the phantoms


@pytest.mark.parametrize("config", [SMALL, PHANTOM, SD15], ids=["small", "phantom", "SD1.5"])
def test_totals_are_those_that_torch_counts(config):
    f, side = config.vae.downscale, config.unet.sample_size
    clip, vae, unet = build(config.clip), build(config.vae), build(config.unet)
    ids = torch.empty(1, 77, dtype=torch.int64, device="meta")
    x_t = torch.empty(1, 4, side, side, device="meta")
    context = torch.empty(1, 77, config.unet.context_width, device="meta")
    images = torch.empty(1, 3, f * side, f * side, device="meta")
    runs = {
        "clip": lambda: clip(ids),
        "unet": lambda: unet(x_t, 500, context),
        "vae.encode": lambda: vae.encode(images),
        "vae.decode": lambda: vae.decode(x_t),
    }
    for name, blocks in traced(config).items():
        with FlopCounterMode(display=False) as counter:
            runs[name]()
        assert Cost.of(blocks).flops == counter.get_total_flops(), name


def test_every_parameter_is_in_one_line():
    traces = traced(SD15)
    totals = {name: Cost.of(blocks).parameters for name, blocks in traces.items()}
    assert totals["clip"] == 123_060_480
    assert totals["unet"] == 859_520_964
    assert totals["vae.encode"] + totals["vae.decode"] == 83_653_863


def test_lines_are_in_running_order():
    names = [block.name for block in traced(PHANTOM)["unet"]]
    assert names[:4] == ["time_embedding", "conv_in", "down_blocks.0.resnets.0", "down_blocks.0.downsamplers.0"]
    assert names[-2:] == ["conv_norm_out", "conv_out"]
    assert (
        names.index("mid_block.resnets.0")
        < names.index("mid_block.attentions.0")
        < names.index("up_blocks.0.resnets.0")
    )
    assert set(names) == {name for name, _ in block_modules(build(PHANTOM.unet))}


def test_a_larger_image_costs_more_in_convolutions_by_its_area():
    small, large = traced(SMALL)["unet"], trace_model(SMALL, (1024, 1024))["unet"]
    cost = {block.name: (block.flops, after.flops) for block, after in zip(small, large, strict=True)}
    assert cost["conv_in"][1] == 4 * cost["conv_in"][0]
    assert cost["down_blocks.0.attentions.0"][1] > 4 * cost["down_blocks.0.attentions.0"][0]  # attention: area squared
    assert cost["time_embedding"][1] == cost["time_embedding"][0]


def test_parts_add_up():
    blocks = traced(PHANTOM)["unet"]
    parts = by_part(blocks)
    assert Cost.of(parts.values()) == Cost.of(blocks)
    assert [*parts] == [
        *("time_embedding", "conv_in", "down_blocks.0", "down_blocks.1", "down_blocks.2", "mid_block"),
        *("up_blocks.0", "up_blocks.1", "up_blocks.2", "conv_norm_out", "conv_out"),
    ]


def test_half_precision_keeps_half():
    unet = UNet(PHANTOM.unet).to("meta")
    full = Cost.of(trace_unet(unet, (16, 16)))
    half = Cost.of(trace_unet(unet.to(torch.float16), (16, 16)))
    assert half.flops == full.flops
    # The norms' statistics and the attention's row sums stay in float32.
    assert 0.5 <= half.kept_bytes / full.kept_bytes < 0.52


def test_a_size_that_cannot_be_halved_is_refused():
    with pytest.raises(ValueError, match="got 100 x 512, expected multiples of 64"):
        trace_model(SD15, (100, 512))


# ---- the command -----------------------------------------------------------------------------------


def test_inspect_prints_the_trace(capsys):
    call(PHANTOM_WEIGHTS, "--no-hash", "--trace", "--size", "128x64", "--batch", "2")
    printed = capsys.readouterr().out
    assert "2x4x8x16 -> 2x96x8x16" in printed
    assert printed.count("\n    total ") == 4
    row = next(line for line in printed.splitlines() if line.startswith("    up_blocks.2.resnets.1 "))
    assert f"{sum(p.numel() for p in build(PHANTOM.unet).get_submodule('up_blocks.2.resnets.1').parameters()):,}" in row


def test_inspect_gives_the_trace_as_json(capsys):
    call(PHANTOM_WEIGHTS, "--no-hash", "--trace", "--json")
    facts = json.loads(capsys.readouterr().out)
    assert sum(block["parameters"] for block in facts["trace"]["unet"]) == facts["parts"]["unet"]["parameters"]


def test_inspect_shows_a_changed_network(capsys):
    call(PHANTOM_WEIGHTS, "--no-hash", "--change", "transformer_depth=2", "--change", "attention=true,true,true")
    printed = capsys.readouterr().out
    assert "transformer_depth 1 -> 2" in printed
    assert "attention (False, True, True) -> (True, True, True)" in printed
    assert "left behind              0 tensors" in printed
    total = next(line for line in printed.splitlines() if line.startswith("    total"))
    changed = replace(PHANTOM.unet, transformer_depth=2, attention=(True, True, True))
    for config in (PHANTOM.unet, changed):
        assert f"{sum(p.numel() for p in build(config).parameters()):,}" in total


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("depth=2", "expected FIELD=VALUE with one of latent_channels"),
        ("heads=many", "expected a value like 8"),
        ("heads=true", "expected a value like 8"),
        ("heads=5", "not a multiple"),
        ("attention=1,1,1", r"expected a value like \(False, True, True\)"),
    ],
)
def test_changes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        call(PHANTOM_WEIGHTS, "--no-hash", "--change", change)


def test_a_u_net_alone_can_be_traced(tmp_path, capsys):
    path = tmp_path / "unet.safetensors"
    checkpoint.save(path, {"unet": UNet(PHANTOM.unet)})
    call(path, "--no-hash", "--trace")
    assert capsys.readouterr().out.count("\n    total ") == 1
