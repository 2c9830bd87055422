"""The U-Net against CompVis' UNetModel and diffusers, with deterministic weights; its conventions and refusals."""

import copy
from dataclasses import replace

import pytest
import torch
from networks import SMALL, small, tap_errors, too_large
from reference import FORWARD, golden, noise
from torch import Tensor, nn

from ldm.blocks import SpatialTransformer
from ldm.checkpoint.loading import build
from ldm.config import PHANTOM, SD15, UNetConfig
from ldm.unet import UNet, timestep_embedding

pytestmark = pytest.mark.usefixtures("no_grad")


# ---- reference vectors -----------------------------------------------------------------------------


@pytest.mark.parametrize("t", [981, 500, 1])
def test_small_is_the_reference(unet, x, context, t):
    assert golden("small_unet").error(f"eps.t{t}", unet(x, t, context)) < FORWARD


def test_every_row_has_its_own_time(unet, x, context):
    assert golden("small_unet").error("eps.t981_21", unet(x, torch.tensor([981, 21]), context)) < FORWARD


@pytest.mark.parametrize(("height", "width"), [(16, 24), (24, 16), (8, 8)])
def test_other_sizes(unet, context, height, width):
    x = noise(f"small.latent{height}x{width}", (1, 4, height, width))
    assert golden("small_unet").error(f"eps.{height}x{width}.t301", unet(x, 301, context[:1])) < FORWARD


def test_a_context_of_13_tokens(unet, x, context):
    assert golden("small_unet").error("eps.ctx13.t301", unet(x[:1], 301, context[:1, :13])) < FORWARD


def test_every_module_is_the_reference(unet, x, context):
    with tap_errors(unet, "unet", golden("small_unet")) as errors:
        unet(x, 981, context)
    assert len(errors) == 49
    assert not too_large(errors, FORWARD)


def test_in_float64_nothing_but_the_rounding_of_the_stored_values_is_left(unet, x, context):
    # Stored in float32, so 3e-8 remains, and 1e-7 is allowed. A wrong epsilon, 7e-6 at the least, has no room here.
    out = copy.deepcopy(unet).double()(x.double(), 981, context.double())
    assert golden("small_unet").error("eps.t981.f64", out) < 1e-7
    assert golden("small_unet").error("eps.t981.f64", unet(x, 981, context)) < FORWARD


@pytest.mark.parametrize("scale", [1e-3, 1e-4])
def test_the_norms_epsilon_shows_where_activations_are_small(unet, x, context, scale):
    assert golden("small_probes").error(f"unet.scale{scale:g}", unet(x * scale, 981, context)) < FORWARD


def test_the_time_embedding_is_the_reference():
    name = "timestep_embedding.dim320.t0_1_21_500_981_999"
    embedding = timestep_embedding(torch.tensor([0, 1, 21, 500, 981, 999]), 320)
    # Angles reach 999, where float32 is 6e-5 apart: two libraries' exp and cos differ by that much in single values.
    assert golden("small_unet").error(name, embedding) < FORWARD
    assert torch.equal(embedding[0], torch.cat([torch.ones(160), torch.zeros(160)]))  # cosines first


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(torch.float16, 1e-2), (torch.bfloat16, 7e-2)],  # twice what the reference itself moves by: 4.2e-3 and 3.3e-2
)
def test_low_precision_stays_near(x, context, dtype, limit):
    out = copy.deepcopy(small("unet")).to(dtype)(x.to(dtype), 981, context.to(dtype))
    assert out.dtype == dtype
    assert golden("small_unet").error("eps.t981", out) < limit


@pytest.mark.slow
@pytest.mark.parametrize("t", [741, 1])
def test_full_size_at_32(full_unet, t):
    eps, errors = full_size_run(full_unet, 32, t, taps_at=741)
    reference, exact = golden("unet_full_32"), golden("unet_full_fp64")
    errors["eps"] = reference.error(f"eps.t{t}", eps)
    row = {741: 0, 1: 1}[t]
    errors["eps in float64"] = exact.error(f"eps.r32.t{t}.ctx{row}", eps[row : row + 1])
    assert not too_large(errors, FORWARD)


@pytest.mark.slow
@pytest.mark.parametrize("t", [981, 261])
def test_full_size_at_64(full_unet, t):
    eps, errors = full_size_run(full_unet, 64, t, taps_at=981)
    errors["eps"] = golden("unet_full_64").error(f"eps.t{t}", eps)
    if t == 981:
        errors["eps in float64"] = golden("unet_full_fp64").error("eps.r64.t981.ctx0", eps[:1])
    assert not too_large(errors, FORWARD)


def full_size_run(unet: UNet, side: int, t: int, taps_at: int) -> tuple[Tensor, dict[str, float]]:
    """eps (2, 4, side, side) of one latent under two contexts; the errors of all modules where they are stored."""
    x = noise(f"unet.latent{side}", (1, 4, side, side)).repeat(2, 1, 1, 1)
    contexts = torch.stack([noise(f"unet.context{k}", (77, 768)) for k in range(2)])
    if t != taps_at:
        return unet(x, t, contexts), {}
    with tap_errors(unet, "unet", golden(f"unet_full_{side}_taps")) as errors:
        eps = unet(x, t, contexts)
    assert len(errors) == 60
    return eps, errors


