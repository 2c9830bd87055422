"""The autoencoder against CompVis' AutoencoderKL, with deterministic weights; the posterior; refusals."""

import copy

import pytest
import torch
from networks import small, tap_errors, too_large
from reference import FORWARD, golden, image, noise
from torch import nn
from torch.distributions import Normal, kl_divergence

from ldm.blocks import Downsample
from ldm.checkpoint.loading import build
from ldm.config import PHANTOM, SD15
from ldm.vae import AutoencoderKL, DiagonalGaussian

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return small("vae")


# ---- reference vectors -----------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(128, 128), (64, 96)])
def test_small_is_the_reference(vae, height, width):
    reference, size = golden("small_vae"), f"{height}x{width}"
    assert reference.error(f"moments.{size}", vae.moments(image(f"small.image{size}", height, width))) < FORWARD
    z = noise(f"small.z{height // 8}x{width // 8}", (1, 4, height // 8, width // 8))
    assert reference.error(f"decode.{size}", vae.decode(z)) < FORWARD


@pytest.mark.parametrize("scale", [1e-3, 1e-4])
def test_the_norms_epsilon_shows_where_activations_are_small(vae, scale):
    reference = golden("small_probes")
    moments = vae.moments(image("small.image128x128", 128, 128) * scale)
    assert reference.error(f"enc.scale{scale:g}", moments) < FORWARD
    assert reference.error(f"dec.scale{scale:g}", vae.decode(noise("small.z16x16", (1, 4, 16, 16)) * scale)) < FORWARD


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(torch.float16, 1e-2), (torch.bfloat16, 7e-2)],  # the reference itself moves by 2.3e-3 and 2.0e-2; the U-Net more
)
def test_low_precision_stays_near(vae, dtype, limit):
    # Small inputs, so not the stored ones: convolutions in float16 are slow on many CPUs.
    low = copy.deepcopy(vae).to(dtype)
    images, z = image("some image", 32, 48), noise("some z", (1, 4, 4, 6))
    for got, expected in (
        (low.moments(images.to(dtype)), vae.moments(images)),
        (low.decode(z.to(dtype)), vae.decode(z)),
    ):
        assert got.dtype == dtype
        assert float((got.float() - expected).norm() / expected.norm()) < limit


@pytest.mark.slow
def test_full_size_at_256(full_vae):
    reference = golden("vae_full_256")
    with tap_errors(full_vae, "vae", reference) as errors:
        moments = full_vae.moments(image("vae.image256", 256, 256))
        decoded = full_vae.decode(noise("vae.z32", (1, 4, 32, 32)))
    assert len(errors) == 38
    errors["moments"] = reference.error("moments", moments)
    errors["moments in float64"] = reference.error("moments.f64", moments)
    errors["decode"] = reference.error("decode", decoded)
    z = noise("vae.z32", (1, 4, 32, 32))[:, :, :16, :16]
    errors["decode in float64"] = reference.error("decode_crop16.f64", full_vae.decode(z))
    assert not too_large(errors, FORWARD)


@pytest.mark.slow
def test_full_size_encodes_at_512(full_vae):
    moments = full_vae.moments(image("vae.image512", 512, 512))
    assert golden("vae_full_512").error("moments", moments) < FORWARD


@pytest.mark.slow
def test_full_size_decodes_at_512(full_vae):
    decoded = full_vae.decode(noise("vae.z64", (1, 4, 64, 64)))
    assert golden("vae_full_512").error("decode", decoded) < FORWARD


# ---- structure -------------------------------------------------------------------------------------


def test_sd15_has_the_published_number_of_parameters():
    assert sum(p.numel() for p in build(SD15.vae).parameters()) == 83_653_863


def test_every_norm_has_the_published_epsilon():
    norms = [module for module in build(SD15.vae).modules() if isinstance(module, nn.GroupNorm)]
    assert {norm.eps for norm in norms} == {1e-6}  # not the U-Net's 1e-5
    assert {norm.num_groups for norm in norms} == {32}


