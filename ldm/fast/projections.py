"""The query, key and value projections of an attention by one matrix product instead of two or three.

`pack` lays their weights one after the other in memory, so that they are also one matrix. Names, shapes and files stay.
Where gradients, autocast or the compiler are on, where a projection is watched, or is not simply an `nn.Linear` without
bias, such as one with a LoRA, each is called as the module that it is.

Letters: B batch, N positions or tokens, C channels, D the width of what is projected.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.blocks import Attention
from ldm.fast.watching import own_or_ours, transformed, watched


@torch.no_grad()
def pack(network: nn.Module) -> int:
    """Lay weights one after the other: q, k, v of every self-attention, and k, v of every cross-attention.

    The parameters stay who they are; what moves, casts or copies the network later takes them apart again, which costs
    the gain and nothing else.

    Returns: how many attentions were packed.
    """
    packed = 0
    for module in network.modules():
        if isinstance(module, Attention) and type(module).forward is Attention.forward:
            q = () if module.cross else (module.to_q,)
            layers = (*q, module.to_k, module.to_v)
            if _linear(layers) and len({(x.weight.dtype, x.weight.device, x.in_features) for x in layers}) == 1:
                weights = [layer.weight for layer in layers]
                rows = torch.cat(weights).split([len(weight) for weight in weights])
                for weight, its_rows in zip(weights, rows, strict=True):
                    # .data: so that a write to one does not count as a write to the others, which autograd would refuse
                    weight.data = its_rows
                packed += 1
    return packed


def project(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """What each layer makes of x, by one product where their weights are packed.

    Args:    x: (B, N, D).
    Returns: (B, N, C) for each layer; of one product, they are strided views of its result.
    """
    if _linear(layers) and _unseen(x, layers) and (weight := _as_one_matrix(layers)) is not None:
        return F.linear(x, weight).split([len(layer.weight) for layer in layers], dim=-1)
    return tuple(layer(x) for layer in layers)


def _as_one_matrix(layers: tuple[nn.Linear, ...]) -> Tensor | None:
    """(sum of C, D): the weights, where they follow each other in one piece of memory."""
    first = layers[0].weight
    following = first.storage_offset()
    for layer in layers:
        weight = layer.weight
        same_memory = weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same_memory and weight.is_contiguous() and weight.storage_offset() == following):
            return None
        following += weight.numel()
    return first.as_strided((sum(len(layer.weight) for layer in layers), first.shape[1]), first.stride())


def _linear(layers: tuple[nn.Module, ...]) -> TypeGuard[tuple[nn.Linear, ...]]:
    """Whether they are torch's own, with nothing put in their place: no `forward` but ours, no other weights."""
    return all(
        type(layer) is nn.Linear and type(layer.weight) is nn.Parameter and layer.bias is None and own_or_ours(layer)
        for layer in layers
    )


def _unseen(x: Tensor, layers: tuple[nn.Module, ...]) -> bool:
    """Whether nothing but the results of the layers is asked for: no derivative, no compiler, no autocast, no hook."""
    if torch.is_grad_enabled() or transformed():
        return False
    if torch.autograd.forward_ad.unpack_dual(x).tangent is not None:
        return False
    if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
        return False
    return not any(map(watched, layers))
