"""The KL autoencoder: images to latents and back. [Rombach et al. 2022, "latent diffusion", section 3.1]

Letters: B batch, H W image height and width, f = 8 the downscale, z the unscaled latent.
Sources for the numbers: CompVis autoencoder_kl_32x32x4 and v1-inference.yaml; the keys are the diffusers layout's.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.blocks import Downsample, ResnetBlock, SpatialAttention, Upsample, require_shape, run_each
from ldm.config import VAEConfig


@dataclass(frozen=True)
class DiagonalGaussian:
    """The posterior q(z | image): mean and logvar, (B, 4, H/f, W/f), of unscaled z; logvar is clamped to [-30, 20]."""

    mean: Tensor
    logvar: Tensor

    @classmethod
    def from_moments(cls, moments: Tensor) -> "DiagonalGaussian":
        """moments: (B, 8, H/f, W/f), mean and log-variance one after the other."""
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, logvar.clamp(-30.0, 20.0))

    def sample(self, noise: Tensor) -> Tensor:
        """z = mean + std * noise; noise: standard normal, (B, 4, H/f, W/f)."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self) -> Tensor:
        """KL(q || N(0, 1)) in nats, summed over each sample: (B,)."""
        terms = self.mean.square() + self.logvar.exp() - 1.0 - self.logvar
        return 0.5 * terms.flatten(1).sum(1)


class MidBlock(nn.Module):
    """The lowest resolution: resnet, attention, resnet."""

    def __init__(self, channels: int, config: VAEConfig) -> None:
        super().__init__()
        groups, eps = config.norm_groups, config.norm_eps
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, groups, eps) for _ in range(2)])
        self.attentions = nn.ModuleList([SpatialAttention(channels, groups, eps)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H/f, W/f) -> the same shape."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Level(nn.Module):
    """The resnets of one resolution; the encoder's end in a downsampler, the decoder's in an upsampler."""

    def __init__(self, in_channels: int, out_channels: int, resnets: int, config: VAEConfig) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * resnets
        self.resnets = nn.ModuleList(
            [ResnetBlock(a, b, config.norm_groups, config.norm_eps) for a, b in pairwise(widths)]
        )


class DownLevel(Level):
    def __init__(self, in_channels: int, out_channels: int, config: VAEConfig, last: bool) -> None:
        super().__init__(in_channels, out_channels, config.resnets_per_level, config)
        self.downsamplers = nn.ModuleList([] if last else [Downsample(out_channels, asymmetric=True)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H/2, W/2); the last level keeps its size."""
        return run_each(self.downsamplers, run_each(self.resnets, x))


class UpLevel(Level):
    def __init__(self, in_channels: int, out_channels: int, config: VAEConfig, last: bool) -> None:
        super().__init__(in_channels, out_channels, config.resnets_per_level + 1, config)
        self.upsamplers = nn.ModuleList([] if last else [Upsample(out_channels)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, 2H, 2W); the last level keeps its size."""
        return run_each(self.upsamplers, run_each(self.resnets, x))


class Encoder(nn.Module):
    """Image (B, 3, H, W) -> (B, 8, H/f, W/f), before the quantising convolution."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        first, *rest = config.widths
        self.conv_in = nn.Conv2d(config.image_channels, first, 3, padding=1)
        pairs = list(zip([first, first, *rest], config.widths, strict=False))
        self.down_blocks = nn.ModuleList(
            [DownLevel(a, b, config, last=i == len(pairs) - 1) for i, (a, b) in enumerate(pairs)]
        )
        self.mid_block = MidBlock(config.widths[-1], config)
        self.conv_norm_out = nn.GroupNorm(config.norm_groups, config.widths[-1], config.norm_eps)
        self.conv_out = nn.Conv2d(config.widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = run_each(self.down_blocks, self.conv_in(x))
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(h))))


class Decoder(nn.Module):
    """z (B, 4, H/f, W/f) -> image (B, 3, H, W)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = config.widths[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], config)
        pairs = list(zip([widths[0], *widths], widths, strict=False))
        self.up_blocks = nn.ModuleList(
            [UpLevel(a, b, config, last=i == len(pairs) - 1) for i, (a, b) in enumerate(pairs)]
        )
        self.conv_norm_out = nn.GroupNorm(config.norm_groups, widths[-1], config.norm_eps)
        self.conv_out = nn.Conv2d(widths[-1], config.image_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = run_each(self.up_blocks, self.mid_block(self.conv_in(z)))
        return self.conv_out(F.silu(self.conv_norm_out(h)))


class AutoencoderKL(nn.Module):
    """Encodes an image to the posterior of its latent, decodes a latent to an image."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def moments(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 8, H/f, W/f): mean and unclamped log-variance of z."""
        require_shape("images", images, (None, self.config.image_channels, None, None), "(B, 3, H, W)")
        f = self.config.downscale
        if images.shape[2] % f or images.shape[3] % f:
            raise ValueError(f"images: {images.shape[2]} x {images.shape[3]} pixels, expected multiples of {f}")
        return self.quant_conv(self.encoder(images))

    def encode(self, images: Tensor) -> DiagonalGaussian:
        """The posterior of z of images (B, 3, H, W) in [-1, 1]; ValueError unless H and W are multiples of f."""
        return DiagonalGaussian.from_moments(self.moments(images))

    def decode(self, z: Tensor) -> Tensor:
        """z (B, 4, H/f, W/f), unscaled -> images (B, 3, H, W), about [-1, 1] and not clipped."""
        require_shape("z", z, (None, self.config.latent_channels, None, None), "(B, 4, H/f, W/f)")
        return self.decoder(self.post_quant_conv(z))
