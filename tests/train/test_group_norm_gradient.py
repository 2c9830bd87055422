"""The quick gradient of GroupNorm on CPUs is GroupNorm's."""

import pytest
import torch
from torch.nn import functional as F

from ldm.train import group_norm
from ldm.train.group_norm import ChannelsLastGroupNorm

SHAPE = (3, 12, 5, 4)


def gradients(norm, dtype):
    generator = torch.Generator().manual_seed(0)
    x = (2 + torch.randn(SHAPE, generator=generator)).contiguous(memory_format=torch.channels_last)
    weight, bias = 1 + torch.randn(12, generator=generator), torch.randn(12, generator=generator)
    inputs = [x.to(dtype).requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    y = norm(*inputs)
    dy = torch.randn(SHAPE, generator=generator).contiguous(memory_format=torch.channels_last).to(y.dtype)
    return [y, *torch.autograd.grad(y, inputs, dy)]


@pytest.mark.parametrize("groups", [1, 3, 12])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])  # bfloat16 has 8 bits
def test_value_and_gradients_are_torchs(groups, dtype, rtol):
    quick = gradients(lambda x, w, b: ChannelsLastGroupNorm.apply(x, groups, w, b, 1e-5), dtype)
    exact = gradients(lambda x, w, b: F.group_norm(x.float(), groups, w, b, 1e-5), dtype)
    for ours, theirs in zip(quick, exact, strict=True):
        assert ours.shape == theirs.shape
        size = float(theirs.detach().float().abs().max())
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=rtol, atol=rtol * size)


def test_it_is_for_training_in_bfloat16_and_channels_last_only(monkeypatch):
    called = []
    monkeypatch.setattr(ChannelsLastGroupNorm, "apply", lambda x, *_: called.append(1) or x)
    network = torch.nn.Sequential(torch.nn.GroupNorm(3, 12))
    group_norm.quicken(network)
    assert list(network.state_dict()) == ["0.weight", "0.bias"]
    network.to(torch.bfloat16)
    x = torch.randn(SHAPE).to(torch.bfloat16).contiguous(memory_format=torch.channels_last).requires_grad_()
    for other in (x.detach(), x.contiguous()):
        network(other)
    with torch.no_grad():
        network(x)
    assert called == []
    network(x)
    assert called == [1]


def test_a_gradient_of_the_gradient_is_refused():
    x = torch.randn(SHAPE).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = ChannelsLastGroupNorm.apply(x, 3, torch.ones(12, requires_grad=True), torch.zeros(12), 1e-5)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate"):
        dx.sum().backward()
