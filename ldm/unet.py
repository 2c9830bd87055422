"""The U-Net of SD1.5: predicts the noise in x_t, given the time and the prompt's context.

Letters: B batch, C channels, H W here the latent's height and width, L = 77 context tokens, D = 768 context width.
Sources for the structure and the numbers: CompVis openaimodel.py and v1-inference.yaml; Dhariwal and Nichol 2021
(the U-Net), Rombach et al. 2022 (the transformers in it). The keys are the diffusers layout's.

    conv_in -> down_blocks (high to low resolution) -> mid_block -> up_blocks (low to high) -> conv_out
                    |____________ skip connections, last in, first out ______^
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.blocks import (
    BasicTransformerBlock,
    Downsample,
    ResnetBlock,
    SpatialTransformer,
    Upsample,
    require_shape,
    run_each,
)
from ldm.config import Prediction, UNetConfig


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Sinusoidal features of times (B,), cosines first: (B, width) float32.

    [cos(t w_i), sin(t w_i)],  w_i = 10000^(-i / (width/2))                       [Vaswani et al. 2017, section 3.5]
    """
    half = width // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """Lets the network bend the sinusoids: linear, SiLU, linear."""

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, out_width)
        self.linear_2 = nn.Linear(out_width, out_width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width) -> (B, out_width)."""
        return self.linear_2(F.silu(self.linear_1(x)))


@dataclass(frozen=True)
class UNetBlocks:
    """The classes that a U-Net is built from, each called as its default is. Another one: write it, and name it here.

    UNet(SD15.unet, UNetBlocks(transformer_block=WithLinearAttention))          its weights: see `ldm.probe.surgery`
    """

    resnet: type[nn.Module] = ResnetBlock
    norm: type[nn.Module] = nn.GroupNorm  # in front of the convolutions of resnets, and of the output
    transformer_block: type[BasicTransformerBlock] = BasicTransformerBlock
    downsample: type[nn.Module] = Downsample
    upsample: type[nn.Module] = Upsample

    def changes(self) -> str:
        """The blocks that are not the standard ones, by name: "norm=MyNorm"; empty when all are."""
        chosen = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.default is not getattr(self, field.name)
        }
        return ", ".join(f"{name}={block.__name__}" for name, block in chosen.items())


STANDARD_BLOCKS = UNetBlocks()


def _resnet(in_channels: int, out_channels: int, config: UNetConfig, blocks: UNetBlocks) -> nn.Module:
    return blocks.resnet(
        in_channels,
        out_channels,
        config.norm_groups,
        config.resnet_norm_eps,
        time_width=4 * config.widths[0],
        norm=blocks.norm,
    )


def _transformers(count: int, channels: int, config: UNetConfig, blocks: UNetBlocks) -> nn.ModuleList:
    return nn.ModuleList(
        [
            SpatialTransformer(
                channels,
                config.heads,
                config.context_width,
                config.norm_groups,
                config.transformer_norm_eps,
                config.layer_norm_eps,
                config.transformer_depth,
                blocks.transformer_block,
            )
            for _ in range(count)
        ]
    )


class DownBlock(nn.Module):
    """One resolution on the way down: resnets, each followed by a transformer where the level has attention."""

    def __init__(
        self, in_channels: int, channels: int, attention: bool, last: bool, config: UNetConfig, blocks: UNetBlocks
    ) -> None:
        super().__init__()
        count = config.resnets_per_level
        inputs = [in_channels] + [channels] * (count - 1)
        self.resnets = nn.ModuleList([_resnet(width, channels, config, blocks) for width in inputs])
        self.attentions = _transformers(count if attention else 0, channels, config, blocks)
        self.downsamplers = nn.ModuleList([] if last else [blocks.downsample(channels)])

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> list[Tensor]:
        """x: (B, C_in, H, W) -> every activation that the way up will need; the last one is this block's output."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            if self.attentions:
                x = self.attentions[i](x, context)
            skips.append(x)
        if self.downsamplers:
            skips.append(run_each(self.downsamplers, x))
        return skips


class MidBlock(nn.Module):
    """The lowest resolution: resnet, transformer, resnet."""

    def __init__(self, channels: int, config: UNetConfig, blocks: UNetBlocks) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([_resnet(channels, channels, config, blocks) for _ in range(2)])
        self.attentions = _transformers(int(config.mid_attention), channels, config, blocks)

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = self.resnets[0](x, time)
        for attention in self.attentions:
            x = attention(x, context)
        return self.resnets[1](x, time)


