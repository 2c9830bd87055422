"""Every equation that is cited in the code, by its name: [DDIM, eq. 9] is held by `test_ddim_eq_9`.

`test_walk.py` sees to it that none is cited without. Each is computed here in another way than in the code: by hand, by
a sum written out, or by quadrature along a flow that is known in closed form.
"""

import math

import numpy as np
import pytest
import torch
from ldm_tools.examples.cross_attention_lora import LoRA
from torch import Tensor
from torch.nn import functional as F

from ldm.blocks import attend
from ldm.probe import attention_probabilities
from ldm.samplers import ddim, ddpm, euler, plms, unipc
from ldm.samplers.driver import Level
from ldm.samplers.multistep import _correct, _transfer
from ldm.schedule import Schedule, karras
from ldm.study.metrics.cfrt import cfrt
from ldm.study.metrics.directions import cosine_matrix
from ldm.train.diffusion import Network, draw_noise, noise_error
from ldm.train.scores import expected_calibration_error, reliability
from ldm.train.text_encoder import contrastive_loss
from ldm.traversal.inversion import ddim_inversion, fixed_point_inversion

SCHEDULE = Schedule.sd15()
A = [float(a) for a in SCHEDULE.alphas_cumprod]
SHAPE = (2, 4, 4, 4)


def randn(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def known_eps(x: Tensor, t: float, step: int) -> Tensor:
    """Another noise at every step, whatever x is."""
    return randn(100 + step)


def close(a: object, b: object) -> None:
    """Equal up to float64's rounding in sums of a few terms."""
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-10, atol=1e-12)


# ---- attention -------------------------------------------------------------------------------------


def test_vaswani_et_al_2017_eq_1():
    q, k, v = randn(1, (1, 3, 8)), randn(2, (1, 5, 8)), randn(3, (1, 5, 8))
    out = attend(q, k, v, heads=2)
    probabilities = attention_probabilities(*(x.view(1, -1, 2, 4).transpose(1, 2) for x in (q, k)))
    for head in range(2):
        cut = slice(4 * head, 4 * head + 4)
        for n in range(3):
            scores = [math.exp(float(q[0, n, cut] @ k[0, m, cut]) / math.sqrt(4)) for m in range(5)]
            weights = [score / sum(scores) for score in scores]
            close(out[0, n, cut], sum(w * v[0, m, cut] for m, w in enumerate(weights)))
            close(probabilities[0, head, n], torch.tensor(weights, dtype=torch.float64))


# ---- the noise schedule ----------------------------------------------------------------------------


def test_ddpm_eq_4():
    """A thousand small steps, x <- sqrt(1 - beta) x + sqrt(beta) eps, add up to the one jump."""
    share, variance = 1.0, 0.0
    for t, beta in enumerate(SCHEDULE.betas.tolist()):
        share, variance = share * math.sqrt(1 - beta), (1 - beta) * variance + beta
        if t in (0, 1, 500, 999):
            close(share, math.sqrt(A[t]))
            close(variance, 1 - A[t])
    x_0, eps = randn(1), randn(2)
    close(SCHEDULE.add_noise(x_0, eps, 500), math.sqrt(A[500]) * x_0 + math.sqrt(1 - A[500]) * eps)


def test_edm_eq_5():
    sigmas = [Level(t, SCHEDULE.alphas_cumprod_at(t)).sigma for t in karras(5, SCHEDULE, endpoint=True)]
    high, low = (math.sqrt((1 - a) / a) ** (1 / 7) for a in (A[999], A[0]))
    expected = [(high + i / 4 * (low - high)) ** 7 for i in range(5)]
    # Times between the table's are found by interpolation.
    np.testing.assert_allclose(sigmas, expected, rtol=1e-6)


# ---- samplers --------------------------------------------------------------------------------------


def test_ddim_eq_9():
    x_0, eps = randn(1), randn(2)
    x_t = math.sqrt(A[801]) * x_0 + math.sqrt(1 - A[801]) * eps
    step = next(ddim(lambda x, t, step: eps, x_t, SCHEDULE, 2, timesteps=(801, 401)))
    close(step.x0_pred, x_0)


