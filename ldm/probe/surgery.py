"""Changing the U-Net: other numbers, other blocks, and what a trained network brings into the changed one.

    sd = ldm.load("v1-5-pruned-emaonly.safetensors")
    config = replace(sd.config.unet, transformer_depth=2)                        # depth, widths, heads, attention ...
    unet, transplant = surgery.rebuild(sd.unet, config, UNetBlocks(norm=MyNorm))     # a new block: a class and one line
    str(transplant)                                                              # what came along, and what is new
    sd = replace(sd, unet=unet, config=replace(sd.config, unet=unet.config))

Nothing is skipped in silence: every tensor of the new network is carried over, resized, zero or new, and every tensor
of the donor that found no place is named. New branches end in zeros, as in ControlNet [Zhang et al. 2023, section 3.1],
so a network that only gained branches computes what it did before, and learns from there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.blocks import Attention, FeedForward, ResnetBlock, SpatialTransformer
from ldm.checkpoint import CheckpointError, identify, infer_config
from ldm.checkpoint.loading import fill
from ldm.checkpoint.report import explain, require_fit
from ldm.config import UNetConfig
from ldm.unet import UNet, UNetBlocks

Shapes = Mapping[str, tuple[int, ...]]

# The last layer of every branch that is added to its input.
BRANCH_ENDS: Mapping[type[nn.Module], str] = {
    ResnetBlock: "conv2",
    SpatialTransformer: "proj_out",
    Attention: "to_out.0",
    FeedForward: "net.2",
}

# Tensors of which one size may change and the rest still means what it did, and the axis: the latent's channels, and
# the context's width. Other widths are shared by heads, halves of a gate and concatenated skips, so a corner of the old
# weight would land on other channels than before: such tensors begin anew.
RESIZABLE = {r"conv_in\.weight": 1, r"conv_out\.(weight|bias)": 0, r".*\.attn2\.to_[kv]\.weight": 1}


@dataclass(frozen=True)
class Transplant:
    """Where every tensor of a changed network comes from: our names -> shapes.

    carried: the donor's, as it was.  resized: the donor's, with zeros for the inputs or outputs that were added.
    zero: ends of new branches.  new: as torch initialises such a layer.
    left_behind: the donor's tensors that the network has no place for, or has in another shape.
    """

    carried: Shapes
    resized: Shapes
    zero: Shapes
    new: Shapes
    left_behind: Shapes

    def __str__(self) -> str:
        """One line for each kind: how many tensors and values, and which."""
        kinds = {
            "carried over": self.carried,
            "resized, zeros added": self.resized,
            "new, zero": self.zero,
            "new, initialised": self.new,
            "left behind": self.left_behind,
        }
        return "\n".join(
            f"{kind:21} {len(shapes):4} tensors, {sum(map(math.prod, shapes.values())):>13,} values"
            + (f"  {places(shapes)}" if kind != "carried over" and shapes else "")
            for kind, shapes in kinds.items()
        )


def places(shapes: Shapes, limit: int = 4) -> str:
    """Where tensors lie, in a few words: their blocks, each once."""
    blocks = list(dict.fromkeys(".".join(name.split(".")[:4]).removesuffix(".weight") for name in shapes))
    more = f" and {len(blocks) - limit} more" if len(blocks) > limit else ""
    return ", ".join(blocks[:limit]) + more


def plan(donor: Shapes, network: nn.Module) -> Transplant:
    """Say what a donor's tensors become in a network; reads shapes only, so both may be on the meta device."""
    ends = set(_new_branch_ends(network, donor))
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    fates: dict[str, dict[str, tuple[int, ...]]] = {kind: {} for kind in ("carried", "resized", "zero", "new")}
    for name, shape in wanted.items():
        if donor.get(name) == shape:
            kind = "carried"
        elif name in donor and _resizable(name, donor[name], shape):
            kind = "resized"
        else:
            kind = "zero" if name in ends else "new"
        fates[kind][name] = shape
    placed = {*fates["carried"], *fates["resized"]}
    return Transplant(**fates, left_behind={name: shape for name, shape in donor.items() if name not in placed})


def rebuild(
    donor: UNet, config: UNetConfig | None = None, blocks: UNetBlocks | None = None, *, seed: int = 0
) -> tuple[UNet, Transplant]:
    """Build a changed U-Net and carry the donor's weights over; the donor stays as it was.

    Args:    donor: a U-Net with weights.  config, blocks: of the new one; None: the donor's.
             seed: of the new layers' initialisation.
    Returns: the new network in evaluation mode, in the donor's dtype and on its device, and where every tensor
             comes from.
    Raises:  ValueError: when the configuration's numbers do not go together.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = UNet(config or donor.config, blocks or donor.blocks)
    network.to(donor.conv_in.weight.device, donor.conv_in.weight.dtype)
    network.prediction = donor.prediction
    given = donor.state_dict()
    transplant = plan({name: tuple(tensor.shape) for name, tensor in given.items()}, network)
    for name, tensor in network.state_dict().items():  # tensors that share the parameters' memory
        if name in transplant.carried:
            tensor.copy_(given[name])
        elif name in transplant.resized:
            _copy_corner(given[name], tensor)
        elif name in transplant.zero:
            tensor.zero_()
    return network.eval(), transplant


def load(path: str | Path, blocks: UNetBlocks, device: torch.device | str = "cpu") -> UNet:
    """Read a U-Net that is built from other blocks; its numbers are in the file, its code is not.

    Args:    path: what `ldm.checkpoint.save` wrote, U-Net alone or whole model.  blocks: those that it was saved with.
    Raises:  CheckpointError: no U-Net there, blocks of other names than the file's, or keys that do not fit them.
    """
    checkpoint = identify(path)
    if "unet" not in checkpoint.parts:
        raise CheckpointError(f"{path}: holds no U-Net")
    if checkpoint.blocks != blocks.changes():
        raise CheckpointError(
            f"{path}: its U-Net has the blocks ({checkpoint.blocks or 'standard'}), got ({blocks.changes()})"
        )
    tensors = checkpoint.parts["unet"]
    config = infer_config("unet", {name: t.shape for name, t in tensors.items()}, checkpoint.hidden.get("unet"))
    assert isinstance(config, UNetConfig)
    with torch.device("meta"):
        network = UNet(config, blocks)
    alone = replace(checkpoint, parts={"unet": tensors}, unexpected=())
    require_fit(alone, explain(alone, {"unet": {n: tuple(t.shape) for n, t in network.state_dict().items()}}))
    fill(network, tensors, device)
    return network


def _new_branch_ends(module: nn.Module, donor: Shapes, prefix: str = "") -> Iterator[str]:
    """The weights and biases that end a branch of which the donor has nothing."""
    for name, child in module.named_children():
        path = f"{prefix}{name}."
        end = next((end for kind, end in BRANCH_ENDS.items() if isinstance(child, kind)), None)
        if end is not None and not any(key.startswith(path) for key in donor):
            yield from (f"{path}{end}.{key}" for key in child.get_submodule(end).state_dict())
        else:
            yield from _new_branch_ends(child, donor, path)


def _resizable(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    axis = next((axis for pattern, axis in RESIZABLE.items() if re.fullmatch(pattern, name)), None)
    return axis is not None and all(a == b for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if i != axis)


def _copy_corner(source: Tensor, target: Tensor) -> None:
    """Zeros, but for what both have."""
    corner = tuple(slice(min(a, b)) for a, b in zip(source.shape, target.shape, strict=True))
    target.zero_()
    target[corner] = source[corner]
