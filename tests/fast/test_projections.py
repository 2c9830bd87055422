"""Packed and kept projections: fewer products, the same numbers, and none that is out of date."""

import copy
import gc

import pytest
import torch
from networks import small
from small_networks import ToyUNet
from torch import nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

import ldm
from ldm.blocks import Attention
from ldm.conditioning import constant
from ldm.fast import ops, projections
from ldm.fast.cuda_graph import GraphedUNet
from ldm.guidance import guided
from ldm.pipeline import PHANTOM_WEIGHTS
from ldm.probe.taps import scale
from ldm.samplers import ddim
from ldm.schedule import Schedule


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


def of_prompts(run, tokens=77):
    """How many products have the context for input."""
    return sum(shape[1] == tokens for shape in products(run) if len(shape) == 4)


# ---- packed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("context_width", [None, 12])
def test_packed_weights_are_one_product_and_the_same_layers(context_width):
    attention, x = Attention(16, 2, context_width), randn(2, 9, 16)
    context = None if context_width is None else randn(2, 5, context_width, seed=1)
    expected, before = attention(x, context), copy.deepcopy(attention.state_dict())
    assert len(products(lambda: attention(x, context))) == 4
    projections.pack(attention)
    packed = products(lambda: attention(x, context))
    assert packed == ([(2, 9, 16, 48), (2, 9, 16, 16)] if context is None else
                      [(2, 9, 16, 16), (2, 5, 12, 32), (2, 9, 16, 16)])  # fmt: skip
    # One product of three times the width adds up in another order than three: float32's last bits.
    torch.testing.assert_close(attention(x, context), expected, rtol=1e-5, atol=1e-6)
    after = attention.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_packed_network_is_saved_and_trained_as_ever(unet):
    expected = copy.deepcopy(unet)
    projections.pack(unet)
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
    projections.pack(attention)

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
    projections.pack(attention)
    assert len(products(lambda: attention(x))) == 4
    assert torch.equal(attention(x), expected)


