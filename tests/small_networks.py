"""What the sampling tests run on: the inputs of the stored trajectories, and a toy U-Net for identities."""

import torch
from reference import noise
from torch import Tensor

from ldm.config import SD15
from ldm.pipeline import StableDiffusion
from ldm.schedule import Schedule


def reference_run_inputs() -> tuple[Tensor, list[Tensor], Tensor]:
    """What the stored trajectories of `networks.small("unet")` were made from.

    Returns: x_T (1, 4, 16, 16), three prompts' contexts and the empty prompt's, (1, 77, 64) each.
    """
    prompts = [noise(f"sampler.cond{k}", (1, 77, 64)) for k in range(3)]
    return noise("sampler.xT", (1, 4, 16, 16)), prompts, noise("sampler.uncond", (1, 77, 64))


class ToyUNet:
    """A U-Net's signature over a few lines of arithmetic, bit for bit the same in every batch.

    Only + * /, each value by itself: no sum whose order could change, no vectorised function whose last
    elements are computed in another way. Keeps (rows, t, context of the first row) of every call.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, Tensor]] = []

    def __call__(self, x_t: Tensor, t: int, context: Tensor) -> Tensor:
        assert (x_t.shape[0], x_t.dtype) == (context.shape[0], context.dtype)
        self.calls.append((len(x_t), t, context[0]))
        return 0.5 * x_t / (1 + x_t * x_t) + (t / 1000) * context[:, 0, :4, None, None]


def toy_context(value: float, batch: int = 1) -> Tensor:
    """(batch, 3, 8): a context that ToyUNet can tell from others by its value."""
    return value * torch.linspace(0.5, 1.5, 24).view(1, 3, 8).repeat(batch, 1, 1)


def sampling_model(unet, max_batch: int | None = None) -> StableDiffusion:
    """As much of a model as sampling under given contexts asks for: a U-Net, or a stand-in for one, and a schedule."""
    parts = dict.fromkeys(("tokenizer", "clip", "vae", "report"))
    return StableDiffusion(
        config=SD15, unet=unet, schedule=Schedule.sd15(), device=torch.device("cpu"), max_batch=max_batch, **parts
    )
