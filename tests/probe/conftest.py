"""What tests of taps and edits share."""

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="module")
def plain(unet, x, context) -> Tensor:
    with torch.no_grad():
        return unet(x, 500, context)
