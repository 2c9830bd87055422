"""What every block of a network does to the shapes, and what it costs: parameters, FLOPs, memory.

The network runs on the meta device, which computes shapes and nothing else: SD1.5 at 2048 x 2048 pixels takes no memory
and a second. FLOPs are those of convolutions and matrix products, two for each multiplication and its addition, as
torch.utils.flop_counter counts them; norms and activations are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from ldm.checkpoint.loading import build
from ldm.config import Config
from ldm.unet import UNet
from ldm.vae import AutoencoderKL

# A line of the trace is one of these lists' items, one of these modules, or a layer that is in none of them.
BLOCK_LISTS = ("resnets", "attentions", "downsamplers", "upsamplers", "layers")
BLOCKS = ("embeddings", "time_embedding")


@dataclass(frozen=True)
class Block:
    """One line: a block as it ran.

    flops: of this call.  kept_bytes: what the backward pass needs of it in this dtype, with fused attention: the
    activations that training holds; weights are not counted, a tensor that two blocks need is counted at the first.
    """

    name: str
    input: tuple[int, ...]
    output: tuple[int, ...]
    parameters: int
    flops: int
    kept_bytes: int


@dataclass(frozen=True)
class Cost:
    """The sum of some blocks."""

    parameters: int
    flops: int
    kept_bytes: int

    @classmethod
    def of(cls, blocks: Iterable[Block | Cost]) -> Cost:
        rows = [(block.parameters, block.flops, block.kept_bytes) for block in blocks]
        return cls(*(sum(column) for column in zip((0, 0, 0), *rows, strict=True)))


def trace(network: nn.Module, run: Callable[[], object]) -> list[Block]:
    """The blocks of a network in the order in which `run` calls them.

    Args:    network: on the meta device, parameters asking for gradients.  run: calls it.
    """
    meter = _Meter(network)
    with ExitStack() as stack:
        for name, module in block_modules(network):
            stack.callback(module.register_forward_pre_hook(meter.start).remove)
            stack.callback(module.register_forward_hook(meter.stop(name)).remove)
        stack.enter_context(saved_tensors_hooks(meter.keep, lambda tensor: tensor))
        stack.enter_context(meter.counter)
        stack.enter_context(_FusedAttention(meter))
        run()
    return meter.blocks


def trace_unet(network: UNet, size: tuple[int, int], batch: int = 1, tokens: int = 77) -> list[Block]:
    """One evaluation of a U-Net on the meta device; size: height and width of the latent."""
    config, dtype = network.config, network.conv_in.weight.dtype
    x_t = torch.empty(batch, config.latent_channels, *size, dtype=dtype, device="meta")
    context = torch.empty(batch, tokens, config.context_width, dtype=dtype, device="meta")
    return trace(network, lambda: network(x_t, 500, context))


def trace_model(config: Config, size_px: tuple[int, int] | None = None, batch: int = 1) -> dict[str, list[Block]]:
    """Every network of a model, in float32.

    Args:    size_px: height and width of the image; None: as it was trained.  batch: images.
    Returns: "clip" (a prompt for each image), "unet" (one evaluation without guidance), "vae.encode", "vae.decode".
    Raises:  ValueError: a size that the networks cannot halve often enough.
    """
    f = config.vae.downscale
    height, width = size_px or (f * config.unet.sample_size,) * 2
    multiple = f * 2 ** (len(config.unet.widths) - 1)
    if height % multiple or width % multiple or min(height, width) < multiple:
        raise ValueError(f"size_px: got {height} x {width}, expected multiples of {multiple}")
    clip, vae, unet = (build(part) for part in (config.clip, config.vae, config.unet))
    assert isinstance(vae, AutoencoderKL)
    assert isinstance(unet, UNet)
    ids = torch.empty(batch, config.clip.tokens, dtype=torch.int64, device="meta")
    images = torch.empty(batch, config.vae.image_channels, height, width, device="meta")
    z = torch.empty(batch, config.vae.latent_channels, height // f, width // f, device="meta")
    return {
        "clip": trace(clip, lambda: clip(ids)),
        "unet": trace_unet(unet, (height // f, width // f), batch, config.clip.tokens),
        "vae.encode": trace(vae, lambda: vae.encode(images)),
        "vae.decode": trace(vae, lambda: vae.decode(z)),
    }


def block_modules(network: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules that get a line each: together they hold every parameter once."""
    *_, parent = ["", *prefix.rstrip(".").split(".")]
    for name, module in network.named_children():
        path = prefix + name
        if parent in BLOCK_LISTS or name in BLOCKS or not any(True for _ in module.children()):
            if not isinstance(module, nn.Identity | nn.ModuleList):
                yield path, module
        else:
            yield from block_modules(module, f"{path}.")


def by_part(blocks: Sequence[Block]) -> dict[str, Cost]:
    """Costs by resolution: "conv_in", "down_blocks.0" ... in running order."""
    parts: dict[str, list[Block]] = {}
    for block in blocks:
        first, *rest = block.name.split(".")
        part = f"{first}.{rest[0]}" if rest and rest[0].isdigit() else first
        parts.setdefault(part, []).append(block)
    return {part: Cost.of(rows) for part, rows in parts.items()}


class _Meter:
    """Reads two counters before and after each block."""

    def __init__(self, network: nn.Module) -> None:
        self.blocks: list[Block] = []
        self.counter = FlopCounterMode(display=False)
        self.attention_flops = 0
        self.kept: list[Tensor] = []  # held, so that no storage's address is used twice
        self.kept_bytes = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in network.state_dict(keep_vars=True).values()}
        self.before = (0, 0)

    def flops(self) -> int:
        return self.counter.get_total_flops() + self.attention_flops

    def keep(self, tensor: Tensor) -> Tensor:
        """Count a tensor that autograd saves, once for each storage."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.kept.append(tensor)
            self.kept_bytes += storage.nbytes()
        return tensor

    def start(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.before = (self.flops(), self.kept_bytes)

    def stop(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            flops, kept = self.flops() - self.before[0], self.kept_bytes - self.before[1]
            parameters = sum(parameter.numel() for parameter in module.parameters())
            self.blocks.append(Block(name, tuple(args[0].shape), tuple(output.shape), parameters, flops, kept))

        return hook


class _FusedAttention(TorchFunctionMode):
    """Puts a fused attention's costs in place of the meta device's, which writes out and keeps the N x M scores."""

    def __init__(self, meter: _Meter) -> None:
        super().__init__()
        self.meter = meter

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = args
        scores = math.prod(q.shape[:-1]) * k.shape[-2]
        self.meter.attention_flops += 2 * scores * (q.shape[-1] + v.shape[-1])
        return _AttentionShapes.apply(q, k, v)


class _AttentionShapes(torch.autograd.Function):
    """Shapes in, shape out; keeps what a fused attention keeps: q, k, v, the output and one number a row."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, positions, _ = q.shape
        out = q.new_empty(batch, positions, heads, v.shape[-1]).transpose(1, 2)  # so laid out that heads join by a view
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out
