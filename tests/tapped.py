"""Places in the small U-Net, and one call of it that is captured or edited."""

from torch import Tensor, nn

from ldm import probe
from ldm.probe import Taps
from ldm.unet import UNet

CROSS = "up_blocks.1.attentions.0.transformer_blocks.0.attn2"
SELF = "mid_block.attentions.0.transformer_blocks.0.attn1"


def capture(unet: UNet, x: Tensor, context: Tensor, *names: str, t: int = 500) -> Taps:
    with probe.capture(unet, *names) as seen:
        unet(x, t, context)
    return seen


def edited(unet: UNet, x: Tensor, context: Tensor, edits: dict, t: int = 500) -> Tensor:
    with probe.edit(unet, edits):
        return unet(x, t, context)


def hooks_of(network: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules())