def test_ddim_eq_12():
    x_t, z = randn(1), randn(2)
    step = next(ddim(known_eps, x_t, SCHEDULE, 2, timesteps=(801, 401), eta=0.5, noise=lambda step: z))
    sigma = 0.5 * math.sqrt((1 - A[401]) / (1 - A[801])) * math.sqrt(1 - A[801] / A[401])
    predicted = math.sqrt(A[401]) * step.x0_pred
    direction = math.sqrt(1 - A[401] - sigma**2) * known_eps(x_t, 801, 0)
    close(step.x_prev, predicted + direction + sigma * z)


def test_ddim_eq_16():
    """The noise that eta adds, isolated: everything else is zero."""
    zero, one = torch.zeros(SHAPE, dtype=torch.float64), torch.ones(SHAPE, dtype=torch.float64)
    run = ddim(lambda x, t, step: zero, zero, SCHEDULE, 2, timesteps=(801, 401), eta=1.0, noise=lambda step: one)
    close(next(run).x_prev, one * math.sqrt((1 - A[401]) / (1 - A[801]) * (1 - A[801] / A[401])))


def test_ddim_eq_13():
    """In y = x / sqrt(a) a step is a straight line along eps, downwards as upwards."""

    def slope(a: float) -> float:
        return math.sqrt((1 - a) / a)

    x_t = randn(1)
    down = next(ddim(known_eps, x_t, SCHEDULE, 2, timesteps=(801, 401)))
    moved = down.x_prev / math.sqrt(A[401]) - x_t / math.sqrt(A[801])
    close(moved, (slope(A[401]) - slope(A[801])) * known_eps(x_t, 801, 0))
    *_, up = ddim_inversion(known_eps, x_t, SCHEDULE, 2, timesteps=(801, 401))
    moved = up.x_t / math.sqrt(A[801]) - up.x_prev / math.sqrt(A[401])
    close(moved, (slope(A[801]) - slope(A[401])) * known_eps(x_t, 801, 0))


def test_aidi_eq_7():
    """The latent that is found is its own image under the step: x = c x_prev + d eps(x)."""

    def eps_fn(x: Tensor, t: float, step: int) -> Tensor:
        return torch.tanh(x)

    *_, step = fixed_point_inversion(eps_fn, randn(1), SCHEDULE, 2, timesteps=(801, 401), tolerance=0)
    a, a_prev = A[801], A[401]
    c = math.sqrt(a / a_prev)
    d = math.sqrt(1 - a) - c * math.sqrt(1 - a_prev)
    found, image = step.x_t, c * step.x_prev + d * eps_fn(step.x_t, 801, 0)
    # The iteration ends when it comes no closer; two latents are then some 1e-8 apart.
    torch.testing.assert_close(found, image, rtol=1e-6, atol=1e-6)


def test_ddpm_eq_7():
    """The posterior of x_prev, by Bayes' rule: precisions add, means are weighted by them."""
    x_t, zero = randn(1), torch.zeros(SHAPE, dtype=torch.float64)
    a, a_prev = A[801], A[401]
    step = next(ddpm(known_eps, x_t, SCHEDULE, 2, timesteps=(801, 401), noise=lambda step: zero))
    noisier = next(ddpm(known_eps, x_t, SCHEDULE, 2, timesteps=(801, 401), noise=lambda step: zero + 1))
    ratio = a / a_prev  # x_t = sqrt(ratio) x_prev + sqrt(1 - ratio) eps
    from_below, from_above = 1 / (1 - a_prev), ratio / (1 - ratio)
    variance = 1 / (from_below + from_above)
    mean = from_below * math.sqrt(a_prev) * step.x0_pred + from_above * x_t / math.sqrt(ratio)
    close(step.x_prev, variance * mean)
    close(noisier.x_prev - step.x_prev, (zero + 1) * math.sqrt(variance))


def test_pndm_eq_11():
    """The transfer, as PNDM writes it."""
    x, e, a, b = randn(1), randn(2), A[801], A[401]
    denominator = math.sqrt(a) * (math.sqrt((1 - b) * a) + math.sqrt((1 - a) * b))
    close(_transfer(Level(801, a), Level(401, b), x, e), math.sqrt(b / a) * x - (b - a) / denominator * e)


