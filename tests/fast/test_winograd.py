"""Winograd's algorithm gives the convolution: exactly in exact numbers, and in float32 to what float32 can hold."""

import copy
from fractions import Fraction

import pytest
import torch
from networks import small
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from ldm import fast, probe
from ldm.blocks import ResnetBlock
from ldm.fast import bands, onednn, winograd
from ldm.fast.winograd import OF_2, OF_4, Transforms

ROUNDINGS = (
    40 * 2**-24
)  # of float32; seen are 30 with tiles of 4 for up to 320 channels (67 for 1,920, by oneDNN), 15 with tiles of 2

IN_A_NETWORK = 1e-5  # relative: ROUNDINGS of each of its convolutions, one behind the other; seen are 8e-6


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def for_all(monkeypatch):
    """Small convolutions count as large."""
    for name in ("WORK", "FEWEST_TILES", "FEWEST_CHANNELS"):
        monkeypatch.setattr(winograd, name, 0)


@pytest.fixture
def runs(monkeypatch):
    """Shapes of the maps of every call."""
    seen, plain = [], winograd.convolution
    monkeypatch.setattr(
        winograd, "convolution", lambda x, *args, **kwargs: (seen.append(x.shape), plain(x, *args, **kwargs))[1]
    )
    return seen


@pytest.mark.parametrize("of", [OF_2, OF_4])
def test_in_exact_numbers_it_is_the_convolution(of):
    """Of thirds and fifteenths, which no float holds: as the nearest fractions of small denominators."""

    def exact(matrix):
        return [[Fraction(float(x)).limit_denominator(1000) for x in row] for row in matrix]

    def times(matrix, vector):
        return [sum((a * b for a, b in zip(row, vector, strict=True)), Fraction()) for row in matrix]

    n = of.size + 2
    d = [[Fraction((7 * i * i + 3 * j + 5 * i * j) % 11 - 5) for j in range(n)] for i in range(n)]
    g = [[Fraction(i - 2 * j + i * j) for j in range(3)] for i in range(3)]
    products = [
        a * b
        for a, b in zip(
            times(exact(of.filter), [x for row in g for x in row]),
            times(exact(of.input), [x for row in d for x in row]),
            strict=True,
        )
    ]
    convolved = [
        sum(d[i + k][j + m] * g[k][m] for k in range(3) for m in range(3))
        for i in range(of.size)
        for j in range(of.size)
    ]
    assert times(exact(of.results), products) == convolved


@pytest.mark.parametrize("padding", [(1, 1), (0, 1), (1, 0), (0, 0)])
@pytest.mark.parametrize(
    ("count", "channels", "height", "width"),
    [(3, 70, 33, 47), (1, 5, 3, 3), (2, 64, 16, 16), (9, 8, 35, 32), (1, 9, 40, 290)],
)
def test_any_shape_gives_what_torch_gives(count, channels, height, width, padding):
    x, weight, bias = randn(count, channels, height, width), randn(40, channels, 3, 3, seed=1), randn(40, seed=2)
    found = winograd.convolution(x, weight, bias, padding)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=padding)
    assert found.shape == expected.shape
    assert error(found, expected) < ROUNDINGS
    without = winograd.convolution(x, weight, None, padding)
    assert torch.equal(without + bias.view(-1, 1, 1), found)


