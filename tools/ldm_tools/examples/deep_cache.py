"""Example 2: deep features change slowly from step to step, so compute them at every n-th only.

[Ma, Fang, Wang 2024, "DeepCache", section 3.3: its shallowest branch]

    every n-th call   the whole U-Net; what the last resnet gets from below is kept
    other calls       conv_in -> cat([kept, skip]) -> last resnet (and transformer) -> conv_out

python -m ldm_tools.examples.deep_cache
"""

import time
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F

import ldm
from ldm import probe
from ldm.pipeline import PHANTOM_WEIGHTS
from ldm.traversal.round_trip import relative_error
from ldm.unet import UNet, UpBlock, timestep_embedding
from ldm_tools.examples.measure import greys, sample


class DeepCached:
    """eps = cached(x_t, t, context), in place of the U-Net in `ldm.guidance.guided`; one call a step, no max_batch."""

    def __init__(self, unet: UNet, interval: int) -> None:
        last = unet.up_blocks[-1]
        assert isinstance(last, UpBlock)
        self.unet, self.last, self.interval, self.calls = unet, last, interval, 0
        kind = "attentions" if last.attentions else "resnets"
        self.place = f"up_blocks.{len(unet.up_blocks) - 1}.{kind}.{len(last.resnets) - 2}"  # below the last resnet

    def __call__(self, x_t: Tensor, t: float, context: Tensor) -> Tensor:
        self.calls += 1
        if (self.calls - 1) % self.interval:
            return self.shallow(x_t, t, context)
        with probe.capture(self.unet, self.place) as taps:
            eps = self.unet(x_t, t, context)
        self.deep = taps[self.place]
        return eps

    def shallow(self, x_t: Tensor, t: float, context: Tensor) -> Tensor:
        """eps from the kept features and this step's x_t."""
        unet, last = self.unet, self.last
        time_features = timestep_embedding(torch.full((len(x_t),), t, device=x_t.device), unet.config.widths[0])
        x = torch.cat([self.deep, unet.conv_in(x_t)], dim=1)
        x = last.resnets[-1](x, unet.time_embedding(time_features.to(x_t.dtype)))
        if last.attentions:
            x = last.attentions[-1](x, context)
        return unet.conv_out(F.silu(unet.conv_norm_out(x)))


def main(intervals: tuple[int, ...] = (2, 3, 5), repeats: int = 3) -> None:
    """Error against the full network, and time as a ratio, all variants timed in turn."""
    sd = ldm.load(PHANTOM_WEIGHTS)
    seconds: dict[int, list[float]] = {interval: [] for interval in (1, *intervals)}
    latents = {}
    for _ in range(repeats):
        for interval, taken in seconds.items():
            began = time.perf_counter()
            latents[interval] = sample(sd, DeepCached(sd.unet, interval))
            taken.append(time.perf_counter() - began)
    for interval in intervals:
        error = relative_error(latents[interval], latents[1])
        ratio = median(a / b for a, b in zip(seconds[1], seconds[interval], strict=True))
        change = greys(sd, latents[interval], latents[1])
        print(
            f"every {interval}: {ratio:.2f} x as fast, latents off by {error:.3f}, images by {change:.2f} grey levels"
        )


if __name__ == "__main__":
    main()
