"""Large feed-forwards an image at a time on a CPU: the same numbers, and only where nobody looks."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ldm import fast
from ldm.blocks import BasicTransformerBlock
from ldm.fast import bands
from ldm.fast.ops import Ops


@pytest.fixture
def block(monkeypatch):
    monkeypatch.setattr(bands, "LARGE", 8 * 6 * 16)
    torch.manual_seed(0)
    made = BasicTransformerBlock(16, 2, 8, 1e-5).eval().requires_grad_(False)
    fast.install(made)
    return made.ff


@pytest.fixture
def rows(monkeypatch):
    """Images of every call of a GEGLU."""
    seen, plain = [], Ops.geglu
    monkeypatch.setattr(Ops, "geglu", lambda ops, x: (seen.append(len(x)), plain(ops, x))[1])
    return seen


@torch.no_grad()
def test_an_image_at_a_time_gives_the_same(block, rows):
    x = torch.randn(3, 6, 16)
    torch.testing.assert_close(block(x), block.net(x), rtol=1e-6, atol=1e-6)  # a product of fewer rows rounds otherwise
    assert rows == [1, 1, 1, 3]


@torch.no_grad()
@pytest.mark.parametrize("x", [torch.randn(3, 5, 16), torch.randn(1, 6, 16), torch.randn(6, 16)])
def test_small_ones_and_single_images_go_as_they_are(block, rows, x):
    block(x)
    assert rows == [len(x)]


def test_gradients_go_through_all_at_once(block, rows):
    x = torch.randn(3, 6, 16, requires_grad=True)
    block(x).sum().backward()
    assert rows == [3]
    assert x.grad is not None


@torch.no_grad()
def test_whoever_looks_sees_the_whole_batch(block):
    x, seen = torch.randn(3, 6, 16), []
    hook = block.net[2].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    block(x)
    assert seen == [(3, 6, 16)]
    hook.remove()

    class Own(nn.Linear):
        def forward(self, y):
            seen.append(y.shape)
            return super().forward(y)

    block.net[2] = Own(64, 16)
    block(x)
    assert seen[1:] == [(3, 6, 64)]


@torch.no_grad()
def test_operations_are_counted_as_those_of_the_plain_block(block, rows):
    with FlopCounterMode(display=False) as counter:
        block(torch.randn(3, 6, 16))
    assert rows == [3]
    assert counter.get_total_flops() == 2 * 3 * 6 * 16 * (128 + 64)