# ---- structure -------------------------------------------------------------------------------------


def test_sd15_has_the_published_number_of_parameters():
    assert sum(p.numel() for p in build(SD15.unet).parameters()) == 859_520_964


def test_every_norm_has_the_published_epsilon():
    # The transformers' GroupNorm differs from all others. On activations of size 1 a wrong one moves eps by 7e-6 only.
    unet = build(SD15.unet)
    found = {"resnet and output": set(), "transformer": set(), "layer norm": set()}
    for name, module in unet.named_modules():
        if isinstance(module, nn.LayerNorm):
            found["layer norm"].add(module.eps)
        elif isinstance(module, nn.GroupNorm):
            parent = unet.get_submodule(name.rpartition(".")[0])
            found["transformer" if isinstance(parent, SpatialTransformer) else "resnet and output"].add(module.eps)
            assert module.num_groups == 32
    assert found == {"resnet and output": {1e-5}, "transformer": {1e-6}, "layer norm": {1e-5}}


def test_sd15_has_eight_heads_of_40_80_and_160():
    blocks = [module for module in build(SD15.unet).modules() if isinstance(module, SpatialTransformer)]
    assert len(blocks) == 6 + 1 + 9
    attentions = [getattr(block.transformer_blocks[0], name) for block in blocks for name in ("attn1", "attn2")]
    assert {attention.heads for attention in attentions} == {8}
    assert {attention.to_q.out_features // attention.heads for attention in attentions} == {40, 80, 160}
    assert {block.proj_in.kernel_size for block in blocks} == {(1, 1)}


@pytest.mark.parametrize(
    "config",
    [
        PHANTOM.unet,
        UNetConfig(widths=(32,), attention=(True,), context_width=8),
        UNetConfig(widths=(32, 64), attention=(False, False), resnets_per_level=3, context_width=8),
    ],
    ids=["phantom", "one level", "no attention but the middle's"],
)
def test_other_depths_run(config):
    torch.manual_seed(0)
    unet = UNet(config).eval()
    x, context = noise("x", (1, config.latent_channels, 8, 12)), noise("context", (1, 5, config.context_width))
    eps = unet(x, 3, context)
    assert eps.shape == x.shape
    assert not torch.allclose(eps, unet(x, 900, context))
    assert not torch.allclose(eps, unet(x, 3, -context))


# ---- behaviour -------------------------------------------------------------------------------------


def test_a_time_may_be_an_int_a_scalar_or_one_a_row(unet, x, context):
    expected = unet(x, 500, context)
    assert torch.equal(unet(x, torch.tensor(500), context), expected)
    assert torch.equal(unet(x, torch.tensor([500, 500]), context), expected)


def test_a_row_does_not_depend_on_its_batch(unet, x, context):
    # Products of other sizes may add up in another order: float32 rounding, as between two references.
    both = unet(x, torch.tensor([981, 21]), context)
    torch.testing.assert_close(unet(x[1:], 21, context[1:]), both[1:], rtol=FORWARD, atol=FORWARD)


def test_the_inputs_are_left_as_they_were(unet, x, context):
    before = x.clone(), context.clone()
    unet(x, 500, context)
    assert torch.equal(x, before[0])
    assert torch.equal(context, before[1])


@pytest.mark.parametrize(
    ("x_shape", "t", "context_shape", "message"),
    [
        ((2, 3, 16, 16), 1, (2, 77, 64), r"x_t: shape \(2, 3, 16, 16\), expected \(B, 4, H, W\)"),
        ((4, 16, 16), 1, (1, 77, 64), r"x_t: shape \(4, 16, 16\), expected \(B, 4, H, W\)"),
        ((2, 4, 16, 20), 1, (2, 77, 64), r"x_t: 16 x 20 latent pixels, expected multiples of 8"),
        ((2, 4, 16, 16), 1, (2, 77, 768), r"context: shape \(2, 77, 768\), expected \(B, L, D\) = \(2, any, 64\)"),
        ((2, 4, 16, 16), 1, (77, 64), r"context: shape \(77, 64\), expected \(B, L, D\)"),
        ((2, 4, 16, 16), 1, (1, 77, 64), r"context: shape \(1, 77, 64\), expected \(B, L, D\) = \(2, any, 64\)"),
        ((2, 4, 16, 16), [1, 2, 3], (2, 77, 64), r"t: shape \(3,\), expected one number or \(B,\) = \(2,\)"),
        ((2, 4, 16, 16), [[1, 2]], (2, 77, 64), r"t: shape \(1, 2\), expected one number or \(B,\) = \(2,\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(unet, x_shape, t, context_shape, message):
    with pytest.raises(ValueError, match=message):
        unet(torch.zeros(x_shape), torch.tensor(t), torch.zeros(context_shape))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": (True, False)}, "attention names 2 levels, widths 4"),
        ({"widths": (32, 64, 100, 128)}, "width 100 is not a multiple of norm_groups 32 and of heads 8"),
        ({"heads": 5}, "width 32 is not a multiple of norm_groups 32 and of heads 5"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL.unet, **change)
