"""Mistakes in the U-Net."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.blocks import GEGLU, Attention, Downsample, SpatialTransformer, Upsample
from ldm.unet import UNet, UpBlock, timestep_embedding
from ldm_tools.traps.conventions import Conventions, replaced


class _Instead(nn.Module):
    """Another forward pass with a module's weights: forward(module, *inputs)."""

    def __init__(self, module: nn.Module, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.module = module
        self.wrong = forward

    def forward(self, *inputs: Tensor | None) -> Tensor:
        return self.wrong(self.module, *inputs)


def _with(recipe: Conventions, kind: type[nn.Module], forward: Callable[..., Tensor]) -> Conventions:
    return replace(recipe, unet=replaced(recipe.unet, kind, lambda module: _Instead(module, forward)))


def tanh_gelu(recipe: Conventions) -> Conventions:
    """GELU's tanh approximation in the feed-forward's gate; SD1.5 has the exact one."""

    def forward(module: GEGLU, x: Tensor) -> Tensor:
        value, gate = module.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate, approximate="tanh")

    return _with(recipe, GEGLU, forward)


def gate_first(recipe: Conventions) -> Conventions:
    """The first half of the projection as the gate; it is the second."""

    def forward(module: GEGLU, x: Tensor) -> Tensor:
        gate, value = module.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)

    return _with(recipe, GEGLU, forward)


def one_epsilon(recipe: Conventions) -> Conventions:
    """1e-5 in every GroupNorm; in front of the transformers it is 1e-6."""
    unet = copy.deepcopy(recipe.unet)
    for module in unet.modules():
        if isinstance(module, SpatialTransformer):
            module.norm.eps = 1e-5
    return replace(recipe, unet=unet)


def sines_first(recipe: Conventions) -> Conventions:
    """The time embedding as [sin, cos], the transformer's order; SD1.5's is [cos, sin]."""
    unet = copy.deepcopy(recipe.unet)
    unet.set_submodule(
        "time_embedding",
        _Instead(unet.time_embedding, lambda module, x: module(torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1))),
    )
    return replace(recipe, unet=unet)


def frequencies_to_the_end(recipe: Conventions) -> Conventions:
    """Frequencies that reach 1/10000 (a division by half - 1, diffusers' default shift of 1); SD1.5's stop before."""
    unet = copy.deepcopy(recipe.unet)
    half = recipe.unet.config.widths[0] // 2

    def forward(module: nn.Module, x: Tensor) -> Tensor:
        slowest = math.exp(-math.log(10000.0) * (half - 1) / half)
        t = (torch.atan2(x[:, -1], x[:, half - 1]).double() / slowest).round()
        frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32) / (half - 1))
        angles = t.float()[:, None] * frequencies.to(x.device)
        return module(torch.cat([angles.cos(), angles.sin()], dim=-1).to(x.dtype))

    unet.set_submodule("time_embedding", _Instead(unet.time_embedding, forward))
    return replace(recipe, unet=unet)


def heads_of_width_8(recipe: Conventions) -> Conventions:
    """`attention_head_dim: 8` of the published configuration read as the heads' width; it is their number."""
    unet = copy.deepcopy(recipe.unet)
    for module in unet.modules():
        if isinstance(module, Attention):
            module.heads = module.to_q.out_features // 8
    return replace(recipe, unet=unet)


def heads_interleaved(recipe: Conventions) -> Conventions:
    """Channels dealt out to the heads one by one, "(d h)"; a head is a run of neighbouring channels, "(h d)"."""

    def forward(module: Attention, x: Tensor, context: Tensor | None = None) -> Tensor:
        source = x if context is None else context
        split = [
            rearrange(part, "b n (d h) -> b h n d", h=module.heads)
            for part in (module.to_q(x), module.to_k(source), module.to_v(source))
        ]
        return module.to_out(rearrange(F.scaled_dot_product_attention(*split), "b h n d -> b n (d h)"))

    return _with(recipe, Attention, forward)


def skips_first(recipe: Conventions) -> Conventions:
    """cat([skip, x]) on the way up; SD1.5 has cat([x, skip])."""
    unet = copy.deepcopy(recipe.unet)
    for block in unet.up_blocks:
        assert isinstance(block, UpBlock)
        for i, resnet in enumerate(block.resnets):
            block.resnets[i] = _Instead(resnet, _skip_first(_own_channels(unet, block, i)))
    return replace(recipe, unet=unet)


def _own_channels(unet: UNet, block: UpBlock, i: int) -> int:
    """Of the input of a block's resnet i: the channels that come from below, not from the skip."""
    level = list(unet.up_blocks).index(block)
    widths = unet.config.widths[::-1]
    return widths[level] if i else widths[max(level - 1, 0)]


def _skip_first(own: int) -> Callable[..., Tensor]:
    return lambda resnet, x, time: resnet(torch.cat([x[:, own:], x[:, :own]], dim=1), time)


def bilinear_upsampling(recipe: Conventions) -> Conventions:
    """Smooth upsampling; SD1.5 repeats each pixel."""

    def forward(module: Upsample, x: Tensor) -> Tensor:
        return module.conv(F.interpolate(x, scale_factor=2.0, mode="bilinear"))

    return _with(recipe, Upsample, forward)


def asymmetric_padding(recipe: Conventions) -> Conventions:
    """The autoencoder's padding (right and bottom only) in the U-Net's downsamplers."""

    def forward(module: Downsample, x: Tensor) -> Tensor:
        conv = module.conv
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), conv.weight, conv.bias, stride=2)

    return _with(recipe, Downsample, forward)


def wrong_time(recipe: Conventions) -> Conventions:
    """The number of the step in place of the timestep: 49 ... 0 for 981 ... 1."""
    unet = copy.deepcopy(recipe.unet)

    def forward(module: nn.Module, x: Tensor) -> Tensor:
        half = x.shape[1] // 2
        slowest = math.exp(-math.log(10000.0) * (half - 1) / half)
        t = (torch.atan2(x[:, -1], x[:, half - 1]).double() / slowest).round()
        return module(timestep_embedding(t // 20, x.shape[1]).to(x.dtype))

    unet.set_submodule("time_embedding", _Instead(unet.time_embedding, forward))
    return replace(recipe, unet=unet)
