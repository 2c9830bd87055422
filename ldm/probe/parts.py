"""The parts of a U-Net that can be taken out, each with the edit that takes it out.

A residual branch is removed by zeroing its last layer: what goes past it goes on. A whole block loses all its branches;
its resampling and the resnets' shortcuts, without which shapes would not fit, stay.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from ldm.blocks import BasicTransformerBlock, ResnetBlock, SpatialTransformer
from ldm.probe.attentions import inside
from ldm.probe.edits import Edit, zero
from ldm.probe.taps import places
from ldm.unet import DownBlock, MidBlock, UNet, UpBlock

HEAD = "cross-attention head"
KINDS = ("block", "skip", "resnet", "self-attention", "cross-attention", "feed-forward", HEAD)


@dataclass(frozen=True)
class Part:
    """One part, and what removes it."""

    kind: str  # one of KINDS
    name: str  # its key path; of a head followed by its number
    edits: Mapping[str, Edit]

    @property
    def label(self) -> str:
        """The name for a figure: "up 1.0" for the first of its kind in up_blocks.1."""
        return short(self.name)


def parts(unet: UNet, kinds: Collection[str] = KINDS) -> list[Part]:
    """The parts of some kinds, each kind in the order of execution.

    Raises:  ValueError: a kind that is none of KINDS.
    """
    if unknown := sorted(set(kinds) - set(KINDS)):
        raise ValueError(f"kinds: got {unknown[0]!r}, expected some of {', '.join(KINDS)}")
    found = [
        *(Part("block", name, _branches(unet, name)) for name, _ in _of(unet, DownBlock, MidBlock, UpBlock)),
        *(Part("skip", name, {name: zero()}) for name in places(unet) if ".skips." in name),
        *(Part("resnet", name, {f"{name}.conv2": zero()}) for name, _ in _of(unet, ResnetBlock)),
        *_transformer_parts(unet, "self-attention", "attn1"),
        *_transformer_parts(unet, "cross-attention", "attn2"),
        *_transformer_parts(unet, "feed-forward", "ff"),
        *_heads(unet),
    ]
    return [part for part in found if part.kind in kinds]


def cross_attentions(unet: UNet) -> list[str]:
    """The names of the cross-attentions, in the order of execution: the depth at which a prompt comes in."""
    return [name for name, module in unet.named_modules() if "context" in inside(module)]


def short(name: str) -> str:
    """ "up_blocks.1.attentions.0.transformer_blocks.0.attn2" -> "up 1.0"; "mid_block.resnets.1" -> "mid 1"."""
    side, *rest = name.replace("_blocks", "").replace("_block", "").split(".")
    numbers = [part for part in rest if part.isdigit()]
    return " ".join([side, ".".join(numbers[: 1 if side == "mid" else 2])]).strip()


def _of(unet: UNet, *kinds: type[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in unet.named_modules() if isinstance(module, kinds))


def _branches(unet: UNet, block: str) -> dict[str, Edit]:
    """What removes every residual branch of a block."""
    under = f"{block}."
    resnets = {f"{name}.conv2": zero() for name, _ in _of(unet, ResnetBlock) if name.startswith(under)}
    transformers = {f"{name}.proj_out": zero() for name, _ in _of(unet, SpatialTransformer) if name.startswith(under)}
    return resnets | transformers


def _transformer_parts(unet: UNet, kind: str, branch: str) -> list[Part]:
    names = [f"{name}.{branch}" for name, _ in _of(unet, BasicTransformerBlock)]
    return [Part(kind, name, {name: zero()}) for name in names]


def _heads(unet: UNet) -> list[Part]:
    return [
        Part(HEAD, f"{name}.{head}", {f"{name}.heads": zero().only(heads=[head])})
        for name in cross_attentions(unet)
        for head in range(unet.get_submodule(name).heads)  # type: ignore[arg-type]
    ]