def test_pndm_eq_12():
    steps = list(plms(known_eps, randn(1), SCHEDULE, 5, timesteps=(801, 601, 401, 201, 1)))
    e = [step.eps for step in steps]
    mean = (55 * e[3] - 59 * e[2] + 37 * e[1] - 9 * e[0]) / 24
    close(steps[3].x_prev, _transfer(Level(201, A[201]), Level(1, A[1]), steps[3].x_t, mean))


def test_edm_eq_1_and_7():
    """dy / dsigma = eps along the known flow of Gaussian data of width s; and Euler's step is that slope."""
    s, sigma, step = 0.7, 1.3, 1e-5

    def y(sigma: float) -> float:
        return math.sqrt(s**2 + sigma**2)

    alpha = 1 / math.sqrt(1 + sigma**2)
    std, x = sigma * alpha, alpha * y(sigma)
    eps = std * x / (alpha**2 * s**2 + std**2)  # E[eps | x] for x_0 of variance s^2
    # A central difference, off by step^2 and by rounding / step.
    assert (y(sigma + step) - y(sigma - step)) / (2 * step) == pytest.approx(eps, rel=1e-8)

    x_t, sigmas = randn(1), [math.sqrt((1 - a) / a) for a in (A[801], A[401])]
    taken = next(euler(known_eps, x_t, SCHEDULE, 2, timesteps=(801, 401)))
    moved = taken.x_prev / math.sqrt(A[401]) - x_t / math.sqrt(A[801])
    close(moved, (sigmas[1] - sigmas[0]) * known_eps(x_t, 801, 0))


def gaussian_flow(log_snr: float, s: float = 0.7) -> tuple[float, float, float, float, float]:
    """alpha, sigma, and x, eps, x0_pred on the exact flow of Gaussian data of width s."""
    alpha = 1 / math.sqrt(1 + math.exp(-2 * log_snr))
    sigma = alpha * math.exp(-log_snr)
    variance = alpha**2 * s**2 + sigma**2
    x = math.sqrt(variance)
    return alpha, sigma, x, sigma * x / variance, alpha * s**2 * x / variance


def integral(function: object, begin: float, end: float) -> float:
    """Gauss-Legendre with 40 nodes: exact to rounding for such smooth functions."""
    nodes, weights = np.polynomial.legendre.leggauss(40)
    at = begin + (end - begin) * (nodes + 1) / 2
    return float(sum(w * function(u) for w, u in zip(weights, at, strict=True)) * (end - begin) / 2)


def test_dpm_solver_eq_3_4():
    begin, end = -1.0, 0.8
    alpha, _, x, _, _ = gaussian_flow(begin)
    alpha_then, _, x_then, _, _ = gaussian_flow(end)
    noise = integral(lambda u: math.exp(-u) * gaussian_flow(u)[3], begin, end)
    close(x_then, alpha_then / alpha * x - alpha_then * noise)


def test_dpm_solver_pp_eq_8():
    begin, end = -1.0, 0.8
    _, sigma, x, _, _ = gaussian_flow(begin)
    _, sigma_then, x_then, _, _ = gaussian_flow(end)
    image = integral(lambda u: math.exp(u) * gaussian_flow(u)[4], begin, end)
    close(x_then, sigma_then / sigma * x + sigma_then * image)


def test_unip_2_eq_3():
    """A step along the line through the last two x0_pred, from the corrected latent."""
    first, second, _ = unipc(known_eps, randn(1), SCHEDULE, 3, timesteps=(801, 401, 101))
    level, before, after = (Level(t, A[t]) for t in (401, 801, 101))
    h, h_1 = after.log_snr - level.log_snr, level.log_snr - before.log_snr
    D = second.x0_pred + h / (2 * h_1) * (second.x0_pred - first.x0_pred)
    corrected = second.history[0]
    close(second.x_prev, after.std / level.std * corrected + after.alpha * (1 - math.exp(-h)) * D)


def test_unic_2_eq_9():
    """The correction is exact where x0 is a parabola in lambda."""

    def parabola(log_snr: float) -> float:
        return 0.3 - 0.8 * log_snr + 0.5 * log_snr**2

    levels = [Level(t, A[t]) for t in (801, 601, 301)]
    x0s = [torch.tensor([parabola(level.log_snr)], dtype=torch.float64) for level in reversed(levels)]
    x_1, (_, begin, end) = torch.tensor([0.4], dtype=torch.float64), levels
    image = integral(lambda u: math.exp(u) * parabola(u), begin.log_snr, end.log_snr)
    close(_correct(x_1, x0s, levels), end.std / begin.std * x_1 + end.std * image)


