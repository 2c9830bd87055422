"""Large products by oneDNN: the same numbers but for rounding, where nobody looks."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ldm import fast
from ldm.fast import onednn, projections

pytestmark = pytest.mark.skipif(not onednn.there(), reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def served(monkeypatch):
    """Small products count as large; shapes of the rows of every call."""
    monkeypatch.setattr(onednn, "WORK", 0)
    monkeypatch.setattr(onednn, "WEIGHTS", 0)
    seen, plain = [], onednn.linear
    monkeypatch.setattr(onednn, "linear", lambda x, *args: (seen.append(x.shape), plain(x, *args))[1])
    return seen


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 100, 48), (1, 1, 48), (3, 77, 48)])
def test_it_is_the_linear_layer(shape, bias, served):
    """Both sum 48 products in an order of their own: a rounding of float32 each, of the size of the largest."""
    layer, x = nn.Linear(48, 72, bias=bias), torch.randn(shape)
    expected = F.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())
    fast.install(holder := nn.Sequential(layer))
    assert (holder(x).double() - expected).abs().max() < 48 * torch.finfo(torch.float32).eps * x.abs().max()
    assert served == [shape]
    strided = torch.randn(shape[0], shape[2], shape[1]).transpose(1, 2)
    torch.testing.assert_close(holder(strided), F.linear(strided, layer.weight, layer.bias))


def test_ragged_batches_go_as_they_are(served):
    layer, rows = nn.Linear(48, 72), [torch.randn(5, 48), torch.randn(7, 48)]
    fast.install(holder := nn.Sequential(layer))
    found = holder(torch.nested.nested_tensor(rows, layout=torch.jagged)).unbind()
    for row, result in zip(rows, found, strict=True):
        torch.testing.assert_close(result, F.linear(row, layer.weight, layer.bias))
    assert not served


def test_other_rows_go_as_they_are(served):
    layer, x = nn.Linear(48, 72), torch.randn(2, 100, 48)
    fast.install(holder := nn.Sequential(layer))
    for other in (x[0], x[:0], x[None]):
        assert torch.equal(holder(other), F.linear(other, layer.weight, layer.bias))
    with torch.enable_grad():
        holder(x)
    with torch.autocast("cpu"):
        holder(x)
    holder.double()(x.double())
    assert not served
    with pytest.raises(RuntimeError):
        holder.float()(x.double())


def test_layers_stay_without_onednn_with_sparse_weights_or_one_bias_for_all(served):
    layer, x = nn.Linear(48, 72), torch.randn(2, 100, 48)
    fast.install(holder := nn.Sequential(layer))
    with torch.backends.mkldnn.flags(enabled=False):
        holder(x)
    expected = holder(x)
    served.clear()
    weight = layer.weight
    layer.weight = nn.Parameter(weight.to_sparse_csr())
    torch.testing.assert_close(holder(x), expected)
    layer.weight, layer.bias = weight, nn.Parameter(torch.ones(1))
    torch.testing.assert_close(holder(x), F.linear(x, weight) + 1)
    assert not served


def test_small_layers_are_not_replaced_and_few_rows_not_served():
    assert not onednn.may_serve(nn.Linear(64, 64))
    layer = nn.Linear(320, 320)
    assert onednn.serves(layer, torch.randn(1, 4096, 320))
    assert not onednn.serves(layer, torch.randn(1, 1024, 320))
    assert not onednn.serves(layer, torch.randn(8, 1024, 320))  # by one image: so that it does not depend on the batch


def test_packed_projections_stay_one_product(served):
    torch.manual_seed(0)
    layers = [nn.Linear(16, 16, bias=False) for _ in range(3)]
    x = torch.randn(1, 9, 16)
    fast.install(nn.Sequential(*layers))
    assert all("forward" in vars(layer) for layer in layers)
    assert projections._linear(tuple(layers))
    for one, layer in zip(projections.project(x, *layers), layers, strict=True):
        torch.testing.assert_close(one, F.linear(x, layer.weight))