@pytest.mark.parametrize("shape", [(1, 4, 3, 2100), (9, 4, 16, 16), (1, 4, 2100, 1), (2, 4, 70, 66)])
def test_no_more_tiles_are_held_than_planned(shape, monkeypatch):
    """However wide a map is: a tile holds 36 numbers of each channel for the 16 that it stands for."""
    held, plain = [], winograd._convolve

    def watched(of, x, weight, bias, out):
        held.append(len(x) * ((x.shape[2] - 2) // of.size) * ((x.shape[3] - 2) // of.size))
        plain(of, x, weight, bias, out)

    monkeypatch.setattr(winograd, "_convolve", watched)
    x, weight = randn(*shape), randn(5, 4, 3, 3, seed=1)
    assert error(winograd.convolution(x, weight, None), F.conv2d(x.double(), weight.double(), padding=1)) < ROUNDINGS
    assert max(held) <= winograd.TILES


@pytest.mark.parametrize("least", [0, 1 << 62])
@pytest.mark.parametrize("filters", [7, 16, 40])
def test_filters_and_positions_in_parts_give_what_torch_gives(least, filters, monkeypatch):
    """By oneDNN or not, where the transformed filters are too many to be held at once."""
    for name, value in (("WEIGHTS", 5 * filters * 9), ("FILTERS", filters), ("BY_ONEDNN", least)):
        monkeypatch.setattr(winograd, name, value)
    seen, linear = [], onednn.linear
    monkeypatch.setattr(onednn, "linear", lambda x, *args: (seen.append(len(x)), linear(x, *args))[1])
    x, weight, bias = randn(2, 9, 35, 32), randn(40, 9, 3, 3, seed=1), randn(40, seed=2)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    assert error(winograd.convolution(x, weight, bias), expected) < ROUNDINGS
    assert bool(seen) == (least == 0 and onednn.there())
    assert max(seen, default=0) <= filters


@pytest.mark.parametrize("size", [16, 33])
def test_sums_over_many_channels_by_onednn_lose_what_float32_loses(size):
    """It adds 1,920 products one after the other: 66 roundings with tiles of 4, 20 with tiles of 2, plain 5."""
    x, weight = randn(1, 1920, size, size), randn(140, 1920, 3, 3, seed=1)
    expected = F.conv2d(x.double(), weight.double(), padding=1)
    assert error(winograd.convolution(x, weight, None), expected) < 100 * 2**-24


def test_onednn_that_was_switched_off_is_not_used(monkeypatch):
    monkeypatch.setattr(winograd, "BY_ONEDNN", 0)
    monkeypatch.delattr(onednn, "linear")
    x, weight = randn(2, 9, 35, 32), randn(40, 9, 3, 3, seed=1)
    with torch.backends.mkldnn.flags(enabled=False):
        found = winograd.convolution(x, weight, None)
    assert error(found, F.conv2d(x.double(), weight.double(), padding=1)) < ROUNDINGS


@pytest.mark.parametrize("channels", [1, 100, 1000])
def test_fewer_tiles_at_a_time_give_what_torch_gives(channels, monkeypatch):
    """Where they have many channels."""
    monkeypatch.setattr(winograd, "HELD", 36 * 16000)
    held, plain = [], winograd._multiply
    monkeypatch.setattr(
        winograd, "_multiply", lambda of, g, tiles, *args: (held.append(tiles.numel()), plain(of, g, tiles, *args))[1]
    )
    x, weight = randn(3, channels, 35, 32), randn(4, channels, 3, 3, seed=1)
    assert error(winograd.convolution(x, weight, None), F.conv2d(x.double(), weight.double(), padding=1)) < ROUNDINGS
    assert 0 < max(held) <= winograd.HELD


@pytest.mark.parametrize("mean", [3.0, 30.0, 300.0, 3000.0])
def test_maps_with_a_large_mean_lose_what_float32_loses(mean):
    x, weight = randn(1, 32, 32, 32) + mean, randn(16, 32, 3, 3, seed=1)
    expected = F.conv2d(x.double(), weight.double(), padding=1)
    assert error(winograd.convolution(x, weight, None), expected) < ROUNDINGS


def test_a_row_does_not_depend_on_its_batch(for_all):
    """But for the last bits, where products of fewer columns round otherwise."""
    x, weight = randn(9, 16, 24, 24), randn(48, 16, 3, 3, seed=1)
    together = winograd.convolution(x, weight, None)
    assert error(torch.cat([winograd.convolution(row, weight, None) for row in x.split(1)]), together) < 1e-6
    conv = nn.Conv2d(16, 48, 3, padding=1)
    assert winograd.serves(conv, x) == winograd.serves(conv, x[:1])


@pytest.mark.parametrize(
    "other",
    [
        {"kernel_size": 1, "padding": 0},
        {"kernel_size": 5, "padding": 2},
        {"stride": 2},
        {"dilation": 2},
        {"groups": 2},
        {"padding": 0},
        {"padding": "same"},
        {"padding_mode": "circular"},
    ],
)
def test_other_convolutions_stay(other, for_all):
    assert winograd.may_serve(nn.Conv2d(8, 8, **{"kernel_size": 3, "padding": 1}))
    assert not winograd.may_serve(nn.Conv2d(8, 8, **{"kernel_size": 3, "padding": 1, **other}))


def test_other_maps_go_as_they_are(for_all):
    conv, x = nn.Conv2d(8, 8, 3, padding=1), randn(1, 8, 16, 16)
    assert winograd.serves(conv, x)
    for other in (x.double(), x.bfloat16(), x.to(memory_format=torch.channels_last), x[0], x[:0], x[:, :4]):
        assert not winograd.serves(conv, other), other.shape
    assert not winograd.serves(conv.double(), x)
    with torch.enable_grad():
        assert not winograd.serves(conv.float(), x)
    with torch.autocast("cpu"):
        assert not winograd.serves(conv, x)


def test_only_large_maps_are_served():
    """SD1.5's levels at 512 px, the shipped models' at 128 px."""
    widths = {64: 320, 32: 640, 16: 1280}
    assert all(
        winograd.serves(nn.Conv2d(c, c, 3, padding=1, device="meta"), randn(1, 1, 1, 1).expand(1, c, s, s).contiguous())
        for s, c in widths.items()
    )
    assert not winograd.serves(nn.Conv2d(1280, 1280, 3, padding=1, device="meta"), randn(1, 1280, 8, 8))
    assert not winograd.serves(nn.Conv2d(128, 128, 3, padding=1), randn(1, 128, 16, 16))


def test_a_network_computes_shows_and_gives_back_the_same(for_all, runs):
    plain, network = small("unet"), copy.deepcopy(small("unet"))
    call = randn(2, 4, 16, 16), torch.tensor(7.0), randn(2, 5, plain.config.context_width)
    installed = fast.install(network)
    assert sum("Conv2d: large maps by Winograd's algorithm" in line for line in installed.replaced) == 1
    places = [place for place in probe.places(plain) if "resnets" in place]
    with probe.capture(plain, *places) as expected, probe.capture(network, *places) as found:
        assert error(network(*call), plain(*call)) < IN_A_NETWORK
    assert runs
    for place, (activation,) in expected.runs.items():
        assert error(found[place], activation) < IN_A_NETWORK, place
    installed.undo()
    assert torch.equal(network(*call), plain(*call))


def test_whoever_counts_operations_sees_convolutions(for_all, runs):
    network = copy.deepcopy(small("unet"))
    call = randn(1, 4, 16, 16), torch.tensor(7.0), randn(1, 5, network.config.context_width)
    with FlopCounterMode(display=False) as plain:
        network(*call)
    fast.install(network)
    with FlopCounterMode(display=False) as counted:
        network(*call)
    assert counted.get_total_flops() == plain.get_total_flops()
    assert not runs


def test_weights_that_change_are_seen_at_once(for_all):
    conv = nn.Conv2d(8, 8, 3, padding=1)
    holder = nn.Sequential(conv)
    fast.install(holder)
    x = randn(1, 8, 8, 8)
    before = holder(x)
    conv.weight.mul_(2)
    conv.bias.mul_(2)
    assert torch.equal(holder(x), 2 * before)


def test_gradients_are_those_of_the_plain_network(for_all, runs):
    conv, x = nn.Conv2d(8, 8, 3, padding=1), randn(1, 8, 8, 8)
    with torch.enable_grad():
        expected = torch.autograd.grad(conv(x).square().sum(), conv.weight)
        fast.install(holder := nn.Sequential(conv))
        found = torch.autograd.grad(holder(x).square().sum(), conv.weight)
    assert torch.equal(expected[0], found[0])
    assert not runs


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Conv2d(8, 8, 3, padding=1), (1, 8, 8, 8)), (nn.Linear(8, 8), (1, 4, 8))]
)
def test_derivatives_forward_are_those_of_the_plain_layer(layer, shape, for_all, monkeypatch):
    for name in ("WORK", "WEIGHTS"):
        monkeypatch.setattr(onednn, name, 0)
    x, tangent = randn(*shape), randn(*shape, seed=1)

    def derivative(network):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(network(forward_ad.make_dual(x, tangent))).tangent

    expected = derivative(layer)
    fast.install(holder := nn.Sequential(layer))
    assert "forward" in vars(layer) or not onednn.there()
    assert torch.equal(derivative(holder), expected)
    assert torch.equal(torch.func.jvp(holder, (x,), (tangent,))[1], expected)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("padding_mode", "circular"), ("stride", (2, 2)), ("dilation", (2, 2)), ("padding", (0, 0)), ("groups", 2)],
)
def test_a_layer_that_was_set_otherwise_since_computes_as_it_is_set(setting, value, for_all):
    """Maps that join at their edges are had by setting padding_mode of a network that is loaded."""
    conv, x = nn.Conv2d(8, 8, 3, padding=1), randn(1, 8, 8, 8)
    fast.install(holder := nn.Sequential(conv))
    setattr(conv, setting, value)
    if setting == "groups":
        conv.weight = nn.Parameter(conv.weight[:, :4])
    assert torch.equal(holder(x), nn.Conv2d.forward(conv, x))


