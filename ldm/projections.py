"""The query, key and value projections of an attention, in fewer matrix products than three a call.

Packed. q, k and v of a self-attention are three products of the same x. `pack` lays their weights one after the other
in memory, so that they are also one matrix, and one product makes all three. Names, shapes and files stay as they are.

Kept. Keys and values of a prompt depend on nothing but the prompt. Of a context marked by `keep`, a cross-attention
makes them once, and has them for as long as the context lives.

Both are for sampling. Where gradients, autocast or the compiler are on, where a projection is watched (ldm/taps) or is
no plain `nn.Linear` without bias, such as one with a LoRA, each is called as the module that it is.

Letters: B batch, N positions or tokens, C channels, D the width of what is projected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from ldm.taps import MultiHead

Stamp = tuple[object, ...]

# ---- packed ----------------------------------------------------------------------------------------


@torch.no_grad()
def pack(network: nn.Module) -> None:
    """Lay weights one after the other: q, k, v of every self-attention, and k, v of every cross-attention.

    Moving or casting the network afterwards takes them apart again, which costs the gain and nothing else.
    """
    for module in network.modules():
        if isinstance(module, MultiHead):
            layers = tuple(module.get_submodule(name) for name in module.projections[1 if module.cross else 0 : 3])
            if _linear(layers):
                weights = [layer.weight for layer in layers]
                rows = torch.cat(weights).split([layer.out_features for layer in layers])
                for layer, weight, its_rows in zip(layers, weights, rows, strict=True):
                    layer.weight = nn.Parameter(its_rows, requires_grad=weight.requires_grad)


def project(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """What each layer makes of x, by one product where their weights are packed.

    Args:    x: (B, N, D).
    Returns: (B, N, C) for each layer; of one product, they are strided views of its result.
    """
    if _linear(layers) and _unseen(x, layers) and (weight := _as_one_matrix(layers)) is not None:
        return F.linear(x, weight).split([layer.out_features for layer in layers], dim=-1)
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
    return first.as_strided((sum(layer.out_features for layer in layers), first.shape[1]), first.stride())


# ---- kept ------------------------------------------------------------------------------------------


@dataclass
class _Made:
    """Keys and values, and the state of all that they were made of."""

    keys_values: tuple[Tensor, ...]
    layers: tuple[nn.Linear, ...]
    stamp: Stamp


_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # a marked context -> {to_k: _Made}


def keep(context: Tensor) -> Tensor:
    """The same context, marked: whoever attends to it keeps its keys and values until nobody holds the result.

    A view, a copy or anything else that is made of it bears no mark. It, and the weights, may be changed in place: its
    keys and values are then made anew.

    Args:    context: (B, L, D).
    Returns: the same memory, without gradient.
    """
    marked = context.detach()
    _kept[marked] = {}
    return marked


def keys_values(context: Tensor, to_k: nn.Module, to_v: nn.Module) -> tuple[Tensor, ...]:
    """k and v, (B, L, C) each, of a context (B, L, D); see `keep`."""
    layers = (to_k, to_v)
    made: dict[nn.Module, _Made] | None = None if torch.compiler.is_compiling() else _kept.get(context)
    if made is None or not _linear(layers) or not _unseen(context, layers):
        return project(context, *layers)
    now = stamp(context, *(layer.weight for layer in layers))
    if now is None:
        return project(context, *layers)
    if to_k not in made or made[to_k].stamp != now:
        made[to_k] = _Made(project(context, *layers), layers, now)
    return made[to_k].keys_values


@torch.no_grad()
def renew(context: Tensor) -> None:
    """Bring what is kept of a marked context up to date where it lies: for a recording that reads it there."""
    for made in _kept[context].values():
        now = stamp(context, *(layer.weight for layer in made.layers))
        if now is not None and made.stamp != now:
            for old, new in zip(made.keys_values, project(context, *made.layers), strict=True):
                old.copy_(new)
            made.stamp = now


def stamp(*tensors: Tensor) -> Stamp | None:
    """Which memory tensors are, and how often it was written; None where torch does not count that.

    As long as the tensors live, an equal stamp means that they, or other views like them, hold the same numbers.
    """
    if torch.compiler.is_compiling() or any(x.is_inference() for x in tensors):
        return None
    return tuple((x.data_ptr(), x._version, x.dtype, x.shape, x.stride()) for x in tensors)


# ---- where this is the same as calling the layers --------------------------------------------------


def _linear(layers: tuple[nn.Module, ...]) -> TypeGuard[tuple[nn.Linear, ...]]:
    return all(type(layer) is nn.Linear and layer.bias is None for layer in layers)


def _unseen(x: Tensor, layers: tuple[nn.Module, ...]) -> bool:
    """Whether nothing but the results of the layers is asked for."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
        return False
    return not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)