def test_the_encoder_pads_right_and_bottom_only():
    # Symmetric padding shifts images by 8 pixels.
    downsamplers = [module for module in build(SD15.vae).modules() if isinstance(module, Downsample)]
    assert len(downsamplers) == 3
    assert all(down.asymmetric and down.conv.padding == (0, 0) for down in downsamplers)


@pytest.mark.parametrize("height", [32, 64])
def test_the_phantom_models_autoencoder_runs(height):
    torch.manual_seed(0)
    vae = AutoencoderKL(PHANTOM.vae).eval()
    posterior = vae.encode(image("some image", height, 32))
    assert posterior.mean.shape == posterior.logvar.shape == (1, 4, height // 8, 4)
    assert vae.decode(posterior.mean).shape == (1, 3, height, 32)


# ---- behaviour -------------------------------------------------------------------------------------


def test_a_row_does_not_depend_on_its_batch(vae):
    # Products of other sizes may add up in another order: float32 rounding, as between two references.
    images = torch.cat([image("small.image64x96", 64, 96), image("another", 64, 96)])
    torch.testing.assert_close(vae.moments(images[:1]), vae.moments(images)[:1], rtol=FORWARD, atol=FORWARD)
    z = noise("two", (2, 4, 8, 12))
    torch.testing.assert_close(vae.decode(z[1:]), vae.decode(z)[1:], rtol=FORWARD, atol=FORWARD)


def test_encode_splits_the_moments_into_mean_and_log_variance(vae):
    images = image("small.image64x96", 64, 96)
    posterior, moments = vae.encode(images), vae.moments(images)
    assert torch.equal(posterior.mean, moments[:, :4])
    assert torch.equal(posterior.logvar, moments[:, 4:])  # well within the clamp here


def test_the_log_variance_is_clamped_and_the_mean_is_not():
    moments = torch.tensor([-1000.0, -30.5, -30.0, 0.0, 20.0, 20.5, 1000.0]).expand(1, 8, 1, 7)
    posterior = DiagonalGaussian.from_moments(moments)
    assert posterior.logvar[0, 0, 0].tolist() == [-30, -30, -30, 0, 20, 20, 20]
    assert torch.equal(posterior.mean, moments[:, :4])


def test_a_sample_is_the_mean_plus_the_standard_deviation_times_noise():
    mean, noise_ = torch.randn(2, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logvar = torch.full_like(mean, 2.0).log() * 2  # a standard deviation of 2
    posterior = DiagonalGaussian(mean, logvar)
    torch.testing.assert_close(posterior.sample(noise_), mean + 2 * noise_)
    assert torch.equal(posterior.sample(torch.zeros_like(mean)), mean)


def test_the_kl_is_that_of_torch_distributions():
    mean, logvar = torch.randn(2, 3, 4, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).flatten(1).sum(1)
    torch.testing.assert_close(DiagonalGaussian(mean, logvar).kl(), expected)
    standard = DiagonalGaussian(torch.zeros(2, 4, 1, 1), torch.zeros(2, 4, 1, 1))
    assert standard.kl().tolist() == [0, 0]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 4, 64, 64), r"images: shape \(1, 4, 64, 64\), expected \(B, 3, H, W\) = \(any, 3, any, any\)"),
        ((3, 64, 64), r"images: shape \(3, 64, 64\), expected \(B, 3, H, W\)"),
        # CompVis' network would round the latent's size down; the decoded image would be smaller than the given one.
        ((1, 3, 68, 76), r"images: 68 x 76 pixels, expected multiples of 8"),
    ],
)
def test_images_that_do_not_fit_are_refused(vae, shape, message):
    with pytest.raises(ValueError, match=message):
        vae.encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 8, 8, 8), (4, 8, 8)])
def test_latents_that_do_not_fit_are_refused(vae, shape):
    with pytest.raises(ValueError, match=r"z: shape .*, expected \(B, 4, H/f, W/f\) = \(any, 4, any, any\)"):
        vae.decode(torch.zeros(shape))
