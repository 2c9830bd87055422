"""What the U-Net is trained on: the loss, the times of a batch, dropped captions, its first weights."""

import math

import pytest
import torch
from torch import Tensor

from ldm.config import DiffusionConfig, UNetConfig
from ldm.prediction import implied
from ldm.schedule import Schedule
from ldm.train import diffusion
from ldm.train.diffusion import min_snr_weights, target
from ldm.unet import UNet

SCHEDULE = Schedule.sd15()


class FakeUNet:
    """Halves the latents and adds the time and the context's first value; remembers what it saw."""

    def __call__(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        self.x_t, self.t = x_t, t
        return 0.5 * x_t + (t.float() / 1000 + context[:, 0, 0])[:, None, None, None]


X_0 = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
CONTEXT = torch.randn(4, 7, 16, generator=torch.Generator().manual_seed(1))


def loss_of(network, x_0: Tensor, generator: torch.Generator) -> Tensor:
    """As the third stage of a small model has it."""
    return diffusion.noise_error(network, x_0, *diffusion.draw_noise(x_0, SCHEDULE, generator), CONTEXT, SCHEDULE)


def test_the_diffusion_loss_is_what_it_says():
    unet = FakeUNet()
    loss = loss_of(unet, X_0, torch.Generator().manual_seed(5))
    # The same draws in the same order: one shift for the batch's times, then the noise.
    generator = torch.Generator().manual_seed(5)
    shift = float(torch.rand((), generator=generator))
    eps = torch.randn(X_0.shape, generator=generator)
    terms = []
    for b in range(4):
        t = int((b / 4 + shift) % 1.0 * 1000)
        assert int(unet.t[b]) == t
        abar = float(SCHEDULE.alphas_cumprod[t])
        x_t = math.sqrt(abar) * X_0[b] + math.sqrt(1 - abar) * eps[b]
        torch.testing.assert_close(unet.x_t[b], x_t)
        terms.append((0.5 * x_t + t / 1000 + CONTEXT[b, 0, 0] - eps[b]).square().mean())
    torch.testing.assert_close(loss, torch.stack(terms).mean())


def test_the_exact_noise_costs_nothing():
    def exact(x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        abar = SCHEDULE.alphas_cumprod[t].view(-1, 1, 1, 1)
        return ((x_t - abar.sqrt() * X_0) / (1 - abar).sqrt()).float()

    # At t = 0 the noise is 3 % of x_t, so float32's rounding, 1e-7, is 4e-6 of it; squared.
    assert float(loss_of(exact, X_0, torch.Generator().manual_seed(0))) < 1e-9


def test_the_times_of_a_batch_are_spread_evenly_and_every_one_is_reached():
    seen, generator = [], torch.Generator().manual_seed(0)
    for _ in range(500):
        unet = FakeUNet()
        loss_of(unet, X_0[:, :, :1, :1], generator)
        gaps = unet.t.sort().values.diff()
        assert ((gaps - 250).abs() <= 1).all()  # a quarter of 1000, rounded down at both ends
        seen.append(unet.t)
    t = torch.cat(seen)
    assert (int(t.min()), int(t.max())) == (t.min().clamp(0, 9), t.max().clamp(990, 999))
    # Each is uniform on 0..999 on its own: a mean of 499.5. 500 independent shifts, and the mean over a batch strays
    # less than one draw's 289 / sqrt(500) = 13: four times that.
    for place in range(4):
        assert abs(float(torch.stack(seen)[:, place].float().mean()) - 499.5) < 52


def test_the_loss_of_a_real_network_is_finite_and_reaches_every_weight():
    torch.manual_seed(0)
    unet = UNet(UNetConfig(widths=(32, 64), resnets_per_level=1, attention=(False, True), context_width=16))
    loss = loss_of(unet, X_0, torch.Generator().manual_seed(0))
    assert loss.isfinite()
    loss.backward()
    still = {name for name, p in unet.named_parameters() if p.grad is None or not p.grad.any()}
    assert still == set()


@torch.no_grad()
def test_an_initial_network_predicts_the_same_whatever_it_sees():
    torch.manual_seed(0)
    unet = UNet(UNetConfig(widths=(32, 64), resnets_per_level=1, attention=(False, True), context_width=16))
    diffusion.initialise(unet)
    assert torch.equal(unet(X_0, 500, CONTEXT), unet.conv_out.bias.view(1, 4, 1, 1).expand_as(X_0))
    for name, p in unet.named_parameters():
        if name.endswith(("conv2.weight", "proj_out.weight")):
            assert not p.any(), name


def test_the_share_of_dropped_captions():
    captions = torch.arange(100_000) % 9
    dropped = diffusion.drop_captions(captions, 9, 0.1, torch.Generator().manual_seed(0))
    share = float((dropped == 9).float().mean())
    assert abs(share - 0.1) < 0.005  # a binomial's standard deviation is 0.00095: five times that
    assert torch.equal(dropped[dropped != 9], captions[dropped != 9])
    assert torch.equal(dropped, diffusion.drop_captions(captions, 9, 0.1, torch.Generator().manual_seed(0)))
    assert torch.equal(diffusion.drop_captions(captions, 9, 0.0, torch.Generator()), captions)
    assert (diffusion.drop_captions(captions, 9, 1.0, torch.Generator()) == 9).all()


# ---- networks of v and x_0 -------------------------------------------------------------------------


@pytest.mark.parametrize("config", [DiffusionConfig(), DiffusionConfig(zero_terminal_snr=True)])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_a_network_that_hits_its_target_gives_back_eps_and_x0(prediction, config):
    schedule = Schedule.of(config)
    x_0, eps = torch.randn(2, 5, 4, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    t = torch.tensor([0, 1, 400, 998, 999])
    wanted, x_t = target(prediction, x_0, eps, t, schedule), schedule.add_noise(x_0, eps, t)
    for i in range(4 if config.zero_terminal_snr else 5):  # at the last, pure noise, eps and x_0 say too little
        found = implied(prediction, wanted[i], x_t[i], float(schedule.alphas_cumprod[t[i]]))
        for ours, true in zip(found, (eps[i], x_0[i]), strict=True):
            torch.testing.assert_close(ours, true, rtol=1e-9, atol=1e-9)
    if config.zero_terminal_snr and prediction == "v":
        torch.testing.assert_close(wanted[4], -x_0[4])  # v of pure noise is -x_0


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weighs_the_error_of_x0_alike_whatever_is_predicted(gamma):
    schedule, t = Schedule.sd15(), torch.tensor([0, 100, 500, 999])
    abar = schedule.alphas_cumprod[t]
    snr = abar / (1 - abar)
    # An error d of x_0 is one of SNR d^2 in eps, (SNR + 1) d^2 in v, where x_t is the same
    for prediction, gain in (("x0", 1.0), ("eps", snr), ("v", snr + 1)):
        weights = min_snr_weights(schedule, t, gamma, prediction).double() * gain
        torch.testing.assert_close(weights, snr.clamp(max=gamma), rtol=1e-6, atol=0)
    noisy = Schedule.of(DiffusionConfig(zero_terminal_snr=True))
    assert [float(min_snr_weights(noisy, t, gamma, p)[3]) for p in ("eps", "v", "x0")] == [1, 0, 0]
