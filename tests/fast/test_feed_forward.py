"""Large feed-forwards in parts on a CPU: the same numbers, and only where nobody looks."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ldm import fast
from ldm.blocks import Attention, BasicTransformerBlock, FeedForward
from ldm.fast import forwards
from ldm.fast.ops import Ops


@pytest.fixture
def block(monkeypatch):
    monkeypatch.setattr(forwards, "LARGE", 4 * 8 * 6 * 16)
    monkeypatch.setattr(forwards, "HIDDEN", 4 * 8 * 4 * 16)
    torch.manual_seed(0)
    made = BasicTransformerBlock(16, 2, 8, 1e-5).eval().requires_grad_(False)
    fast.install(made)
    return made.ff


@pytest.fixture
def rows(monkeypatch):
    """Images and positions of every call of a GEGLU."""
    seen, plain = [], Ops.geglu
    monkeypatch.setattr(Ops, "geglu", lambda ops, x: (seen.append(x.shape[:-1]), plain(ops, x))[1])
    return seen


@torch.no_grad()
@pytest.mark.parametrize(("positions", "parts"), [(6, [3, 3]), (8, [4, 4]), (9, [3, 3, 3]), (11, [4, 4, 3])])
def test_parts_of_each_image_give_the_same(positions, parts, block, rows):
    x = torch.randn(2, positions, 16)
    torch.testing.assert_close(block(x), block.net(x), rtol=1e-6, atol=1e-6)  # a product of fewer rows rounds otherwise
    assert rows == [(1, part) for part in (*parts, *parts)] + [(2, positions)]
    assert torch.equal(block(x[:1]), block(x)[:1])


@torch.no_grad()
@pytest.mark.parametrize("x", [torch.randn(3, 5, 16), torch.randn(0, 6, 16), torch.randn(3, 0, 16), torch.randn(6, 16)])
def test_small_ones_go_as_they_are(block, rows, x):
    assert block(x).shape == x.shape
    assert rows == [x.shape[:-1]]


def test_gradients_go_through_all_at_once(block, rows):
    x = torch.randn(3, 6, 16, requires_grad=True)
    block(x).sum().backward()
    assert rows == [(3, 6)]
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
    assert rows == [(3, 6)]
    assert counter.get_total_flops() == 2 * 3 * 6 * 16 * (128 + 64)


@torch.no_grad()
def test_half_as_many_bytes_make_half_as_many_parts(block, rows):
    block.to(torch.bfloat16)
    block(torch.randn(1, 8, 16, dtype=torch.bfloat16))
    assert rows == [(1, 8)]
    block(torch.randn(1, 12, 16, dtype=torch.bfloat16))
    assert rows[1:] == [(1, 6), (1, 6)]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["softmax", "attention", "norm", "parametrized"])
def test_layers_that_look_at_other_rows_see_all(kind, block, rows):
    if kind == "softmax":
        block.net[1] = nn.Softmax(dim=1)
    elif kind == "attention":
        block.net.append(Attention(16, 2))
    elif kind == "norm":
        block.net.append(nn.GroupNorm(1, 8))
    else:
        nn.utils.parametrizations.weight_norm(block.net[2])
    x = torch.randn(1, 8, 16)
    assert torch.equal(block(x), block.net(x))
    assert rows == [(1, 8), (1, 8)]


@torch.no_grad()
def test_another_width_of_the_result_is_kept(block):
    block.net[2] = nn.Linear(64, 5)
    x = torch.randn(2, 9, 16)
    torch.testing.assert_close(block(x), block.net(x), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_ragged_batches_go_through(block):
    x = [torch.randn(5, 16), torch.randn(9, 16)]
    found = block(torch.nested.nested_tensor(x, layout=torch.jagged)).unbind()
    for row, result in zip(x, found, strict=True):
        torch.testing.assert_close(result, block.net(row))


def test_it_can_be_exported_for_any_number_of_positions(block):
    x, plain = torch.randn(2, 6, 16), FeedForward(16)
    dims = {0: torch.export.Dim("b", min=2, max=64), 1: torch.export.Dim("n", min=2, max=4096)}
    plain.load_state_dict(block.state_dict())
    exported = torch.export.export(block, (x,), dynamic_shapes=(dims,), strict=False).module()
    for positions in (6, 700):
        other = torch.randn(3, positions, 16)
        torch.testing.assert_close(exported(other), plain(other))
