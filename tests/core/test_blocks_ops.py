"""The hot operations against their formulas, and the blocks against what their docstrings say."""

import math

import pytest
import torch
from torch import Tensor, nn

from ldm.blocks import (
    GEGLU,
    Attention,
    BasicTransformerBlock,
    Downsample,
    ResnetBlock,
    SpatialAttention,
    SpatialTransformer,
    Upsample,
    attend,
    require_shape,
    run_each,
)
from ldm.clip import quick_gelu

# float64 carries 16 digits; sums of at most a few hundred terms lose two or three of them.
FLOAT64 = {"rtol": 1e-12, "atol": 1e-12}


def geglu(x: Tensor) -> Tensor:
    """The gate behind the projection."""
    gated = GEGLU(1, 1)
    gated.proj = nn.Identity()
    return gated(x)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, one batch row, one head and one query at a time."""
    out = torch.empty_like(q)
    width = q.shape[-1] // heads
    for b in range(q.shape[0]):
        for h in range(heads):
            cut = slice(h * width, (h + 1) * width)
            for n in range(q.shape[1]):
                seen = n + 1 if causal else k.shape[1]
                scores = k[b, :seen, cut] @ q[b, n, cut] / math.sqrt(width)
                weights = (scores - scores.max()).exp()
                out[b, n, cut] = weights @ v[b, :seen, cut] / weights.sum()
    return out


# ---- operations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "m", "heads", "width", "causal"),
    [
        (16, 16, 8, 4, False),  # self-attention in the U-Net
        (16, 77, 8, 5, False),  # cross-attention: other lengths, a width that is no power of two
        (9, 9, 1, 32, False),  # the autoencoder: one head over all channels
        (77, 77, 4, 16, True),  # the text encoder
        (1, 1, 2, 3, True),
        (3, 1, 2, 3, False),  # a single key takes all the weight
    ],
)
def test_attention_is_the_softmax_formula(n, m, heads, width, causal):
    q, k, v = randn(2, n, heads * width), randn(2, m, heads * width, seed=1), randn(2, m, heads * width, seed=2)
    got = attend(q, k, v, heads, causal)
    torch.testing.assert_close(got, softmax_attention(q, k, v, heads, causal), **FLOAT64)


def test_attention_stays_finite_where_exp_would_overflow():
    q, v = 1e3 * torch.ones(1, 2, 4), torch.tensor([[[1.0] * 4, [3.0] * 4]])
    assert torch.equal(attend(q, q, v, heads=1), torch.full((1, 2, 4), 2.0))


def test_causal_attention_ignores_later_tokens():
    q, k, v = randn(1, 6, 8), randn(1, 6, 8, seed=1), randn(1, 6, 8, seed=2)
    before = attend(q, k, v, 2, causal=True)
    k[:, 4:], v[:, 4:] = 5.0, -5.0
    after = attend(q, k, v, 2, causal=True)
    torch.testing.assert_close(after[:, :4], before[:, :4], **FLOAT64)
    assert not torch.allclose(after[:, 4:], before[:, 4:])


def test_geglu_gates_with_the_second_half_and_the_exact_gelu():
    x = 3 * randn(5, 12)
    value, gate = x[:, :6], x[:, 6:]
    phi = torch.tensor([[0.5 * (1 + math.erf(g / math.sqrt(2))) for g in row] for row in gate.tolist()], dtype=x.dtype)
    torch.testing.assert_close(geglu(x), value * gate * phi, **FLOAT64)
    assert geglu(randn(2, 3, 8)).shape == (2, 3, 4)


def test_quick_gelu_is_x_times_sigmoid_of_1_702_x():
    x = torch.linspace(-8, 8, 101, dtype=torch.float64)
    expected = torch.tensor([v / (1 + math.exp(-1.702 * v)) for v in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(quick_gelu(x), expected, **FLOAT64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_ops_keep_the_dtype(dtype):
    x = randn(1, 4, 8).to(dtype)
    assert attend(x, x, x, 2).dtype == geglu(x).dtype == quick_gelu(x).dtype == dtype


# ---- blocks ----------------------------------------------------------------------------------------


def delta(conv: nn.Conv2d) -> None:
    """Make a 3x3 convolution pass each channel on unchanged: only where it looks is left."""
    with torch.no_grad():
        conv.weight.zero_()
        conv.bias.zero_()
        for c in range(conv.out_channels):
            conv.weight[c, c, 1, 1] = 1


def test_the_unet_downsamples_with_one_pixel_of_padding_on_every_side():
    down = Downsample(2)
    delta(down.conv)
    x = torch.arange(2 * 6 * 8.0).view(1, 2, 6, 8)
    assert torch.equal(down(x), x[:, :, 0::2, 0::2])  # centred on even pixels


def test_the_autoencoder_downsamples_with_padding_at_right_and_bottom_only():
    down = Downsample(2, asymmetric=True)
    delta(down.conv)
    x = torch.arange(2 * 6 * 8.0).view(1, 2, 6, 8)
    assert torch.equal(down(x), x[:, :, 1::2, 1::2])  # centred on odd pixels: three levels of it are 8 pixels
    with torch.no_grad():
        down.conv.weight[:, :, 1, 1] = 0
        down.conv.weight[0, 0, 2, 2] = 1  # looks one further, to the right and below
    expected = torch.zeros(3, 4)
    expected[:2, :3] = x[0, 0, 2::2, 2::2]  # the padding is zero
    assert torch.equal(down(x)[0, 0], expected)


def test_upsample_makes_each_pixel_four():
    up = Upsample(1)
    delta(up.conv)
    x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    assert up(x)[0, 0].tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]


@torch.no_grad()
def test_a_resnet_adds_its_branch_to_its_input():
    block = ResnetBlock(8, 8, groups=4, eps=1e-5)
    x = randn(2, 8, 4, 4).float()
    assert block.conv_shortcut is None
    nn.init.zeros_(block.conv2.weight)
    nn.init.constant_(block.conv2.bias, 0.25)
    assert torch.equal(block(x), x + 0.25)


@torch.no_grad()
def test_a_resnet_that_changes_width_projects_its_input():
    block = ResnetBlock(8, 12, groups=4, eps=1e-5)
    x = randn(2, 8, 4, 4).float()
    nn.init.zeros_(block.conv2.weight)
    nn.init.zeros_(block.conv2.bias)
    assert torch.equal(block(x), block.conv_shortcut(x))


@torch.no_grad()
def test_a_resnet_adds_the_time_between_its_convolutions():
    block = ResnetBlock(8, 8, groups=4, eps=1e-5, time_width=6).double()
    x, time = randn(2, 8, 4, 4), randn(2, 6, seed=1)
    silu = nn.functional.silu

    def normalised(norm: nn.GroupNorm, x: Tensor) -> Tensor:
        return silu(nn.functional.group_norm(x, 4, norm.weight, norm.bias, 1e-5))

    h = block.conv1(normalised(block.norm1, x))
    h = h + block.time_emb_proj(silu(time))[:, :, None, None]
    torch.testing.assert_close(block(x, time), x + block.conv2(normalised(block.norm2, h)), **FLOAT64)
    assert not hasattr(ResnetBlock(8, 8, groups=4, eps=1e-5), "time_emb_proj")


@torch.no_grad()
def test_attention_reads_its_context_or_itself():
    block = Attention(8, heads=2, context_width=6).double()
    x, context = randn(2, 5, 8), randn(2, 7, 6, seed=1)
    q, k, v = block.to_q(x), block.to_k(context), block.to_v(context)
    torch.testing.assert_close(block(x, context), block.to_out(softmax_attention(q, k, v, 2, False)), **FLOAT64)
    itself = Attention(8, heads=2).double()
    torch.testing.assert_close(itself(x), itself(x, x), **FLOAT64)
    assert itself.to_q.bias is itself.to_k.bias is itself.to_v.bias is None
    assert itself.to_out[0].bias is not None


@torch.no_grad()
def test_spatial_attention_sees_every_pixel_from_every_pixel():
    block = SpatialAttention(8, groups=4, eps=1e-6).double()
    x = randn(1, 8, 2, 3)
    h = block.group_norm(x).flatten(2).mT
    h = softmax_attention(block.to_q(h), block.to_k(h), block.to_v(h), 1, False)
    torch.testing.assert_close(block(x), x + block.to_out(h).mT.reshape(x.shape), **FLOAT64)


@torch.no_grad()
def test_a_transformer_block_normalises_first_and_adds():
    block = BasicTransformerBlock(8, heads=2, context_width=6, eps=1e-5).double()
    x, context = randn(2, 5, 8), randn(2, 7, 6, seed=1)
    h = x + block.attn1(block.norm1(x))
    h = h + block.attn2(block.norm2(h), context)
    h = h + block.ff(block.norm3(h))
    torch.testing.assert_close(block(x, context), h, **FLOAT64)


@torch.no_grad()
def test_a_spatial_transformer_is_its_input_when_its_last_projection_is_zero():
    block = SpatialTransformer(8, heads=2, context_width=6, groups=4, eps=1e-6, layer_norm_eps=1e-5).double()
    x, context = randn(2, 8, 2, 3), randn(2, 7, 6, seed=1)
    assert not torch.equal(block(x, context), x)
    nn.init.zeros_(block.proj_out.weight)
    nn.init.zeros_(block.proj_out.bias)
    assert torch.equal(block(x, context), x)


@torch.no_grad()
def test_a_spatial_transformer_without_positions_moves_with_its_pixels():
    # It has no positional encoding: turning the feature map turns the result.
    block = SpatialTransformer(8, heads=2, context_width=6, groups=4, eps=1e-6, layer_norm_eps=1e-5).double()
    x, context = randn(1, 8, 3, 5), randn(1, 7, 6, seed=1)
    torch.testing.assert_close(block(x.mT, context), block(x, context).mT, **FLOAT64)


def test_no_layers_change_nothing():
    x = randn(2, 3)
    assert run_each(nn.ModuleList(), x) is x


@pytest.mark.parametrize("shape", [(2, 4, 8), (2, 3, 8, 8), (2, 4, 8, 8, 8)])
def test_a_wrong_shape_is_named_with_what_was_expected(shape):
    with pytest.raises(ValueError, match=r"^x_t: shape \(2, .*\), expected \(B, 4, H, W\) = \(any, 4, any, any\)$"):
        require_shape("x_t", torch.empty(shape), (None, 4, None, None), "(B, 4, H, W)")


def test_any_size_fits_where_any_is_allowed():
    for batch, side in ((1, 8), (7, 64)):
        require_shape("x_t", torch.empty(batch, 4, side, 2 * side), (None, 4, None, None), "(B, 4, H, W)")
