"""The numbers that make a network: SD1.5's, the phantom model's, or any other.

A configuration holds what the code needs to build the three networks; nothing here allocates or computes.
Defaults are what Stable Diffusion 1.5 was published with (CompVis v1-inference.yaml, OpenAI CLIP ViT-L/14).
"""

from dataclasses import dataclass
from typing import Literal

CONTEXT_TOKENS = 77  # tokens in a prompt, start and end tokens included


@dataclass(frozen=True)
class CLIPConfig:
    """The text encoder: a causal transformer whose last hidden state is the U-Net's context."""

    vocabulary: int = 49408
    tokens: int = CONTEXT_TOKENS
    width: int = 768  # D, also the U-Net's context width
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    norm_eps: float = 1e-5


@dataclass(frozen=True)
class VAEConfig:
    """The KL autoencoder: images (3, H, W) to z (4, H / f, W / f), with f = 2 ** (levels - 1)."""

    image_channels: int = 3
    latent_channels: int = 4
    widths: tuple[int, ...] = (128, 256, 512, 512)  # one level each, highest resolution first
    resnets_per_level: int = 2  # in the encoder; the decoder has one more
    norm_groups: int = 32
    norm_eps: float = 1e-6
    scaling_factor: float = 0.18215  # latents = scaling_factor * z

    @property
    def downscale(self) -> int:
        """f: image pixels per latent pixel, along a side."""
        return 2 ** (len(self.widths) - 1)


@dataclass(frozen=True)
class UNetConfig:
    """The noise predictor eps(x_t, t, context)."""

    latent_channels: int = 4
    sample_size: int = 64  # latent pixels a side that it was trained at; it runs at others
    widths: tuple[int, ...] = (320, 640, 1280, 1280)  # one level each, highest resolution first
    resnets_per_level: int = 2  # on the way down; one more on the way up
    attention: tuple[bool, ...] = (True, True, True, False)  # which levels have transformers
    mid_attention: bool = True  # whether the middle has one
    transformer_depth: int = 1  # blocks in each transformer
    heads: int = 8  # heads, not their width: SD1.5's are 40, 80 and 160 wide
    context_width: int = 768
    norm_groups: int = 32
    resnet_norm_eps: float = 1e-5  # resnets and the output
    transformer_norm_eps: float = 1e-6  # the GroupNorm in front of a transformer
    layer_norm_eps: float = 1e-5  # inside a transformer

    def __post_init__(self) -> None:
        if len(self.attention) != len(self.widths):
            raise ValueError(
                f"UNetConfig: attention names {len(self.attention)} levels, widths {len(self.widths)}; give one each"
            )
        if min(self.resnets_per_level, self.transformer_depth) < 1:
            raise ValueError(
                f"UNetConfig: resnets_per_level {self.resnets_per_level} and transformer_depth "
                f"{self.transformer_depth}; expected 1 or more of each (for no transformers, set attention)"
            )
        for width in self.widths:
            if width % self.norm_groups or width % self.heads:
                raise ValueError(
                    f"UNetConfig: width {width} is not a multiple of norm_groups {self.norm_groups} "
                    f"and of heads {self.heads}"
                )


Prediction = Literal["eps", "v", "x0"]


@dataclass(frozen=True)
class DiffusionConfig:
    """What the U-Net was trained to predict, on which noise levels, and how they are visited unless told otherwise."""

    prediction: Prediction = "eps"
    beta_schedule: str = "scaled_linear"  # or "linear", "squaredcos_cap_v2"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    train_steps: int = 1000  # T
    trained_betas: tuple[float, ...] | None = None  # in place of the three above
    zero_terminal_snr: bool = False  # whether the last level is pure noise [Lin et al. 2023]
    final_alpha_one: bool = False  # whether sampling ends without any noise, instead of at t = 0
    spacing: str = "leading"  # one of ldm.schedule.SPACINGS
    steps_offset: int = 1  # of leading


SD15_DIFFUSION = DiffusionConfig()


@dataclass(frozen=True)
class Config:
    """One whole model."""

    clip: CLIPConfig
    vae: VAEConfig
    unet: UNetConfig


SD15 = Config(CLIPConfig(), VAEConfig(), UNetConfig())

# The model that is trained on drawn phantoms and shipped in weights/: the same code, sized so that two CPU cores
# train it in about two hours and a half. 128 x 128 images, 16 x 16 latents.
PHANTOM = Config(
    CLIPConfig(width=64, layers=2, heads=4, mlp_width=256),
    VAEConfig(widths=(16, 32, 64, 96), resnets_per_level=1, norm_groups=8),
    UNetConfig(
        sample_size=16, widths=(96, 128, 128), resnets_per_level=1, attention=(False, True, True), context_width=64
    ),
)