# ---- training --------------------------------------------------------------------------------------


def test_ddpm_eq_14():
    """A network that knows x_0 and answers with the noise has no loss; one that answers 0 has the noise's variance."""
    x_0, context = randn(1).float(), torch.zeros(2, 3, 5)

    def knows(x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        a = SCHEDULE.alphas_cumprod[t].float().view(-1, 1, 1, 1)
        return (x_t - a.sqrt() * x_0) / (1 - a).sqrt()

    def loss(network: Network) -> float:
        drawn = draw_noise(x_0, SCHEDULE, torch.Generator().manual_seed(0))
        return float(noise_error(network, x_0, *drawn, context, SCHEDULE))

    # Float32: the division by sqrt(1 - abar) enlarges the rounding of x_t, most where there is little noise.
    assert loss(knows) < 1e-6
    silent = loss(lambda x_t, t, context: 0 * x_t)
    assert silent == pytest.approx(1, abs=0.4)  # 128 squares of mean 1 and variance 2: three standard errors


def test_hu_et_al_2021_eq_3():
    torch.manual_seed(0)
    linear = torch.nn.Linear(5, 7).double()
    lora = LoRA(linear, rank=2, scale=3.0).double()
    torch.nn.init.normal_(lora.b)
    x = randn(1, (4, 5))
    close(lora(x), x @ (linear.weight + 3.0 / 2 * lora.b @ lora.a).T + linear.bias)


def test_guo_et_al_2017_eq_3():
    """Two bins by hand: 2 images at .15 of which 1 is positive, 1 at .95 that is not."""
    bins = reliability(np.array([0.12, 0.18, 0.95]), np.array([True, False, False]))
    assert expected_calibration_error(bins) == pytest.approx(2 / 3 * abs(0.15 - 0.5) + 1 / 3 * 0.95)


class FixedLogits:
    """A contrastive model whose answer is known."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def __call__(self, latents: Tensor, ids: Tensor) -> Tensor:
        return self.logits[:, ids]


class CaptionNumbers:
    """Captions whose token ids are their numbers."""

    ids = torch.arange(4)


def test_yang_et_al_2022_unicl_eq_3_5():
    """Each image against all captions and back, every matching pair a target, equals plain cross entropy."""
    logits, captions = randn(1, (4, 4)), torch.tensor([0, 2, 0, 3])
    pairs = logits[:, captions]  # (image, caption of image)
    targets = (captions[:, None] == captions).double()
    by_image = -(targets * pairs.log_softmax(1)).sum(1) / targets.sum(1)
    by_caption = -(targets * pairs.log_softmax(0)).sum(0) / targets.sum(0)
    # A matching column is a copy of the own one, so its row entry is equal; columns differ between matching images.
    own = 0.5 * (F.cross_entropy(pairs, torch.arange(4)) + F.cross_entropy(pairs.T, torch.arange(4)))
    close(by_image.mean(), F.cross_entropy(pairs, torch.arange(4)))
    close(by_caption.mean(), F.cross_entropy(pairs.T, torch.arange(4)))
    close(contrastive_loss(FixedLogits(logits), torch.zeros(4), captions, CaptionNumbers()), own)


# ---- metrics ---------------------------------------------------------------------------------------


def test_paper_eq_3():
    """Two seeds, two classifiers: the swap moves its own classifier most for the first seed, not for the second."""
    neutral = np.array([[0.1, 0.1], [0.1, 0.1]])
    swapped = np.array([[[[0.9, 0.2]]], [[[0.3, 0.8]]]])  # (seeds, attributes, swap steps, classifiers)
    report = cfrt(neutral, swapped, heads=("effusion", "devices"), attributes=("effusion",))
    assert report["effusion"]["cfrt"]["own_head_signed"]["value"] == 0.5


def test_paper_eq_4():
    neutral, swapped = np.array([1.0, 1.0]), np.array([[4.0, 5.0], [5.0, 4.0]])  # directions (3, 4) and (4, 3)
    np.testing.assert_allclose(cosine_matrix(neutral, swapped), [[1, 24 / 25], [24 / 25, 1]], rtol=1e-12)
