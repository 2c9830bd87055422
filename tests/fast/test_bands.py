"""The decoder in bands gives what it gives whole, shows the same places, and norms stay right where means are large."""

import copy

import pytest
import torch
from networks import small
from torch import nn
from torch.nn import functional as F

from ldm import fast, probe
from ldm.blocks import ResnetBlock, Upsample
from ldm.fast import bands
from ldm.train.group_norm import QuickGroupNorm


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _bands_of_few_rows(monkeypatch):
    """Small maps count as large, and a band has one row or a few."""
    monkeypatch.setattr(bands, "LARGE", 1)
    monkeypatch.setattr(bands, "BAND", 3 * 32 * 16)
    with torch.no_grad():
        yield


def error(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def block(channels, out_channels):
    torch.manual_seed(0)
    made = ResnetBlock(channels, out_channels, groups=4, eps=1e-6)
    for norm in (made.norm1, made.norm2):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return made


@pytest.mark.parametrize("size", [(4, 4), (6, 10), (16, 8)])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_decoder_in_bands_is_the_decoder(size, batch, monkeypatch):
    plain, banded, z = small("vae"), copy.deepcopy(small("vae")), randn(batch, 4, *size)
    installed = fast.install(banded)
    assert "   1 x Decoder: large maps in bands of rows" in str(installed).splitlines()
    seen = []
    monkeypatch.setattr(bands, "resnet", lambda *args, real=bands.resnet: seen.append(1) or real(*args))
    expected = plain.decode(z)
    assert error(banded.decode(z), expected) < 2e-6
    assert len(seen) == sum(len(level.resnets) for level in plain.decoder.up_blocks)
    installed.undo()
    assert torch.equal(banded.decode(z), expected)


def test_who_hangs_on_every_module_sees_all():
    plain, banded, z = small("vae"), copy.deepcopy(small("vae")), randn(1, 4, 4, 4)
    fast.install(banded)
    seen = []
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        plain.decode(z)
        expected = seen.copy()
        seen.clear()
        banded.decode(z)
    finally:
        hook.remove()
    assert seen == expected


@pytest.mark.parametrize(("channels", "out_channels"), [(16, 16), (32, 16), (16, 32), (24, 16)])
@pytest.mark.parametrize("own", [False, True])
def test_a_resnet_in_bands_writes_only_to_what_is_its_own(channels, out_channels, own):
    made, x = block(channels, out_channels), randn(2, channels, 11, 16)
    before, expected = x.clone(), made(x)
    assert error(bands.resnet(made, x, own), expected) < 1e-6
    if not own:
        assert torch.equal(x, before)


@pytest.mark.parametrize("height", [1, 2, 7])
def test_doubled_rows_meet_at_the_bands_edges(height):
    made, x = Upsample(32), randn(1, 32, height, 16)
    assert error(bands.upsample(made, x), made(x)) < 1e-6


@pytest.mark.parametrize("mean", [3.0, 30.0, 300.0, 3000.0])
def test_a_norm_is_right_where_the_mean_is_large(mean):
    """What float32 itself loses of x at such a mean is all that is lost: its spacing there, over a std of 1."""
    norm = nn.GroupNorm(4, 16, eps=1e-6)
    nn.init.normal_(norm.weight)
    x = randn(1, 16, 40, 40) + mean
    centre, scale, shift = bands._moments(norm, x)
    exact = F.group_norm(x.double(), 4, norm.weight.double(), norm.bias.double(), 1e-6)
    assert error((x - centre) * scale + shift, exact) < 1e-6 + mean * torch.finfo(torch.float32).eps


def test_every_tapped_place_has_the_plain_decoders_values():
    plain, banded, z = small("vae"), copy.deepcopy(small("vae")), randn(1, 4, 4, 4)
    fast.install(banded)
    places = [place for place in probe.places(plain) if place.startswith("decoder")]
    with probe.capture(plain, *places) as expected, probe.capture(banded, *places) as found:
        plain.decode(z), banded.decode(z)
    for place, (activation,) in expected.runs.items():
        assert error(found[place], activation) < 2e-6, place


@pytest.mark.parametrize("part", ["norm1", "conv2", "conv_shortcut"])
def test_a_part_that_is_watched_or_replaced_is_called_as_it_is(part):
    made, x = block(32, 16), randn(1, 32, 8, 16)
    handle = getattr(made, part).register_forward_hook(lambda module, args, output: 2 * output)
    assert bands.resnet(made, x) is None
    handle.remove()
    assert bands.resnet(made, x) is not None
    setattr(made, part, nn.Identity() if part != "norm1" else QuickGroupNorm(4, 32, 1e-6))
    assert bands.resnet(made, x) is None


def test_gradients_are_those_of_the_plain_decoder():
    plain, banded, z = small("vae"), copy.deepcopy(small("vae")), randn(1, 4, 4, 4).requires_grad_()
    fast.install(banded)
    with torch.enable_grad():
        (one,), (other,) = (torch.autograd.grad(vae.decode(z).sum(), z) for vae in (plain, banded))
    assert torch.equal(one, other)


@pytest.mark.parametrize("x", [randn(1, 4, 8, 8).double(), randn(1, 4, 8, 8).to(memory_format=torch.channels_last)])
def test_other_precisions_and_layouts_are_not_served(x):
    assert not bands.serves(x)
    assert bands.serves(randn(1, 4, 8, 8))
    with torch.autocast("cpu"):
        assert not bands.serves(randn(1, 4, 8, 8))