class UpBlock(nn.Module):
    """One resolution on the way up: each resnet first takes in one activation of the way down."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        skip_channels: list[int],
        attention: bool,
        last: bool,
        config: UNetConfig,
        blocks: UNetBlocks,
    ) -> None:
        super().__init__()
        self.skips = nn.ModuleList([nn.Identity() for _ in skip_channels])  # a name for each, see ldm/probe
        inputs = [in_channels] + [channels] * (len(skip_channels) - 1)
        self.resnets = nn.ModuleList(
            [_resnet(a + skip, channels, config, blocks) for a, skip in zip(inputs, skip_channels, strict=True)]
        )
        self.attentions = _transformers(len(skip_channels) if attention else 0, channels, config, blocks)
        self.upsamplers = nn.ModuleList([] if last else [blocks.upsample(channels)])

    def forward(self, x: Tensor, skips: list[Tensor], time: Tensor, context: Tensor) -> Tensor:
        """x: (B, C_in, H, W) -> (B, C, 2H, 2W), or (B, C, H, W) in the last block. Takes its skips off the list."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, self.skips[i](skips.pop())], dim=1), time)
            if self.attentions:
                x = self.attentions[i](x, context)
        return run_each(self.upsamplers, x)


class UNet(nn.Module):
    """eps = unet(x_t, t, context)."""

    prediction: Prediction = "eps"  # of a fine-tune for v or x_0 that, see `ldm.prediction`

    def __init__(self, config: UNetConfig, blocks: UNetBlocks = STANDARD_BLOCKS) -> None:
        super().__init__()
        self.config, self.blocks = config, blocks
        widths, levels = config.widths, len(config.widths)
        self.time_embedding = TimeEmbedding(widths[0], 4 * widths[0])
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)

        self.down_blocks = nn.ModuleList()
        skip_channels = [widths[0]]
        for i, width in enumerate(widths):
            last = i == levels - 1
            self.down_blocks.append(DownBlock(skip_channels[-1], width, config.attention[i], last, config, blocks))
            skip_channels += [width] * (config.resnets_per_level + (not last))

        self.mid_block = MidBlock(widths[-1], config, blocks)

        self.up_blocks = nn.ModuleList()
        channels = widths[-1]
        for i in reversed(range(levels)):
            taken = [skip_channels.pop() for _ in range(config.resnets_per_level + 1)]
            self.up_blocks.append(UpBlock(channels, widths[i], taken, config.attention[i], i == 0, config, blocks))
            channels = widths[i]

        self.conv_norm_out = blocks.norm(config.norm_groups, widths[0], config.resnet_norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.latent_channels, 3, padding=1)

    def forward(self, x_t: Tensor, t: float | Tensor, context: Tensor) -> Tensor:
        """The noise that the network sees in x_t: (B, 4, H, W), like x_t; ValueError when shapes do not fit.

        x_t: (B, 4, H, W) scaled latents, H and W multiples of 2^(levels-1).  context: (B, L, D).
        t: training timestep in [0, 999], one number or (B,); it may lie between two.
        """
        batch = self._check(x_t, context)
        t = t.to(x_t.device) if isinstance(t, Tensor) else torch.full((), t, device=x_t.device)  # a copy would wait
        if t.ndim > 1 or (t.ndim == 1 and t.shape[0] != batch):
            raise ValueError(f"t: shape {tuple(t.shape)}, expected one number or (B,) = ({batch},)")
        time = self.time_embedding(timestep_embedding(t.expand(batch), self.config.widths[0]).to(x_t.dtype))

        x = self.conv_in(x_t)
        skips = [x]
        for down in self.down_blocks:
            skips += down(skips[-1], time, context)
        x = self.mid_block(skips[-1], time, context)
        for up in self.up_blocks:
            x = up(x, skips, time, context)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def _check(self, x_t: Tensor, context: Tensor) -> int:
        """The batch size, once x_t and context are seen to fit this network and each other."""
        require_shape("x_t", x_t, (None, self.config.latent_channels, None, None), "(B, 4, H, W)")
        require_shape("context", context, (x_t.shape[0], None, self.config.context_width), "(B, L, D)")
        multiple = 2 ** (len(self.config.widths) - 1)
        if x_t.shape[2] % multiple or x_t.shape[3] % multiple:
            raise ValueError(f"x_t: {x_t.shape[2]} x {x_t.shape[3]} latent pixels, expected multiples of {multiple}")
        return x_t.shape[0]
