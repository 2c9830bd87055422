"""What the autoencoder learns, and the latents' unit variance."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from ldm.config import VAEConfig
from ldm.train import autoencoder
from ldm.vae import AutoencoderKL, DiagonalGaussian


class RandomImages:
    """What the losses, `normalise_latents` and `encode_all` ask of a PhantomSet: a length and batches."""

    def __init__(self, count: int) -> None:
        self.images = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Sequence[int]) -> Tensor:
        return self.images[torch.as_tensor(list(indices))]


def tiny_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(VAEConfig(widths=(8, 16), resnets_per_level=1, norm_groups=4)).eval()


def test_reconstruction_loss_is_nothing_only_for_the_same_image():
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert float(autoencoder.reconstruction_loss(images, images.clone())) == 0.0
    for error in (torch.full((1,), 0.1), 0.1 * (torch.arange(16.0) % 2)):
        assert float(autoencoder.reconstruction_loss(images, images + error)) > 0.01
        assert float(autoencoder.reconstruction_loss(images, images - error)) > 0.01


def test_the_autoencoders_loss_is_a_function_of_seed_and_step():
    vae, data = tiny_vae(), RandomImages(8)
    images = data.batch([0, 3])
    noises = [autoencoder.posterior_noise(vae, images, *drawn) for drawn in ((0, 0), (0, 0), (0, 1), (1, 0))]
    losses = [autoencoder.autoencoder_loss(vae, images, noise) for noise in noises]
    assert losses[0].isfinite()
    assert losses[0].ndim == 0
    assert losses[0] == losses[1]
    assert losses[0] != losses[2] != losses[3] != losses[0]
    more_kl = autoencoder.autoencoder_loss(vae, images, noises[0], kl_weight=1.0)
    assert more_kl > losses[0]
    losses[0].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.parameters())


@torch.no_grad()
def test_normalised_latents_have_unit_variance_and_the_same_images():
    vae, data = tiny_vae(), RandomImages(24)
    images, noise = data.images, torch.randn(24, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    before = vae.encode(images)
    decoded, sampled = vae.decode(before.mean), vae.decode(before.sample(noise))
    assert abs(float(before.mean.std()) * 0.18215 - 1) > 0.5  # there is something to do

    autoencoder.normalise_latents(vae, data, images=24, batch=8)
    after = vae.encode(images)
    latents = after.mean * 0.18215
    # Weights and activations are float32 and of size 1 to 10: 1e-6 of rounding, and ten times that is allowed.
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 1e-5
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(4), rtol=1e-5, atol=0)
    torch.testing.assert_close(vae.decode(after.mean), decoded, rtol=1e-5, atol=1e-5)
    # The posterior went along: its samples decode to the same images as well.
    torch.testing.assert_close(vae.decode(after.sample(noise)), sampled, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("images", [10, 2048])
def test_normalising_takes_a_number_of_images_that_is_no_multiple_of_the_batch(images):
    vae, data = tiny_vae(), RandomImages(10)
    autoencoder.normalise_latents(vae, data, images=images, batch=4)
    latents = vae.encode(data.images).mean * 0.18215
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(4), rtol=1e-5, atol=0)


@torch.no_grad()
def test_encoding_a_set_keeps_mean_and_standard_deviation():
    vae, data = tiny_vae(), RandomImages(10)
    encoded = autoencoder.encode_all(vae, data, batch=4)
    posterior = vae.encode(data.images)
    # Batches of another size add up in another order: float32 rounding.
    torch.testing.assert_close(encoded[:, :4], 0.18215 * posterior.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(encoded[:, 4:], 0.18215 * (0.5 * posterior.logvar).exp(), rtol=1e-5, atol=1e-6)
    noise = torch.randn(10, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    mean, std = encoded.chunk(2, dim=1)
    scaled = DiagonalGaussian(mean, 2 * std.log()).sample(noise)
    torch.testing.assert_close(scaled, 0.18215 * posterior.sample(noise), rtol=1e-5, atol=1e-6)