def test_moved_or_cast_it_computes_the_same_apart(unet):
    projections.pack(unet)
    call = randn(1, 4, 8, 8), 500, randn(1, 77, 64, seed=1)
    expected = unet(*call)
    torch.testing.assert_close(unet.double().float()(*call), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(copy.deepcopy(unet)(*call), expected, rtol=1e-5, atol=1e-5)


def test_packed_projections_can_be_watched(unet):
    call = randn(1, 4, 8, 8), 500, randn(1, 77, 64, seed=1)
    expected = unet(*call)
    projections.pack(unet)
    with unet.capture("*.to_k", "*.attn1.probabilities") as seen:
        unet(*call)
    assert all(len(runs) == 1 for runs in seen.runs.values())
    with unet.edit({"*.to_v": scale(1.0)}):
        assert torch.equal(unet(*call), expected), "one by one while watched: bit for bit"


def test_a_model_for_the_kernels_is_packed(monkeypatch):
    monkeypatch.setattr(ops, "resolved", lambda device: "triton")
    sd = ldm.load(PHANTOM_WEIGHTS, device="cpu", dtype=torch.bfloat16)
    attention = sd.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    x = randn(1, 4, attention.to_q.in_features).bfloat16()
    assert len(products(lambda: projections.project(x, attention.to_q, attention.to_k, attention.to_v))) == 1


# ---- kept ------------------------------------------------------------------------------------------


def test_of_a_marked_context_keys_and_values_are_made_once(unet):
    x_t, context = randn(2, 4, 8, 8), randn(2, 77, 64, seed=1)
    expected, each = unet(x_t, 500, context), of_prompts(lambda: unet(x_t, 500, context))
    kept = projections.keep(context)
    assert of_prompts(lambda: unet(x_t, 500, kept)) == each > 0
    assert of_prompts(lambda: unet(x_t, 400, kept)) == 0
    assert torch.equal(unet(x_t, 500, kept), expected)
    assert of_prompts(lambda: unet(x_t, 500, context)) == each, "its original bears no mark"
    assert of_prompts(lambda: unet(x_t, 500, kept[:])) == each, "nor does a view"


def write_weight(attention):
    attention.to_v.weight.mul_(2)


def replace_weight(attention):
    attention.to_k.weight = nn.Parameter(2 * attention.to_k.weight)


def replace_data(attention):
    attention.to_k.weight.data = 2 * attention.to_k.weight.data


def replace_layer(attention):
    attention.to_k = nn.Linear(64, attention.to_k.out_features, bias=False)


def patch_forward(attention):
    forward = attention.to_k.forward
    attention.to_k.forward = lambda x: 2 * forward(x)


def first_cross_attention(unet):
    return unet.mid_block.attentions[0].transformer_blocks[0].attn2


@pytest.mark.parametrize("change", [write_weight, replace_weight, replace_data, replace_layer, patch_forward])
def test_what_is_kept_is_never_out_of_date(change, unet):
    x_t, context = randn(2, 4, 8, 8), projections.keep(randn(2, 77, 64, seed=1))
    before = unet(x_t, 500, context)
    change(first_cross_attention(unet))
    after = unet(x_t, 500, context)
    assert torch.equal(after, unet(x_t, 500, context.clone()))
    assert not torch.equal(after, before)


def test_a_weight_in_the_place_of_another_is_not_taken_for_it():
    """Memory that is freed is soon used again, and a new weight has as many writes as the old one had."""
    to_k, to_v = (nn.Linear(64, 64, bias=False) for _ in range(2))
    context = projections.keep(randn(1, 77, 64))
    for seed in range(10):
        to_k.weight = None
        to_k.weight = nn.Parameter(randn(64, 64, seed=seed))
        assert torch.equal(projections.keys_values(context, to_k, to_v)[0], to_k(context))


def test_watched_with_gradients_or_under_autocast_nothing_is_kept(unet):
    x_t, context = randn(1, 4, 8, 8), projections.keep(randn(1, 77, 64, seed=1))
    plain = unet(x_t, 500, context)
    with unet.capture("*.attn2.to_k", "*.attn2.probabilities") as seen:
        unet(x_t, 500, context)
    assert all(len(runs) == 1 for runs in seen.runs.values())
    with torch.enable_grad():
        unet(x_t, 500, context).sum().backward()
    assert all(p.grad is not None for name, p in unet.named_parameters() if "attn2.to_v" in name)
    with torch.autocast("cpu", torch.bfloat16):
        rough = unet(x_t, 500, context)
        assert torch.equal(rough, unet(x_t, 500, context.clone()))
    assert torch.equal(unet(x_t, 500, context), plain)


def test_it_goes_with_the_context_and_with_the_network(unet):
    gc.collect()
    others = len(projections._kept)
    context = projections.keep(randn(1, 77, 64))
    unet(randn(1, 4, 8, 8), 500, context)
    copy.deepcopy(unet)(randn(1, 4, 8, 8), 500, context)
    gc.collect()
    assert len(projections._kept[context]) == sum(name.endswith("attn2") for name, _ in unet.named_modules())
    del context
    gc.collect()
    assert len(projections._kept) == others


# ---- in a run --------------------------------------------------------------------------------------

PROMPT, OTHER, EMPTY = (randn(1, 77, 64, seed=seed) for seed in range(3))
X_T = randn(3, 4, 8, 8, seed=3)


def run(eps_fn, steps=6):
    *_, last = ddim(eps_fn, X_T, Schedule.sd15(), steps)
    return last.x_prev


def test_gradients_reach_the_prompts(unet):
    context, empty = PROMPT.clone().requires_grad_(), EMPTY.clone().requires_grad_()
    with torch.enable_grad():
        eps_fn = guided(unet, constant(context, 6), 7.5, empty)
        for step in range(2):
            eps_fn(X_T, 500, step).sum().backward()
    assert context.grad is not None
    assert empty.grad is not None


def test_a_new_run_hears_of_any_write(unet):
    """Also of one that torch does not count."""
    before = run(guided(unet, constant(PROMPT, 6), 7.5, EMPTY))
    first_cross_attention(unet).to_v.weight.data.mul_(2)
    after = run(guided(unet, constant(PROMPT, 6), 7.5, EMPTY))
    assert not torch.equal(after, before)
    with unet.capture("*.attn2.to_v"):  # nothing is kept
        assert torch.equal(run(guided(unet, constant(PROMPT, 6), 7.5, EMPTY)), after)


def test_forward_derivatives_reach_the_prompts():
    def eps(context, empty):
        return guided(ToyUNet(), constant(context, 6), 7.5, empty)(X_T, 500, 0)

    given, along = (PROMPT, EMPTY), (torch.ones_like(PROMPT), torch.zeros_like(EMPTY))
    _, expected = torch.autograd.functional.jvp(eps, given, along)  # by gradients of gradients
    _, found = torch.func.jvp(eps, given, along)
    torch.testing.assert_close(found, expected)
    with forward_ad.dual_level():
        dual = eps(*(forward_ad.make_dual(x, d) for x, d in zip(given, along, strict=True)))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_on_a_gpu_packed_kept_and_recorded_are_the_plain_network(dtype, unet):
    plain = unet.to("cuda", dtype)
    packed = copy.deepcopy(plain)
    projections.pack(packed)
    graphed, x_t = GraphedUNet(packed), randn(2, 4, 8, 8).to("cuda", dtype)
    for seed in range(2):
        context = randn(2, 77, 64, seed=seed).to("cuda", dtype)
        kept = projections.keep(context)
        for t in (900, 100):
            expected = packed(x_t, t, context)
            assert torch.equal(packed(x_t, t, kept), expected)
            assert torch.equal(graphed(x_t, t, kept), expected)
            # Sums in another order, rounded to half precision in each of some twenty layers.
            torch.testing.assert_close(expected, plain(x_t, t, context), rtol=0.02, atol=20 * torch.finfo(dtype).eps)
    assert graphed.used


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_a_recording_reads_the_prompt_that_lies_there(unet):
    unet, x_t, t = unet.cuda(), randn(1, 4, 8, 8).cuda(), torch.tensor([500.0]).cuda()
    context = projections.keep(randn(1, 77, 64, seed=1).cuda())
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        unet(x_t, t, context)
        with torch.cuda.graph(graph, stream=stream):
            eps = unet(x_t, t, context)
    torch.cuda.current_stream().wait_stream(stream)
    for seed in (2, 3):
        context.copy_(randn(1, 77, 64, seed=seed))
        graph.replay()
        assert torch.equal(eps, unet(x_t, t, context.clone()))
