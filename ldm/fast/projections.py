"""The query, key and value projections of an attention, in fewer matrix products than three a call.

Packed. q, k and v of a self-attention are three products of the same x. `pack` lays their weights one after the other
in memory, so that they are also one matrix, and one product makes all three. Names, shapes and files stay as they are.

Kept. Keys and values of a prompt depend on nothing but the prompt. Of a context marked by `keep`, a cross-attention
makes them once, and has them for as long as the context lives.

Both are for sampling. Where gradients, autocast or the compiler are on, where a projection is watched, or
is not simply an `nn.Linear` without bias, such as one with a LoRA, each is called as the module that it is.

Letters: B batch, N positions or tokens, C channels, D the width of what is projected.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from ldm.blocks import Attention

# ---- packed ----------------------------------------------------------------------------------------


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


# ---- kept ------------------------------------------------------------------------------------------


class Unchanged:
    """Tensors as they are now, to be recognised later: the same memory, not written since, on the same CUDA stream.

    It holds them, so that nothing else can come to lie where they do. Writes that torch does not count are not noticed:
    through `.data` or numpy, by fused optimizers, to tensors made in inference mode.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._held = [x.detach() for x in tensors]
        self._writes = _writes(tensors)

    def __call__(self, *tensors: Tensor) -> bool:
        """Whether these are they, or views that cannot be told from them."""
        return _places(self._held) == _places(tensors) and self._writes == _writes(tensors)


def _places(tensors: Sequence[Tensor]) -> list[object]:
    return [(x.data_ptr(), x.dtype, x.shape, x.stride()) for x in tensors]


def _writes(tensors: Sequence[Tensor]) -> list[object]:
    """How many there were, and the stream on which the next would be."""
    device = tensors[0].device
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
    return [stream, *(None if x.is_inference() else x._version for x in tensors)]


@dataclass
class _Made:
    """Keys and values, and whether the weights that made them are as they were."""

    keys_values: tuple[Tensor, ...]
    by: Unchanged


_kept: MutableMapping[Tensor, WeakKeyDictionary[nn.Module, _Made]] = WeakTensorKeyDictionary()
"""A marked context -> to_k -> what was made of it there."""


def keep(context: Tensor) -> Tensor:
    """The same context, marked: whoever attends to it keeps its keys and values until nobody holds the result.

    A view, a copy or anything else that is made of it bears no mark. Whoever marks a context sees to it that it is not
    written any more. Weights may be, as far as `Unchanged` notices.

    Args:    context: (B, L, D).
    Returns: the same memory, without gradient.
    """
    marked = context.detach()
    _kept[marked] = WeakKeyDictionary()
    return marked


def keys_values(context: Tensor, to_k: nn.Module, to_v: nn.Module) -> tuple[Tensor, ...]:
    """k and v, (B, L, C) each, of a context (B, L, D); see `keep`."""
    layers = (to_k, to_v)
    made = None if torch.compiler.is_compiling() else _kept.get(context)
    if made is None or not _linear(layers) or not _unseen(context, layers) or recording(context):
        return project(context, *layers)
    weights = [layer.weight for layer in layers]
    mine = made.get(to_k)
    if mine is None or not mine.by(*weights):
        mine = made[to_k] = _Made(project(context, *layers), Unchanged(*weights))
    return mine.keys_values


# ---- where this is the same as calling the layers --------------------------------------------------


def _linear(layers: tuple[nn.Module, ...]) -> TypeGuard[tuple[nn.Linear, ...]]:
    """Whether they are torch's own, with nothing put in their place: no `forward` of their own, no other weights."""
    return all(
        type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter
        and layer.bias is None
        and "forward" not in vars(layer)
        for layer in layers
    )


def _unseen(x: Tensor, layers: tuple[nn.Module, ...]) -> bool:
    """Whether nothing but the results of the layers is asked for."""
    if differentiated(x) or torch.compiler.is_compiling():
        return False
    if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
        return False
    return not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)


def differentiated(x: Tensor) -> bool:
    """Whether gradients may be asked for, or x carries a forward derivative, or torch.func is at work."""
    forward = torch.autograd.forward_ad.unpack_dual(x).tangent is not None
    return torch.is_grad_enabled() or torch._C._are_functorch_transforms_active() or forward


def recording(x: Tensor) -> bool:
    """Whether a CUDA graph is being recorded: it must read the prompts that lie there when it is replayed."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
