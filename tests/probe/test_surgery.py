"""Changed U-Nets: what they are built from, what a trained network brings into them, and what they compute then."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from networks import SMALL
from reference import noise
from torch import Tensor, nn
from torch.nn import functional as F

from ldm import checkpoint
from ldm.blocks import Attention, BasicTransformerBlock, ResnetBlock
from ldm.checkpoint import CheckpointError
from ldm.checkpoint.config_json import to_json
from ldm.checkpoint.loading import build, load_parts
from ldm.checkpoint.settings import infer_config
from ldm.config import SD15, UNetConfig
from ldm.pipeline import PHANTOM_WEIGHTS
from ldm.probe import surgery
from ldm.unet import UNet, UNetBlocks

pytestmark = pytest.mark.usefixtures("no_grad")


class GroupNormGELU(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(super().forward(x))


class MeanAttention(Attention):
    """Every position gets the mean of the values."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.to_out(self.to_v(x).mean(1, keepdim=True).expand_as(x))


class WithMeanAttention(BasicTransformerBlock):
    self_attention = MeanAttention


class HalfResnet(ResnetBlock):
    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        return 0.5 * super().forward(x, time)


def differs(unet: UNet, other: UNet, inputs: tuple[Tensor, int, Tensor]) -> float:
    """Relative l2 distance of two networks' outputs."""
    out = unet(*inputs)
    return float((other(*inputs) - out).norm() / out.norm())


# ---- the configuration -----------------------------------------------------------------------------


def test_the_standard_configuration_writes_what_it_always_did():
    assert not {"mid_block_type", "transformer_layers_per_block"} & json.loads(to_json(SD15.unet)).keys()


def test_keys_are_the_published_ones():
    assert build(SD15.unet).state_dict().keys() == build(replace(SD15.unet, mid_attention=True)).state_dict().keys()
    assert len(build(SD15.unet).state_dict()) == 686


@pytest.mark.parametrize(
    "change",
    [
        {"mid_attention": False},
        {"transformer_depth": 3},
        {"resnets_per_level": 1},
        {"heads": 4},
        {"widths": (32, 64, 64), "attention": (False, True, False)},
        {"attention": (True, True, True, True)},
        {"context_width": 96},
        {"latent_channels": 9},
    ],
    ids=lambda change: ",".join(change),
)
@pytest.mark.parametrize("layout", ["single", "folder"])
def test_every_change_goes_through_a_file(change, layout, tmp_path):
    config = replace(SMALL.unet, **change)
    torch.manual_seed(0)
    network = UNet(config).eval()
    path = tmp_path / ("unet.safetensors" if layout == "single" else "unet")
    checkpoint.save(path, {"unet": network}, layout=layout)
    back = surgery.load(path, UNetBlocks())
    assert back.config == config
    x, context = noise("x", (1, config.latent_channels, 8, 8)), noise("c", (1, 5, config.context_width))
    loaded = back.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in network.state_dict().items())
    # Parameters that are views of a mapped file lie at other addresses, and sums are taken in another order there.
    torch.testing.assert_close(back(x, 3, context), network(x, 3, context), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", [{"transformer_depth": 0}, {"resnets_per_level": 0}])
def test_depths_that_cannot_be_are_refused(change):
    with pytest.raises(ValueError, match="expected 1 or more of each"):
        replace(SMALL.unet, **change)


# ---- other blocks ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "kind", "count"),
    [
        (UNetBlocks(norm=GroupNormGELU), GroupNormGELU, 2 * 22 + 1),
        (UNetBlocks(transformer_block=WithMeanAttention), MeanAttention, 16),
        (UNetBlocks(resnet=HalfResnet), HalfResnet, 22),
    ],
    ids=lambda value: value.changes() if isinstance(value, UNetBlocks) else "",
)
def test_a_new_block_is_a_class_and_one_line(unet, inputs, blocks, kind, count):
    changed, transplant = surgery.rebuild(unet, blocks=blocks)
    assert sum(type(module) is kind for module in changed.modules()) == count
    assert transplant.carried.keys() == changed.state_dict().keys()
    assert not transplant.left_behind
    assert differs(unet, changed, inputs) > 1e-3


def test_a_block_that_is_the_standard_one_changes_nothing(unet, inputs):
    class Same(nn.GroupNorm):
        pass

    changed, _ = surgery.rebuild(unet, blocks=UNetBlocks(norm=Same))
    assert differs(unet, changed, inputs) == 0


def test_a_file_says_which_blocks_it_needs(unet, inputs, tmp_path):
    blocks = UNetBlocks(transformer_block=WithMeanAttention)
    changed, _ = surgery.rebuild(unet, blocks=blocks)
    path = tmp_path / "unet.safetensors"
    checkpoint.save(path, {"unet": changed})
    assert differs(surgery.load(path, blocks), changed, inputs) < 1e-5
    with pytest.raises(CheckpointError, match=r"transformer_block=WithMeanAttention\), got \(\)"):
        surgery.load(path, UNetBlocks())
    with pytest.raises(CheckpointError, match=r"built from the blocks \(transformer_block=WithMeanAttention\)"):
        load_parts(path, base=PHANTOM_WEIGHTS)
    checkpoint.convert(path, tmp_path / "folder", layout="folder")
    assert checkpoint.identify(tmp_path / "folder").blocks == blocks.changes()


