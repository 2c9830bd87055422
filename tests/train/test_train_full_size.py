"""One step of fine-tuning at SD1.5's size: 860 million weights, 64 x 64 latents, activations computed twice."""

import logging
import resource
import time
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from networks import filled
from numpy.typing import NDArray
from torch import Tensor

from ldm.blocks import ResnetBlock, SpatialTransformer
from ldm.config import SD15
from ldm.schedule import Schedule
from ldm.train.objective import FineTuning, Material
from ldm.train.unet_learner import UNetLearner
from ldm.unet import UNet

log = logging.getLogger(__name__)


class Stored:
    """Made-up posteriors of one image of 512 x 512 pixels."""

    def moments(self, rows: NDArray[np.int64], flipped: Sequence[bool]) -> Tensor:
        return torch.randn(len(rows), 8, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def unet(full_unet: UNet) -> Iterator[UNet]:
    """The shared network, which the test may change: it gets its weights back."""
    yield full_unet
    full_unet.zero_grad(set_to_none=True)
    for module in full_unet.modules():
        if isinstance(module, ResnetBlock | SpatialTransformer):
            vars(module).pop("forward", None)
    full_unet.load_state_dict(filled("unet", SD15.unet).state_dict(), assign=True)
    full_unet.eval().requires_grad_(False)


@pytest.mark.slow
def test_a_step_at_full_size(unet: UNet) -> None:
    """14 GB: weights, gradients and two moments of 3.4 GB each; the log tells time and peak."""
    contexts = torch.randn(2, 77, 768, generator=torch.Generator().manual_seed(1))
    material = Material(np.array(["made-up"]), Stored(), torch.zeros(1, dtype=torch.int64), contexts, 0.18215)
    recipe = FineTuning(steps=1, batch=1, accumulate=1, checkpoint_gradients=True)
    before = {name: p[:1].detach().clone() for name, p in unet.named_parameters()}
    began = time.monotonic()
    taken = UNetLearner(unet, recipe).step(0, material, Schedule.sd15())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    log.warning("loss %.3f, %.0f s, peak %.1f GB", taken.loss, time.monotonic() - began, peak)
    assert 0.1 < taken.loss < 100  # weights that are no model: it misses the noise, by no more than it is large
    moved = {name: float((p[:1] - before[name]).detach().abs().max()) for name, p in unet.named_parameters()}
    # AdamW's first step is lr in each direction, plus the decay, lr * 1e-2 of the weight; float32 rounds 1e-7 of it
    assert [name for name, by in moved.items() if not 0 < by < 2e-5] == []
