"""What tests of taps and edits share."""

import pytest
import torch
from networks import small
from reference import noise
from torch import Tensor

from ldm.unet import UNet


@pytest.fixture(scope="module")
def unet() -> UNet:
    return small("unet")


@pytest.fixture(scope="module")
def x() -> Tensor:
    return noise("small.latent", (2, 4, 16, 16))


@pytest.fixture(scope="module")
def context() -> Tensor:
    return noise("small.context", (2, 77, 64))


@pytest.fixture(scope="module")
def plain(unet, x, context) -> Tensor:
    with torch.no_grad():
        return unet(x, 500, context)
