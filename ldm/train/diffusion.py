"""Training the U-Net: predict the noise that was added to a latent, given the time and the caption.

    L = || eps - eps_theta(sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, t, context) ||^2      [Ho et al. 2020, eq. 14]

A network of v or x_0 (`ldm.prediction`) has that as its target instead of eps.

Letters: B batch, L context tokens, D context width, abar_t = alphas_cumprod[t].
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.config import Prediction
from ldm.schedule import Schedule
from ldm.unet import UNet

Network = Callable[[Tensor, Tensor, Tensor], Tensor]  # eps = network(x_t, t, context)


def draw_noise(x_0: Tensor, schedule: Schedule, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """eps (B, C, h, w) and the times t (B,) of a batch.

    The times are spread evenly with a common random shift: each is uniform on its own, and together they
    vary the loss less than independent draws [Kingma et al. 2021, "Variational diffusion models", appendix I].
    """
    batch, count = len(x_0), len(schedule)
    spread = (torch.arange(batch) / batch + torch.rand((), generator=generator)) % 1.0
    t = (spread * count).long().clamp(max=count - 1)
    return torch.randn(x_0.shape, generator=generator).to(x_0.device), t.to(x_0.device)


def noise_error(
    unet: UNet, x_0: Tensor, eps: Tensor, t: Tensor, context: Tensor, schedule: Schedule, gamma: float = 0.0
) -> Tensor:
    """The mean squared error of the predicted noise.

    Args:    as of `predict_noise`.  gamma: of `min_snr_weights`; 0 weights all times alike.
    """
    predicted = predict_noise(unet, x_0, eps, t, context, schedule, autocast=torch.bfloat16)
    if not gamma:
        return F.mse_loss(predicted, eps)
    return (min_snr_weights(schedule, t, gamma) * (predicted - eps).square().mean(dim=(1, 2, 3))).mean()


def predict_noise(
    network: Network,
    x_0: Tensor,
    eps: Tensor,
    t: Tensor,
    context: Tensor,
    schedule: Schedule,
    *,
    autocast: torch.dtype | None,
) -> Tensor:
    """What the network says of x_t, which is x_0 with `eps` added: of the noise in it, or whatever it predicts.

    Args:    x_0, eps: (B, 4, h, w).  t: (B,) int64.  context: (B, L, D).
             autocast: what to compute in where that is safe; None: in the network's own precision.
    Returns: (B, 4, h, w) float32.
    """
    x_t = schedule.add_noise(x_0, eps, t).contiguous(memory_format=torch.channels_last)
    with torch.autocast(x_t.device.type, autocast, enabled=autocast is not None):
        predicted = network(x_t, t, context)
    return predicted.float()


def target(prediction: Prediction, x_0: Tensor, eps: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """What a network should say of x_t: eps, x_0, or v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0, like x_0.

    [Salimans and Ho 2022, appendix D]
    """
    if prediction != "v":
        return eps if prediction == "eps" else x_0
    abar = schedule.alphas_cumprod.to(x_0.device)[t].view(-1, *[1] * (x_0.ndim - 1))
    return abar.sqrt().to(x_0.dtype) * eps - (1 - abar).sqrt().to(x_0.dtype) * x_0


def min_snr_weights(schedule: Schedule, t: Tensor, gamma: float, prediction: Prediction = "eps") -> Tensor:
    """What each sample's loss counts, so that the easy task of heavy noise and the fine detail pull less apart.

    w_t = min(SNR(t), gamma) of the error of x_0, SNR(t) = abar_t / (1 - abar_t); so of the error of eps over SNR(t),
    of v over SNR(t) + 1                                                        [Hang et al. 2023, section 3.4]

    Args:    t: (B,) int64.  gamma: 5 in the paper.
    Returns: (B,) float32, the weights for a network that predicts this.
    """
    abar = schedule.alphas_cumprod[t.cpu()]
    snr = abar / (1 - abar)
    if prediction == "eps":
        weights = (gamma / snr).clamp(max=1)  # 1 where there is no signal
    else:
        weights = snr.clamp(max=gamma) / (snr + 1 if prediction == "v" else 1)
    return weights.float().to(t.device)


def drop_captions(captions: Tensor, empty: int, share: float, generator: torch.Generator) -> Tensor:
    """Replace a share of the caption numbers by the empty caption's: the unconditional model that guidance needs.

    [Ho and Salimans 2022, algorithm 1]
    """
    dropped = torch.rand(captions.shape, generator=generator) < share
    return torch.where(dropped, empty, captions)


def initialise(unet: UNet) -> None:
    """Every residual branch starts at zero, so that the blocks start as identities. [Dhariwal and Nichol 2021]"""
    for name, p in unet.named_parameters():
        if name.rpartition(".")[0].endswith(("conv2", "proj_out", "conv_out")):
            torch.nn.init.zeros_(p)
