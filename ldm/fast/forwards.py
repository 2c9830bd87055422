"""The forwards that are installed: each computes what the module's own does, with fewer and larger steps.

A step that spans several modules is taken only where nobody watches or replaced the modules inside it; else each is
called as the module that it is. So hooks see the places and the values of the plain network.

Letters: B batch, C channels, N = H*W positions, L context tokens, D context width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.blocks import GEGLU, Attention, BasicTransformerBlock, FeedForward, ResnetBlock, Upsample
from ldm.clip import SelfAttention
from ldm.fast import bands, onednn, small_maps, winograd
from ldm.fast.ops import Ops
from ldm.fast.projections import project
from ldm.fast.watching import intercepted, ordinary, readable, untouched, watched
from ldm.vae import Decoder, UpLevel

LARGE = 16 << 20  # bytes in the hidden layer of one image's feed-forward: from here on it is made in parts
HIDDEN = 24 << 20  # bytes in one: Linux clears what malloc asks for anew, from 32 MiB each time


def resnet(ops: Ops, block: ResnetBlock, x: Tensor, time: Tensor | None = None) -> Tensor:
    """x: (B, C_in, H, W), time: (B, time_width) -> (B, C_out, H, W)."""
    h = block.conv1(_norm_silu(ops, block.norm1, x))
    if time is not None:
        time = block.time_emb_proj(F.silu(time))
    h = block.conv2(_norm_silu(ops, block.norm2, h, time))
    return h + (x if block.conv_shortcut is None else block.conv_shortcut(x))


def _norm_silu(ops: Ops, norm: nn.Module, x: Tensor, time: Tensor | None = None) -> Tensor:
    if isinstance(norm, nn.GroupNorm) and untouched(norm, nn.GroupNorm):
        return ops.group_norm(x, norm, time, silu=True)
    return F.silu(norm(x if time is None else x + time[:, :, None, None]))


def group_norm(ops: Ops, norm: nn.GroupNorm, input: Tensor) -> Tensor:
    """(B, C, H, W) -> the same shape."""
    return ops.group_norm(input, norm)


def attention(ops: Ops, block: Attention, x: Tensor, context: Tensor | None = None) -> Tensor:
    """x: (B, N, C), context: (B, L, D) -> (B, N, C)."""
    if context is None:
        q, k, v = project(x, block.to_q, block.to_k, block.to_v)
    else:
        q, (k, v) = block.to_q(x), project(context, block.to_k, block.to_v)
    return block.to_out(ops.attention(q, k, v, block.heads))


def causal_attention(ops: Ops, block: SelfAttention, x: Tensor) -> Tensor:
    """(B, L, D) -> (B, L, D)."""
    q, k, v = block.q_proj(x), block.k_proj(x), block.v_proj(x)
    return block.out_proj(ops.attention(q, k, v, block.heads, causal=True))


def geglu(ops: Ops, block: GEGLU, x: Tensor) -> Tensor:
    """(B, N, C) -> (B, N, out_width)."""
    return ops.geglu(block.proj(x))


def feed_forward(ops: Ops, block: FeedForward, x: Tensor) -> Tensor:
    """(B, N, C) -> (B, N, C); where one image's hidden layer of N x 8C numbers is large, HIDDEN bytes at a time."""
    if not readable(x, 3) or x.device.type != "cpu" or not len(x):
        return block.net(x)
    a_row = 8 * x.shape[2] * x.element_size()
    if x.shape[1] * a_row < LARGE or intercepted() or not _row_by_row(block):
        return block.net(x)
    rows = winograd.even(x.shape[1], HIDDEN // a_row or 1)
    done = torch.cat([block.net(some) for image in x.split(1) for some in image.split(rows, dim=1)], dim=1)
    return done.view(*x.shape[:2], -1)


def _row_by_row(block: FeedForward) -> bool:
    """Whether a feed-forward is of the layers it is made of, so that no row's result depends on another row."""
    inside = [module for module in block.modules() if module is not block]
    kinds = [type(module) for module in inside]  # of a parametrized layer, a class of its own
    return kinds == [nn.Sequential, GEGLU, nn.Linear, nn.Identity, nn.Linear] and all(map(ordinary, inside))


def transformer_block(ops: Ops, block: BasicTransformerBlock, x: Tensor, context: Tensor) -> Tensor:
    """x: (B, N, C), context: (B, L, D) -> (B, N, C)."""
    x, h = _add_norm(ops, x, block.attn1(block.norm1(x)), block.norm2)
    x, h = _add_norm(ops, x, block.attn2(h, context), block.norm3)
    return x + block.ff(h)


def _add_norm(ops: Ops, x: Tensor, branch: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    if isinstance(norm, nn.LayerNorm) and untouched(norm, nn.LayerNorm):
        return ops.add_layer_norm(x, branch, norm)
    x = x + branch
    return x, norm(x)


def decoder(ops: Ops, block: Decoder, z: Tensor) -> Tensor:
    """z (B, 4, H/f, W/f) -> image (B, 3, H, W); large maps in bands, and none kept longer than it is read."""
    x, own = block.mid_block(block.conv_in(z)), False  # own: nobody else has x, so it may be written to
    for level in block.up_blocks:
        if not (isinstance(level, UpLevel) and untouched(level, UpLevel)):
            x, own = level(x), False
            continue
        for layer in (*level.resnets, *level.upsamplers):
            done = _in_bands(layer, x, own)
            x, own = (layer(x), False) if done is None else (done, True)
    if bands.serves(x) and (done := bands.norm_silu_conv(block.conv_norm_out, block.conv_out, x)) is not None:
        return done
    return block.conv_out(_norm_silu(ops, block.conv_norm_out, x))


def _in_bands(layer: nn.Module, x: Tensor, own: bool) -> Tensor | None:
    """What a layer of the decoder makes of a large map; None where it is to be called as the module that it is."""
    if watched(layer) or not bands.serves(x):
        return None
    if isinstance(layer, Upsample):
        return bands.upsample(layer, x) if untouched(layer, Upsample) else None
    standard = type(layer).forward is ResnetBlock.forward
    ours = getattr(vars(layer).get("forward"), "func", resnet) is resnet
    return bands.resnet(layer, x, own) if isinstance(layer, ResnetBlock) and standard and ours else None


def convolution(ops: Ops, layer: nn.Conv2d, input: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, K, H', W')."""
    if winograd.serves(layer, input):
        return winograd.convolution(input, layer.weight, layer.bias)
    if small_maps.serves(layer, input):
        return small_maps.convolution(input, layer.weight, layer.bias, layer.stride[0])
    return type(layer).forward(layer, input)


def linear(ops: Ops, layer: nn.Linear, input: Tensor) -> Tensor:
    """(..., C) -> (..., K)."""
    if onednn.serves(layer, input):
        return onednn.linear(input, layer.weight, layer.bias)
    return type(layer).forward(layer, input)


@dataclass(frozen=True)
class Replacement:
    """What is installed instead of a forward, and what is gained: by a kernel, by torch alone, by torch on a CPU.

    A class with a forward of its own is in no table, and stays as it is; so does a module that never can be served.
    """

    forward: Callable[..., Any]
    by_kernel: str
    in_torch: str = ""
    on_cpu: str = ""
    may_serve: Callable[[nn.Module], bool] = lambda module: True


FORWARDS: dict[Callable[..., Any], Replacement] = {
    ResnetBlock.forward: Replacement(resnet, "time, group norm and SiLU in one kernel", "SiLU in place"),
    nn.GroupNorm.forward: Replacement(group_norm, "group norm in one kernel"),
    Attention.forward: Replacement(attention, "attention in one kernel"),
    SelfAttention.forward: Replacement(causal_attention, "causal attention in one kernel"),
    GEGLU.forward: Replacement(geglu, "gate and GELU in one kernel", "gate in place"),
    FeedForward.forward: Replacement(feed_forward, "", on_cpu="large ones in parts"),
    BasicTransformerBlock.forward: Replacement(transformer_block, "residual and layer norm in one kernel"),
    Decoder.forward: Replacement(decoder, "", on_cpu="large maps in bands of rows"),
    nn.Conv2d.forward: Replacement(
        convolution,
        "",
        on_cpu="large maps by Winograd's algorithm, small ones by oneDNN",
        may_serve=lambda layer: winograd.may_serve(layer) or small_maps.may_serve(layer),
    ),
    nn.Linear.forward: Replacement(linear, "", on_cpu="large products by oneDNN", may_serve=onednn.may_serve),
}
