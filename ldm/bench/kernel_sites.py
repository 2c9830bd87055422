"""Where SD1.5's U-Net meets a fused kernel: which shapes, how often a step, and what each costs at the very least.

Letters: B batch, N query positions, M key positions, h heads of width d, C channels, H W height and width.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from ldm.blocks import GEGLU, Attention, BasicTransformerBlock
from ldm.config import CONTEXT_TOKENS, SD15, UNetConfig
from ldm.fast.backend import Backend
from ldm.fast.ops import Ops
from ldm.unet import UNet

HALF_BYTES = 2


@dataclass(frozen=True)
class Site:
    """One operation at one shape. sizes: what its name calls for, without the batch."""

    op: str  # "attention", "cross_attention", "group_norm", "group_norm_silu", "geglu", "add_layer_norm"
    sizes: tuple[int, ...]  # (N, M, h, d) of an attention, (C, H, W) of a group norm, else (N, C)
    count: int  # a step of the U-Net

    @property
    def name(self) -> str:
        """ "attention 4096x4096 8x40"."""
        if self.op in ("attention", "cross_attention"):
            n, m, heads, width = self.sizes
            return f"{self.op} {n}x{m} {heads}x{width}"
        return f"{self.op} {'x'.join(map(str, self.sizes))}"

    def flops(self, batch: int, backward: bool = False) -> int:
        """Of its matrix products: two of them forward, and five more backward, which has to compute q k^T again."""
        if self.op not in ("attention", "cross_attention"):
            return 0
        n, m, heads, width = self.sizes
        return 2 * (7 if backward else 2) * batch * heads * n * m * width

    def bytes(self, batch: int, backward: bool = False) -> int:
        """That have to be read and written in half precision, each once; backward: of forward and backward."""
        if self.op in ("attention", "cross_attention"):
            n, m, heads, width = self.sizes
            return HALF_BYTES * batch * heads * width * (2 * n + 2 * m) * (3 if backward else 1)
        forward, back = {"geglu": (3, 5), "add_layer_norm": (4, 4)}.get(self.op, (2, 3))  # passes over its numbers
        return HALF_BYTES * batch * (forward + back * backward) * torch.Size(self.sizes).numel()


@cache
def sites(config: UNetConfig = SD15.unet) -> tuple[Site, ...]:
    """Every site of one step, found by running the network without numbers; the most costly shapes first."""
    counts: Counter[tuple[str, tuple[int, ...]]] = Counter()
    with torch.device("meta"):
        unet = UNet(config)
        for name, module in unet.named_modules():
            if watch := _watcher(name, module):
                module.register_forward_pre_hook(lambda m, args, watch=watch: counts.update(watch(args)))
    _run_without_numbers(unet)
    all_sites = [Site(op, sizes, count) for (op, sizes), count in counts.items()]
    return tuple(sorted(all_sites, key=lambda site: (-site.flops(1), -site.bytes(1), site.name)))


def _run_without_numbers(unet: UNet) -> None:
    """One image through a network on the meta device."""
    config, size = unet.config, unet.config.sample_size
    with torch.device("meta"), torch.no_grad():
        x_t = torch.empty(1, config.latent_channels, size, size)
        unet(x_t, 0, torch.empty(1, CONTEXT_TOKENS, config.context_width))


def _watcher(name: str, module: nn.Module) -> Callable[[tuple[Tensor, ...]], list[tuple[str, tuple[int, ...]]]] | None:
    """What a module's arguments say about the sites in it; None where it has none."""
    if isinstance(module, Attention):
        heads = module.heads

        def attention(args: tuple[Tensor, ...]) -> list[tuple[str, tuple[int, ...]]]:
            op, source = ("attention", args[0]) if len(args) == 1 else ("cross_attention", args[1])
            return [(op, (args[0].shape[1], source.shape[1], heads, args[0].shape[2] // heads))]

        return attention
    if isinstance(module, nn.GroupNorm):  # a resnet's has the activation behind it
        op = "group_norm_silu" if re.search(r"resnets\.\d+\.norm\d$", name) else "group_norm"
        return lambda args: [(op, tuple(args[0].shape[1:]))]
    if isinstance(module, GEGLU):
        out_width = module.proj.out_features // 2
        return lambda args: [("geglu", (args[0].shape[1], out_width))]
    if isinstance(module, BasicTransformerBlock):
        return lambda args: 2 * [("add_layer_norm", tuple(args[0].shape[1:]))]
    return None


# ---- to run them -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """A site made ready to run: its operation, by torch or a kernel, and leaves to differentiate with respect to."""

    run: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]


def prepare(site: Site, batch: int, device: str, dtype: torch.dtype, backend: Backend = "torch") -> Call:
    """Seeded inputs, laid out as the network lays them out. backend: what computes the site."""
    ops = Ops(backend)
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    if site.op in ("attention", "cross_attention"):
        n, m, heads, width = site.sizes
        q, k, v = (randn(batch, length, heads * width).requires_grad_() for length in (n, m, m))
        return Call(lambda: ops.attention(q, k, v, heads), (q, k, v))
    x = randn(batch, *site.sizes)
    if site.op.startswith("group_norm"):
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        norm = nn.GroupNorm(SD15.unet.norm_groups, site.sizes[0]).to(device, dtype)
        return Call(lambda: ops.group_norm(x, norm, silu=site.op.endswith("silu")), (x, *norm.parameters()))
    if site.op == "geglu":
        both = randn(batch, site.sizes[0], 2 * site.sizes[1]).requires_grad_()
        return Call(lambda: ops.geglu(both), (both,))
    branch, layer_norm = randn(batch, *site.sizes).requires_grad_(), nn.LayerNorm(site.sizes[1]).to(device, dtype)
    x.requires_grad_()
    return Call(lambda: ops.add_layer_norm(x, branch, layer_norm)[1], (x, branch, *layer_norm.parameters()))
