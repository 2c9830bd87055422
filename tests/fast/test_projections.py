"""Packed projections: fewer products, and the same numbers."""

import copy

import pytest
import torch
from networks import small
from torch import nn
from torch.overrides import TorchFunctionMode

import ldm
from ldm import fast, probe
from ldm.blocks import Attention
from ldm.fast import installing, projections
from ldm.pipeline import PHANTOM_WEIGHTS
from ldm.probe import scale


class Products(TorchFunctionMode):
    """The (rows, in, out) of every linear layer that runs while it is open."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            self.shapes.append((*args[0].shape[:-1], *args[1].shape[::-1]))
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def unet():
    return copy.deepcopy(small("unet")).requires_grad_()


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def products(run):
    with Products() as seen:
        run()
    return seen.shapes


def packed(network):
    """The same network, packed and nothing else."""
    fast.install(network, kernels="torch", packed=True)
    return network


@pytest.mark.parametrize("context_width", [None, 12])
def test_packed_weights_are_one_product_and_the_same_layers(context_width):
    attention, x = Attention(16, 2, context_width), randn(2, 9, 16)
    context = None if context_width is None else randn(2, 5, context_width, seed=1)
    expected, before = attention(x, context), copy.deepcopy(attention.state_dict())
    assert len(products(lambda: attention(x, context))) == 4
    packed(attention)
    products_now = products(lambda: attention(x, context))
    assert products_now == ([(2, 9, 16, 48), (2, 9, 16, 16)] if context is None else
                      [(2, 9, 16, 16), (2, 5, 12, 32), (2, 9, 16, 16)])  # fmt: skip
    # One product of three times the width adds up in another order than three: float32's last bits.
    torch.testing.assert_close(attention(x, context), expected, rtol=1e-5, atol=1e-6)
    after = attention.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_packed_network_is_saved_and_trained_as_ever(unet):
    expected = copy.deepcopy(unet)
    packed(unet)
    assert [name for name, _ in unet.named_parameters()] == [name for name, _ in expected.named_parameters()]
    call = randn(2, 4, 8, 8), 500, randn(2, 77, 64, seed=1)
    with torch.enable_grad():
        for network in (unet, expected):
            network(*call).square().mean().backward()
            torch.optim.SGD(network.parameters(), lr=0.1).step()
    for (name, one), other in zip(unet.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name
        assert torch.equal(one, other), name
    torch.testing.assert_close(unet(*call), expected(*call), rtol=1e-5, atol=1e-5)


def test_a_packed_weight_may_be_stepped_while_the_others_wait_for_their_gradient():
    attention, x = Attention(16, 2), randn(1, 4, 16).requires_grad_()
    packed(attention)

    def step(parameter):
        with torch.no_grad():
            parameter.sub_(parameter.grad)

    for parameter in attention.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    with torch.enable_grad():
        attention(attention(x)).sum().backward()
    q = attention.to_q.weight
    writes = q._version
    attention.to_k.weight.mul_(2)
    assert q._version == writes


def test_neighbours_in_memory_are_not_packed():
    """Only three weights in a row, whole and in order, are one matrix."""
    one, x = randn(4, 8, 8), randn(1, 5, 8, seed=1)
    layers = [nn.Linear(8, 8, bias=False) for _ in range(3)]
    for rows in ((1, 0, 2), (0, 2, 3), (0, 0, 0)):
        for layer, row in zip(layers, rows, strict=True):
            layer.weight = nn.Parameter(one[row])
        assert len(products(lambda: projections.project(x, *layers))) == 3
    for layer, row in zip(layers, (1, 2, 3), strict=True):
        layer.weight = nn.Parameter(one[row])
    assert products(lambda: projections.project(x, *layers)) == [(1, 5, 8, 24)]
    layers[1].weight = nn.Parameter(one[2].clone())
    assert len(products(lambda: projections.project(x, *layers))) == 3


class WithLora(nn.Linear):
    """Whatever it would compute: not what its weight alone says."""


@pytest.mark.parametrize("bias", [True, False])
def test_biases_and_layers_of_other_kinds_stay_apart(bias):
    attention, x = Attention(16, 2, bias=bias), randn(1, 4, 16)
    if not bias:
        attention.to_k = WithLora(16, 16, bias=False)
    expected = attention(x)
    packed(attention)
    assert len(products(lambda: attention(x))) == 4
    assert torch.equal(attention(x), expected)


def test_moved_or_cast_it_computes_the_same_apart(unet):
    packed(unet)
    call = randn(1, 4, 8, 8), 500, randn(1, 77, 64, seed=1)
    expected = unet(*call)
    torch.testing.assert_close(unet.double().float()(*call), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(copy.deepcopy(unet)(*call), expected, rtol=1e-5, atol=1e-5)


def test_packed_projections_can_be_watched(unet):
    call = randn(1, 4, 8, 8), 500, randn(1, 77, 64, seed=1)
    expected = unet(*call)
    packed(unet)
    with probe.capture(unet, "*.to_k", "*.attn1.probabilities") as seen:
        unet(*call)
    assert all(len(runs) == 1 for runs in seen.runs.values())
    with probe.edit(unet, {"*.to_v": scale(1.0)}):
        assert torch.equal(unet(*call), expected), "one by one while watched: bit for bit"


def test_a_model_for_the_kernels_is_packed(monkeypatch):
    monkeypatch.setattr(installing, "resolved", lambda backend, device: "triton")
    sd = ldm.load(PHANTOM_WEIGHTS, device="cpu", dtype=torch.bfloat16)
    attention = sd.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    x = randn(1, 4, attention.to_q.in_features).bfloat16()
    assert len(products(lambda: projections.project(x, attention.to_q, attention.to_k, attention.to_v))) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_on_a_gpu_packed_and_recorded_are_the_plain_network(dtype, unet):
    plain = unet.to("cuda", dtype)
    packed, graphed = copy.deepcopy(plain), copy.deepcopy(plain)
    fast.install(packed)
    installed, x_t = fast.install(graphed, cuda_graph=True), randn(2, 4, 8, 8).to("cuda", dtype)
    for seed in range(2):
        context = randn(2, 77, 64, seed=seed).to("cuda", dtype)
        for t in (900, 100):
            expected = packed(x_t, t, context)
            assert torch.equal(graphed(x_t, t, context), expected)
            # Sums in another order, rounded to half precision in each of some twenty layers.
            torch.testing.assert_close(expected, plain(x_t, t, context), rtol=0.02, atol=20 * torch.finfo(dtype).eps)
    assert installed.cuda_graph_used
