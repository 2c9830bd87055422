"""`install` puts faster forwards into the modules of a loaded network; `undo` takes them out.

Each goes onto the module itself, so classes, names and state_dict keys stay, and a copy of the network has it too.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from ldm.blocks import ResnetBlock
from ldm.fast import first_use
from ldm.fast.backend import Backend, resolved
from ldm.fast.cuda_graph import GraphedUNet
from ldm.fast.forwards import FORWARDS, attention
from ldm.fast.openvino_engine import PRECISIONS, OpenVINOUNet
from ldm.fast.ops import HALF, Ops
from ldm.fast.projections import pack
from ldm.fast.side_by_side import SideBySide
from ldm.unet import UNet

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Installed:
    """What was installed into a network: what computes it now, and what was replaced, with how many of each."""

    network: nn.Module
    backend: Literal["torch", "triton", "openvino"]
    replaced: Mapping[str, int]  # "22 x ResnetBlock: ..." without the number -> the number
    graphed: GraphedUNet | None = None
    forwards: list[tuple[nn.Module, Any]] = field(default_factory=list, repr=False)
    strides: Mapping[str, tuple[int, ...]] = field(default_factory=dict, repr=False)  # before, of what was laid anew
    by_openvino: OpenVINOUNet | None = None

    @property
    def cuda_graph_used(self) -> bool:
        """Whether any call of the network was the replay of a CUDA graph."""
        return self.graphed is not None and self.graphed.used

    @property
    def engine(self) -> dict[str, Any] | None:
        """Which other engine computes the network, for run.json; None: none does."""
        return self.by_openvino.record() if self.by_openvino else None

    @property
    def refused(self) -> list[str]:
        """Kernels that were found wrong in this process, a line each; torch computes those operations."""
        return [f"{use}: {why}" for use, why in first_use.refused().items()] if self.backend == "triton" else []

    def __str__(self) -> str:
        """A line for each kind of thing that was replaced."""
        lines = [f"{count:4} x {what}" for what, count in self.replaced.items()]
        return "\n".join(lines or [f"{type(self.network).__name__}: plain torch, nothing replaced"])

    def undo(self) -> None:
        """Make the network bit for bit what it was, weights that were trained meanwhile apart.

        Raises:  ValueError: somebody else has replaced a forward since.
        """
        names = {module: name for name, module in self.network.named_modules()}
        for module, forward in self.forwards:
            if vars(module).get("forward") is not forward:
                raise ValueError(f"{names.get(module, 'module')!r}: its forward was replaced since; put it back first")
        for module, _ in self.forwards:
            del module.forward
        for name, parameter in self.network.named_parameters():
            if name in self.strides:
                own = torch.empty_strided(
                    parameter.shape, self.strides[name], dtype=parameter.dtype, device=parameter.device
                )
                parameter.data = own.copy_(parameter.data)
        if installed(self.network) is self:
            del self.network.installed


def installed(network: nn.Module) -> Installed | None:
    """What is installed in a network; None: nothing, it is plain torch."""
    return vars(network).get("installed")


@torch.no_grad()
def install(
    network: nn.Module,
    *,
    kernels: Backend = "auto",
    packed: bool | None = None,
    channels_last: bool | None = None,
    cuda_graph: bool = False,
) -> Installed:
    """Replace the forwards of a network's modules by faster ones that compute the same.

    What an earlier call installed is undone first, so the last one says what holds. Only modules whose forward is the
    standard one are replaced: blocks of one's own stay as they are.

    Args:    network: one of the three networks, on the device where it is to run.  kernels: see `ldm.fast.backend`.
             packed: q, k, v by one matrix product, k and v of a context likewise.
             channels_last: the layout of the weights that convolutions and norms are fastest in.
             None of either: where kernels run in half precision.  cuda_graph: launch each call as one; a U-Net.
    Returns: the report, which can undo it.
    Raises:  ValueError: a backend that cannot compute there, a CUDA graph of something else than a U-Net.
    """
    first = next(network.parameters())
    backend = resolved(kernels, first.device)
    if cuda_graph and not isinstance(network, UNet):
        raise ValueError(f"cuda_graph: got a {type(network).__name__}, expected a U-Net")
    if backend == "openvino" and isinstance(network, UNet):
        return _by_openvino(network, cuda_graph)
    if before := installed(network):
        before.undo()
    backend = "torch" if backend == "openvino" else backend
    half = backend == "triton" and first.dtype in HALF
    packed, channels_last = (half if chosen is None else chosen for chosen in (packed, channels_last))

    strides = {name: parameter.stride() for name, parameter in network.named_parameters()}
    places = {name: parameter.data_ptr() for name, parameter in network.named_parameters()}
    replaced: Counter[str] = Counter()
    forwards: list[tuple[nn.Module, Any]] = []
    ops = Ops(kernels if backend == "triton" else "torch")
    for module in _replaceable(network):
        replacement = FORWARDS[type(module).forward]
        in_torch = replacement.in_torch or (replacement.on_cpu if first.device.type == "cpu" else "")
        gain = replacement.by_kernel if backend == "triton" else in_torch
        if gain or (packed and replacement.forward is attention):
            module.forward = partial(replacement.forward, ops, module)
            forwards.append((module, module.forward))
        if gain:
            replaced[f"{type(module).__name__}: {gain}"] += 1
    if packed and (count := pack(network)):
        replaced["Attention: projections packed into one matrix product"] = count
    if channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        replaced[f"{type(network).__name__}: weights in channels_last"] = 1
    moved = {name: strides[name] for name, x in network.named_parameters() if x.data_ptr() != places[name]}
    graphed = None
    if cuda_graph:
        network.forward = graphed = GraphedUNet(network)  # type: ignore[assignment]
        forwards.append((network, graphed))
        replaced[f"{type(network).__name__}: one CUDA graph for each shape"] = 1
    elif first.device.type == "cpu" and isinstance(network, UNet) and "forward" not in vars(network):
        network.forward = SideBySide(network).__call__  # type: ignore[method-assign]  # a function: torch.export reads it
        forwards.append((network, network.forward))
        replaced[f"{type(network).__name__}: rows of a large batch on threads of their own"] = 1
    report = Installed(network, backend, dict(replaced), graphed, forwards, moved)
    network.installed = report  # type: ignore[assignment]
    if replaced:
        logger.info("%s", ", ".join(line.strip() for line in str(report).splitlines()))
    return report


def _by_openvino(network: UNet, cuda_graph: bool) -> Installed:
    dtype = network.conv_in.weight.dtype
    if dtype not in PRECISIONS:
        raise ValueError(f"backend: openvino computes in float32 or bfloat16, the U-Net is in {dtype}")
    if cuda_graph:
        raise ValueError("cuda_graph: openvino launches nothing on a GPU; expected one of the two")
    if before := installed(network):
        before.undo()
    network.forward = engine = OpenVINOUNet(network)  # type: ignore[assignment]
    replaced = {f"{type(network).__name__}: computed by OpenVINO in {PRECISIONS[dtype]}": 1}
    report = Installed(network, "openvino", replaced, by_openvino=engine, forwards=[(network, engine)])
    network.installed = report  # type: ignore[assignment]
    logger.info("%s", str(report).strip())
    return report


def _replaceable(network: nn.Module) -> Iterator[nn.Module]:
    """The modules with a standard forward; the norms of a resnet are part of its own."""
    standard = [
        m
        for m in network.modules()
        if type(m).forward in FORWARDS and "forward" not in vars(m) and FORWARDS[type(m).forward].may_serve(m)
    ]
    inside = {norm for m in standard if isinstance(m, ResnetBlock) for norm in (m.norm1, m.norm2)}
    return (module for module in standard if module not in inside)
