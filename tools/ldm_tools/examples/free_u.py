"""Example 1: a louder backbone and quieter skips, without training. [Si et al. 2024, "FreeU", section 3.3]

On the way up each resnet meets [backbone, skip]. In the first stages half of the backbone's channels are scaled up
where the backbone is strong, and the lowest frequencies of the skip are scaled down:

    backbone' = (1 + (b - 1) (m - min m) / (max m - min m)) backbone,   m: its mean over the channels
    skip'     = iFFT(s where |frequency| <= 1 cycle, else 1, times FFT(skip))

python -m ldm_tools.examples.free_u
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor

import ldm
from ldm import probe
from ldm.pipeline import PHANTOM_WEIGHTS
from ldm.unet import UNet, UpBlock
from ldm_tools.examples.measure import greys, sample

SD15_STAGES = {0: (1.5, 0.9), 1: (1.6, 0.2)}  # up block: (b, s), as the authors give them for SD1.5


def louder(backbone: Tensor, b: float) -> Tensor:
    """(B, C, H, W), half of its channels scaled by up to b."""
    m = backbone.mean(1, keepdim=True)
    low, high = m.amin((2, 3), keepdim=True), m.amax((2, 3), keepdim=True)
    factor = 1 + (b - 1) * (m - low) / (high - low).clamp(min=1e-6)
    first, second = backbone.chunk(2, dim=1)
    return torch.cat([factor * first, second], dim=1)


def quieter(skip: Tensor, s: float) -> Tensor:
    """(B, C, H, W), its frequencies of at most one cycle in each direction scaled by s."""
    cycles_y, cycles_x = (torch.fft.fftfreq(n, 1 / n, device=skip.device).abs() for n in skip.shape[2:])
    low = (cycles_y[:, None] <= 1) & (cycles_x <= 1)
    return torch.fft.ifft2(torch.fft.fft2(skip.float()) * torch.where(low, s, 1.0)).real.to(skip)


def free_u(unet: UNet, stages: Mapping[int, tuple[float, float]] = SD15_STAGES) -> AbstractContextManager[None]:
    """While open, the U-Net runs re-weighted: `with free_u(sd.unet): ...`; stages: up block -> (b, s)."""
    edits = {}
    for i, (b, s) in stages.items():
        block = unet.up_blocks[i]
        assert isinstance(block, UpBlock)
        kind = "attentions" if block.attentions else "resnets"
        below = "mid_block" if i == 0 else f"up_blocks.{i - 1}"
        for j in range(len(block.resnets)):
            backbone = f"up_blocks.{i}.{kind}.{j - 1}" if j else below
            edits[backbone] = probe.apply(partial(louder, b=b))
            edits[f"up_blocks.{i}.skips.{j}"] = probe.apply(partial(quieter, s=s))
    return probe.edit(unet, edits)


def main() -> None:
    sd = ldm.load(PHANTOM_WEIGHTS)
    plain = sample(sd, sd.unet)
    for b, s in ((1.0, 1.0), (1.2, 1.0), (1.0, 0.9), (1.2, 0.9)):
        with free_u(sd.unet, {0: (b, s)}):
            print(f"b {b}, s {s}: images change by {greys(sd, sample(sd, sd.unet), plain):.1f} of 255 grey levels")


if __name__ == "__main__":
    main()