# ---- what carries over -----------------------------------------------------------------------------


def test_the_same_network_carries_everything(unet, inputs):
    copy, transplant = surgery.rebuild(unet)
    assert len(transplant.carried) == 686
    assert differs(unet, copy, inputs) == 0
    copy.conv_in.weight.zero_()  # the donor keeps its own
    assert float(unet.conv_in.weight.abs().sum()) > 0


@pytest.mark.parametrize(
    ("change", "zero", "new"),
    [
        # A second block in each of 16 transformers: three branches, each ending in a weight and a bias.
        ({"transformer_depth": 2}, 16 * 6, 16 * 14),
        # The lowest level's five transformers: each ends in one convolution.
        ({"attention": (True, True, True, True)}, 5 * 2, 5 * 24),
    ],
    ids=["deeper transformers", "attention at the lowest level"],
)
def test_a_network_that_only_gained_branches_computes_what_it_did(unet, inputs, change, zero, new):
    changed, transplant = surgery.rebuild(unet, replace(unet.config, **change))
    assert (len(transplant.zero), len(transplant.new)) == (zero, new)
    assert not transplant.left_behind
    assert differs(unet, changed, inputs) == 0


def test_new_branches_learn(unet, inputs):
    changed, transplant = surgery.rebuild(unet, replace(unet.config, transformer_depth=2))
    with torch.enable_grad():
        changed.requires_grad_(True)(*inputs).square().mean().backward()
    ends = [changed.get_parameter(name) for name in transplant.zero]
    assert all(float(parameter.grad.abs().max()) > 0 for parameter in ends)


def test_a_wider_context_is_met_with_zeros(unet, inputs):
    changed, transplant = surgery.rebuild(unet, replace(unet.config, context_width=96))
    assert len(transplant.resized) == 2 * 16
    x, t, context = inputs
    wide = torch.cat([context, noise("more", (2, 77, 32))], dim=-1)
    # One product of 96 columns adds up in another order than one of 64.
    torch.testing.assert_close(changed(x, t, wide), unet(x, t, context), rtol=1e-5, atol=1e-5)


def test_more_latent_channels_are_met_with_zeros(unet, inputs):
    """As the published inpainting U-Net was made: nine channels in; here nine out as well."""
    changed, transplant = surgery.rebuild(unet, replace(unet.config, latent_channels=9))
    assert set(transplant.resized) == {"conv_in.weight", "conv_out.weight", "conv_out.bias"}
    x, t, context = inputs
    eps = changed(torch.cat([x, noise("mask", (2, 5, 16, 16))], dim=1), t, context)
    torch.testing.assert_close(eps[:, :4], unet(x, t, context), rtol=1e-5, atol=1e-5)
    assert not eps[:, 4:].any()


def test_a_narrower_context_drops_columns(unet):
    changed, _ = surgery.rebuild(unet, replace(unet.config, context_width=16))
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    assert torch.equal(changed.get_parameter(name), unet.get_parameter(name)[:, :16])


def test_what_is_lost_is_named(unet):
    changed, transplant = surgery.rebuild(unet, replace(unet.config, mid_attention=False, attention=(True, True) * 2))
    assert {name.split(".attentions")[0] for name in transplant.left_behind} == {"mid_block"}
    _, narrower = surgery.rebuild(unet, replace(unet.config, widths=(32, 64, 128, 64)))
    assert "mid_block.resnets.0.conv1.weight" in narrower.left_behind
    assert "mid_block.resnets.0.conv1.weight" in narrower.new  # another shape: not a corner of the old one
    assert "mid_block.resnets.0.conv1.weight" not in narrower.carried
    assert "left behind" in str(narrower)
    assert changed.config.mid_attention is False


def test_new_layers_depend_on_the_seed_alone(unet):
    config = replace(unet.config, widths=(32, 64, 128, 64))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, _ = surgery.rebuild(unet, config, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    again, _ = surgery.rebuild(unet, config, seed=5)
    other, _ = surgery.rebuild(unet, config, seed=6)
    name = "mid_block.resnets.0.conv1.weight"
    assert torch.equal(first.get_parameter(name), again.get_parameter(name))
    assert not torch.equal(first.get_parameter(name), other.get_parameter(name))


def test_dtype_is_the_donors():
    donor = UNet(UNetConfig(widths=(32,), attention=(True,), context_width=8)).to(torch.bfloat16)
    changed, _ = surgery.rebuild(donor, replace(donor.config, transformer_depth=2))
    assert {parameter.dtype for parameter in changed.parameters()} == {torch.bfloat16}


def test_a_plan_needs_no_weights():
    donor = {name: tuple(tensor.shape) for name, tensor in build(SD15.unet).state_dict().items()}
    transplant = surgery.plan(donor, build(replace(SD15.unet, transformer_depth=2)))
    assert len(transplant.carried) == 686
    first = str(transplant).splitlines()[0]
    assert first == "carried over           686 tensors,   859,520,964 values"


def test_settings_come_back_from_the_shapes_and_the_file():
    config = replace(SMALL.unet, transformer_depth=2, mid_attention=False)
    shapes = {name: tuple(tensor.shape) for name, tensor in build(config).state_dict().items()}
    assert infer_config("unet", shapes, asdict(config)) == config
