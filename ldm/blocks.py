"""The building blocks that the U-Net and the autoencoder share, and the U-Net's transformer.

Letters: B batch, C channels, H W height and width, N = H*W positions, L context tokens, D context width.
Module names are the keys of the published diffusers-layout files, so a checkpoint reads like this code.
"""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F


class ResnetBlock(nn.Module):
    """norm, SiLU, conv - (+ time) - norm, SiLU, conv, added to the input.

    time_width: of the U-Net's time embedding; None in the autoencoder.  norm: (groups, channels, eps) -> a module.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        groups: int,
        eps: float,
        time_width: int | None = None,
        norm: Callable[[int, int, float], nn.Module] = nn.GroupNorm,
    ) -> None:
        super().__init__()
        self.norm1 = norm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if time_width is not None:
            self.time_emb_proj = nn.Linear(time_width, out_channels)
        self.norm2 = norm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """x: (B, C_in, H, W), time: (B, time_width) -> (B, C_out, H, W)."""
        h = F.silu(self.norm1(x))
        h = self.conv1(h)
        if time is not None:
            h = h + self.time_emb_proj(F.silu(time))[:, :, None, None]
        h = self.norm2(h)
        h = self.conv2(F.silu(h))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    """Halves H and W with a strided convolution."""

    # The U-Net pads one pixel on every side, the autoencoder right and bottom only (`asymmetric`): otherwise its
    # images come out shifted.

    def __init__(self, channels: int, asymmetric: bool = False) -> None:
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H/2, W/2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class Upsample(nn.Module):
    """Doubles H and W: each pixel becomes four, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """Scaled dot-product attention of h heads: q (B, N, h*d), k and v (B, M, h*d) -> (B, N, h*d).

    softmax(q k^T / sqrt(d)) v, for each head; causal: position n sees keys 0..n only    [Vaswani et al. 2017, eq. 1]
    """
    q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return rearrange(out, "b h n d -> b n (h d)")


class Attention(nn.Module):
    """Multi-head attention from x to a context, or to itself; `bias`: of q, k and v (the U-Net's have none)."""

    def __init__(self, width: int, heads: int, context_width: int | None = None, bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.cross = context_width is not None  # it may look at something else than itself
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(context_width or width, width, bias=bias)
        self.to_v = nn.Linear(context_width or width, width, bias=bias)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x: (B, N, C), context: (B, L, D) -> (B, N, C)."""
        context = x if context is None else context
        return self.to_out(attend(self.to_q(x), self.to_k(context), self.to_v(context), self.heads))


class SpatialAttention(Attention):
    """The autoencoder's attention: one head over all channels, every pixel to every pixel, with its own norm."""

    def __init__(self, channels: int, groups: int, eps: float) -> None:
        super().__init__(channels, heads=1, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, eps)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), the input added."""
        height = x.shape[2]
        h = rearrange(self.group_norm(x), "b c h w -> b (h w) c")
        h = self.to_out(attend(self.to_q(h), self.to_k(h), self.to_v(h), self.heads))
        return x + rearrange(h, "b (h w) c -> b c h w", h=height)


class GEGLU(nn.Module):
    """A projection to twice the width, of which one half gates the other."""

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * out_width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, out_width)."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width, and back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # The identity stands where the published model has a dropout of rate 0: the keys count it.
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention to the prompt, feed-forward; each normalised first and added."""

    self_attention: type[nn.Module] = Attention  # (width, heads)
    cross_attention: type[nn.Module] = Attention  # (width, heads, context_width)
    feed_forward: type[nn.Module] = FeedForward  # (width)

    def __init__(self, width: int, heads: int, context_width: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps)
        self.attn1 = self.self_attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps)
        self.attn2 = self.cross_attention(width, heads, context_width)
        self.norm3 = nn.LayerNorm(width, eps)
        self.ff = self.feed_forward(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x: (B, N, C), context: (B, L, D) -> (B, N, C)."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer over the pixels of a map: where the prompt enters the U-Net. [Rombach et al. 2022, section 3.3]"""

    def __init__(
        self,
        channels: int,
        heads: int,
        context_width: int,
        groups: int,
        eps: float,
        layer_norm_eps: float,
        depth: int = 1,
        block: type[BasicTransformerBlock] = BasicTransformerBlock,
    ) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            [block(channels, heads, context_width, layer_norm_eps) for _ in range(depth)]
        )
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x: (B, C, H, W), context: (B, L, D) -> (B, C, H, W), the input added."""
        height = x.shape[2]
        h = rearrange(self.proj_in(self.norm(x)), "b c h w -> b (h w) c").contiguous()  # now, not again for each norm
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(rearrange(h, "b (h w) c -> b c h w", h=height))


def run_each(layers: nn.ModuleList, x: Tensor) -> Tensor:
    """x through the layers, one after the other; an empty list returns x."""
    for layer in layers:
        x = layer(x)
    return x


def require_shape(name: str, x: torch.Tensor, expected: tuple[int | None, ...], meaning: str) -> None:
    """Raises ValueError unless x has the expected shape (None: any size), whose meaning is in the field's letters."""
    fits = x.ndim == len(expected) and all(e is None or e == n for e, n in zip(expected, x.shape, strict=True))
    if not fits:
        wanted = ", ".join("any" if e is None else str(e) for e in expected)
        raise ValueError(f"{name}: shape {tuple(x.shape)}, expected {meaning} = ({wanted})")
