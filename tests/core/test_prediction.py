"""Models that predict v or x_0, and other schedules than SD1.5's: what diffusers' DDIM makes of the same network."""

import copy
import json

import numpy as np
import pytest
import torch
from networks import small
from reference import TRAJECTORY_G1, Golden
from small_networks import reference_run_inputs

from ldm.checkpoint.scheduler_json import read_scheduler
from ldm.conditioning import constant
from ldm.config import DiffusionConfig
from ldm.guidance import guided
from ldm.prediction import implied
from ldm.samplers import SAMPLERS, ddim, ddpm, euler, lcm
from ldm.schedule import SPACINGS, Schedule

GOLDEN = Golden("schedulers")
# The stored runs are float32's throughout. Against float64 they are off by 1e-6 and 1.4e-5 at guidance 1 and 3; read as
# x_0, which a network of random weights multiplies errors in, by 2.1e-5 and 2.7e-4. Three times that.
TOLERANCE = {1.0: 3 * TRAJECTORY_G1, 3.0: 4.5e-5}
TOLERANCE_X0 = {1.0: 7e-5, 3.0: 9e-4}


def config_of(case, tmp_path):
    """The scheduler_config.json of a case, read."""
    fields = dict(GOLDEN.meta["configs"][case])
    if case == "trained":
        fields["trained_betas"] = (np.linspace(0.03, 0.11, 1000) ** 2).tolist()
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps(fields))
    return read_scheduler(path)


def bound(config, guidance=1.0):
    """The small network under the stored runs' prompt, its output read as this model's."""
    unet = copy.copy(small("unet"))
    unet.prediction = config.prediction
    x_T, prompts, uncond = reference_run_inputs()
    schedule = Schedule.of(config)
    return guided(unet, constant(prompts[0], 10), guidance, uncond, schedule=schedule), x_T, schedule


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize(
    "case",
    [
        *("eps", "v", "v_zero_snr_trailing", "v_zero_snr_leading", "x0"),
        *("linear", "cosine", "alpha_one", "offset0", "trailing", "trained"),
    ],
)
@torch.no_grad()
def test_ddim_is_diffusers_ddim(tmp_path, case, guidance):
    config = config_of(case, tmp_path)
    eps_fn, x_T, schedule = bound(config, guidance)
    timesteps = SPACINGS[schedule.spacing](10, schedule)
    assert list(timesteps) == GOLDEN[f"{case}.timesteps"].tolist()
    stored = GOLDEN[f"{case}.alphas_cumprod"].astype(np.float64)
    assert np.abs(schedule.alphas_cumprod[::37].numpy() - stored).max() < 2e-6  # a float32 product of 1000 factors
    for step in ddim(eps_fn, x_T, schedule, 10, timesteps=timesteps):
        assert step.x_prev.isfinite().all()
    tolerance = TOLERANCE_X0 if case == "x0" else TOLERANCE
    assert GOLDEN.error(f"{case}.g{guidance:g}", step.x_prev) < tolerance[guidance]


ZERO_SNR = DiffusionConfig(prediction="v", zero_terminal_snr=True, spacing="trailing")


def test_the_schedule_is_stretched_to_pure_noise_and_keeps_its_clean_end():
    plain, stretched = Schedule.sd15(), Schedule.of(ZERO_SNR)
    assert float(stretched.alphas_cumprod[-1]) == 0
    assert float(stretched.alphas_cumprod[0]) == pytest.approx(float(plain.alphas_cumprod[0]), abs=1e-15)
    assert bool((stretched.alphas_cumprod.diff() < 0).all())
    torch.testing.assert_close(torch.cumprod(1 - stretched.betas, 0), stretched.alphas_cumprod, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("alphas_cumprod", [0.9, 0.3, 1e-4])
def test_each_prediction_implies_the_same_eps_and_x0(alphas_cumprod):
    generator = torch.Generator().manual_seed(0)
    x_0, eps = (torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    alpha, std = alphas_cumprod**0.5, (1 - alphas_cumprod) ** 0.5
    x_t = alpha * x_0 + std * eps
    for prediction, output in (("eps", eps), ("x0", x_0), ("v", alpha * eps - std * x_0)):
        for found, expected in zip(implied(prediction, output, x_t, alphas_cumprod), (eps, x_0), strict=True):
            torch.testing.assert_close(found, expected)


def test_in_pure_noise_v_tells_both_and_eps_is_refused():
    x_t, v = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2)
    eps, x_0 = implied("v", v, x_t, 0.0)
    assert torch.equal(eps, x_t)
    assert torch.equal(x_0, -v)
    with pytest.raises(ValueError, match="eps says nothing at alphas_cumprod 0"):
        implied("eps", v, x_t, 0.0)


@torch.no_grad()
def test_from_pure_noise_only_the_methods_that_can_begin_there_do():
    eps_fn, x_T, schedule = bound(ZERO_SNR)
    timesteps = SPACINGS["trailing"](10, schedule)
    noise = lambda step, draw=0: torch.zeros_like(x_T)  # noqa: E731
    for sampler in SAMPLERS.values():
        run = sampler(eps_fn, x_T, schedule, 10, timesteps=timesteps, noise=noise)
        if sampler in (ddim, ddpm, lcm):
            assert next(run).x_prev.isfinite().all()
        else:
            with pytest.raises(ValueError, match=r"divides by alpha, .*zero terminal SNR.*use ddim or ddpm"):
                next(run)
    assert next(euler(eps_fn, x_T, schedule, 10)).x_prev.isfinite().all()  # leading leaves the level out
    for name in ("karras", "log_snr"):
        with pytest.raises(ValueError, match="zero terminal SNR"):
            SPACINGS[name](10, schedule)
    plain_eps, _, _ = bound(DiffusionConfig(zero_terminal_snr=True))
    with pytest.raises(ValueError, match="eps says nothing of x_0 in pure noise"):
        next(ddim(plain_eps, x_T, schedule, 10, timesteps=timesteps))


def test_a_network_that_predicts_v_is_not_taken_for_one_that_predicts_eps():
    unet = copy.copy(small("unet"))
    unet.prediction = "v"
    _, prompts, _ = reference_run_inputs()
    with pytest.raises(ValueError, match=r"its U-Net predicts v; or use sd\.guided"):
        guided(unet, constant(prompts[0], 10), 1.0)
