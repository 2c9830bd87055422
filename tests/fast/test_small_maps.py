"""Convolutions of small maps as a matrix product an image: the same numbers but for rounding, where nobody looks."""

import copy

import pytest
import torch
from networks import small
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from ldm import fast
from ldm.fast import onednn, small_maps, winograd

pytestmark = pytest.mark.skipif(not onednn.there(), reason="this torch has no oneDNN")

ROUNDINGS = 16 * 2**-24  # of float32; seen are 9 (of torch's own convolution 5) for 2,560 channels, 2 for 5


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def runs(monkeypatch):
    """All of up to 64 positions counts as small; shapes of the maps of every call."""
    monkeypatch.setattr(small_maps, "WEIGHTS", 0)
    monkeypatch.setattr(winograd, "FEWEST_CHANNELS", 0)
    seen, plain = [], small_maps.convolution
    monkeypatch.setattr(small_maps, "convolution", lambda x, *args: (seen.append(x.shape), plain(x, *args))[1])
    return seen


def error(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("shape", "stride"),
    [
        ((3, 128, 8, 8), 1),
        ((1, 5, 1, 64), 1),
        ((2, 16, 7, 3), 1),
        ((1, 8, 1, 1), 1),
        ((2, 16, 16, 16), 2),
        ((2, 5, 15, 8), 2),
    ],
)
def test_it_is_the_convolution(shape, stride, bias, runs):
    torch.manual_seed(0)
    layer, x = nn.Conv2d(shape[1], 40, 3, stride, padding=1, bias=bias), torch.randn(shape)
    expected = copy.deepcopy(layer).double()(x.double())
    fast.install(holder := nn.Sequential(layer))
    found = holder(x)
    assert runs == [shape]
    assert found.is_contiguous()
    assert error(found, expected) < ROUNDINGS
    assert torch.equal(torch.cat([holder(row) for row in x.split(1)]), found)


def test_other_maps_and_whoever_looks_get_the_plain_layer(runs):
    layer, x = nn.Conv2d(8, 8, 3, padding=1), torch.randn(2, 8, 8, 8)
    fast.install(holder := nn.Sequential(layer))
    for other in (x[0], x[:0], torch.randn(2, 8, 5, 13), x.to(memory_format=torch.channels_last)):
        assert torch.equal(holder(other), F.conv2d(other, layer.weight, layer.bias, padding=1))
    with torch.enable_grad():
        assert holder(x).requires_grad
    with torch.autocast("cpu"):
        assert holder(x).dtype == torch.bfloat16
    holder.double()(x.double())
    assert not runs
    layer.float()
    with torch.backends.mkldnn.flags(enabled=False):
        holder(x)
    assert not runs
    exported = torch.export.export(holder, (x,), strict=False)
    assert torch.ops.aten.conv2d.default in [node.target for node in exported.graph.nodes]
    for name, value in (("padding_mode", "circular"), ("stride", (2, 1)), ("dilation", (2, 2)), ("padding", (0, 0))):
        as_it_was = getattr(layer, name)
        setattr(layer, name, value)
        assert torch.equal(holder(x), nn.Conv2d.forward(layer, x))
        setattr(layer, name, as_it_was)
    assert not runs


def test_those_of_sd15s_lowest_level_are_served_alone():
    def served(channels, size, stride=1):
        conv = nn.Conv2d(channels, 1280, 3, stride, padding=1)
        return small_maps.serves(conv, torch.zeros(1, channels, size, size))

    assert served(1280, 8)
    assert served(2560, 8)
    assert served(1280, 16, stride=2)
    assert not served(1280, 16)
    assert not served(1280, 18, stride=2)
    assert not served(640, 8)


def test_weights_that_are_computed_are_computed_once_a_call(runs):
    class Counted(nn.Module):
        def forward(self, weight):
            count.append(1)
            return weight

    count, layer, x = [], nn.Conv2d(8, 8, 3, padding=1), torch.randn(1, 8, 8, 8)
    holder = nn.Sequential(copy.deepcopy(layer))
    parametrize.register_parametrization(holder[0], "weight", Counted())
    fast.install(holder)
    count.clear()
    assert torch.equal(holder(x), layer(x))
    assert len(count) == 1
    assert not runs


def test_a_network_computes_the_same(runs):
    plain, network = small("unet"), copy.deepcopy(small("unet"))
    call = torch.randn(2, 4, 8, 8), torch.tensor(7.0), torch.randn(2, 5, plain.config.context_width)
    installed = fast.install(network)
    torch.testing.assert_close(network(*call), plain(*call))
    assert runs
    installed.undo()
    assert torch.equal(network(*call), plain(*call))