class Halved(nn.Conv2d):
    """A convolution with another idea of what nn.Conv2d.forward calls."""

    def _conv_forward(self, x, weight, bias):
        return F.conv2d(x, weight / 2, bias, padding=1)


@pytest.mark.parametrize("by", ["class", "instance"])
def test_a_convolution_of_ones_own_stays(by, for_all, monkeypatch):
    torch.manual_seed(0)
    made = ResnetBlock(8, 8, groups=4, eps=1e-6)
    own = Halved(8, 8, 3, padding=1)
    if by == "class":
        made.conv1 = own
    else:
        made.conv1._conv_forward = own._conv_forward
    x, holder = randn(1, 8, 8, 8), nn.Sequential(copy.deepcopy(made))
    fast.install(holder)
    assert error(holder(x), made(x)) < IN_A_NETWORK
    assert bands.resnet(made, x) is None


class Quantized(Tensor):
    """Weights in a byte each, as quantization libraries have them: what they are is said where a layer is called."""

    @staticmethod
    def __new__(cls, weight):
        made = Tensor._make_wrapper_subclass(cls, weight.shape, dtype=torch.float32)
        made.scale = weight.abs().max() / 127
        made.bytes = (weight / made.scale).round().to(torch.int8)
        return made

    def __init__(self, weight):
        """All is done."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (F.conv2d, F.linear):
            return function(*(x.bytes * x.scale if isinstance(x, cls) else x for x in args), **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        assert function is torch.ops.aten.detach.default, function
        return args[0]


LAYERS = [(nn.Conv2d(8, 8, 3, padding=1), (2, 8, 8, 8)), (nn.Linear(8, 8), (2, 4, 8))]


@pytest.fixture
def both_for_all(for_all, monkeypatch):
    """Small products count as large, too."""
    for name in ("WORK", "WEIGHTS"):
        monkeypatch.setattr(onednn, name, 0)


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_weights_of_another_kind_are_read_by_the_layer(layer, shape, both_for_all):
    plain, x = copy.deepcopy(layer), randn(*shape)
    fast.install(holder := nn.Sequential(copy.deepcopy(layer)))
    for each in (plain, holder[0]):
        each.weight = nn.Parameter(Quantized(each.weight.detach()), requires_grad=False)
    assert torch.equal(holder(x), plain(x))


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_weights_that_are_computed_are_computed_once_a_call(layer, shape, both_for_all):
    class Counted(nn.Module):
        def forward(self, weight):
            count.append(1)
            return weight

    count, holder = [], nn.Sequential(copy.deepcopy(layer))
    parametrize.register_parametrization(holder[0], "weight", Counted())
    fast.install(holder)
    count.clear()
    assert torch.equal(holder(randn(*shape)), layer(randn(*shape)))
    assert len(count) == 1


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_compilers_read_plain_layers(layer, shape, both_for_all, recwarn):
    """Whole, of any batch, and without a warning."""
    x = randn(*shape)
    fast.install(holder := nn.Sequential(copy.deepcopy(layer)))
    graphs = []
    compiled = torch.compile(holder, fullgraph=True, dynamic=True, backend=lambda *args: graphs.append(1) or args[0])
    for batch in (2, 3, 5):
        rows = randn(batch, *shape[1:])
        assert torch.equal(compiled(rows), layer(rows))
    assert len(graphs) == 1
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    exported = torch.export.export(holder, (x,), dynamic_shapes=(batch,), strict=False)
    calls = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert calls == [torch.ops.aten.conv2d.default if x.ndim == 4 else torch.ops.aten.linear.default]
    traced = torch.jit.trace(holder, x)
    assert torch.equal(traced(x[:1]), layer(x[:1]))
    assert not [warning for warning in recwarn if issubclass(warning.category, torch.jit.TracerWarning)]


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_products_that_may_be_rounded_to_fewer_bits_are_not_used(precision, for_all):
    """Some processors do it, where it was allowed; convolutions stay in float32."""
    conv, x = nn.Conv2d(8, 8, 3, padding=1), randn(1, 8, 8, 8)
    assert winograd.serves(conv, x)
    torch.set_float32_matmul_precision(precision)
    try:
        assert not winograd.serves(conv, x)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert winograd.serves(conv, x)


def test_a_decoder_in_bands_counts_its_operations_as_convolutions(for_all, runs, monkeypatch):
    monkeypatch.setattr(bands, "LARGE", 1)
    network, z, totals = copy.deepcopy(small("vae")), randn(1, 4, 8, 8), []
    for _ in range(2):
        with FlopCounterMode(display=False) as counted:
            network.decode(z)
        totals.append(counted.get_total_flops())
        fast.install(network)
    assert totals[0] == totals[1]
    assert not runs


def test_a_decoder_in_bands_is_the_decoder(for_all, runs, monkeypatch):
    monkeypatch.setattr(bands, "LARGE", 1)
    monkeypatch.setattr(bands, "BAND", 10 * 32 * 64)
    plain, banded, z = small("vae"), copy.deepcopy(small("vae")), randn(2, 4, 10, 9)
    fast.install(banded)
    assert error(banded.decode(z), plain.decode(z)) < IN_A_NETWORK
    assert len(runs) > 20


def test_transforms_say_how_many_tiles_it_takes():
    assert Transforms.tiles(OF_4, 64, 66) == (16, 17)
    assert OF_2.tiles(15, 16) == (8, 8)
