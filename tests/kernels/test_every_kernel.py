"""A whole network with every kernel in it: the same output, gradients and training step as with plain torch."""

import copy
from dataclasses import replace

import pytest
import torch
from accuracy import randn, relative_error
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ldm import fast
from ldm.config import SD15
from ldm.fast.ops import Ops
from ldm.unet import UNet

# SD1.5's head widths 40 and, in the middle, 80, and 77 tokens; everything else as small as it gets.
CONFIG = replace(
    SD15.unet, widths=(80, 160), resnets_per_level=1, attention=(True, False), heads=2, context_width=16, norm_groups=4
)
# Float32 in other orders of summation, 1e-7 each, through some forty layers that may add theirs up and amplify them.
OUTPUT, GRADIENT = 1e-5, 1e-4


class OpsSeen(TorchDispatchMode):
    """Which of our operations run."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "ldm":
            self.names.add(func._opname)
        return func(*args, **(kwargs or {}))


def run(unet: UNet, backend: fast.Backend, seen: OpsSeen) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """eps, and what one step of plain gradient descent changes in every parameter."""
    unet = copy.deepcopy(unet)
    x_t, target, context = randn(1, 4, 4, 4), randn(1, 4, 4, 4, seed=1), randn(1, 77, 16, seed=2)
    fast.install(unet, kernels=backend)
    with seen:
        eps = unet(x_t, 500, context)
        F.mse_loss(eps, target).backward()
    before = {name: parameter.detach().clone() for name, parameter in unet.named_parameters()}
    torch.optim.SGD(unet.parameters(), lr=1.0).step()
    return eps.detach(), {name: parameter.detach() - before[name] for name, parameter in unet.named_parameters()}


def test_a_unet_and_its_training_step_are_the_same_with_every_kernel():
    torch.manual_seed(0)
    unet = UNet(CONFIG)
    for parameter in unet.parameters():  # nothing is at 0 or 1, where a wrong gradient could hide
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.2)
    plain, fused = OpsSeen(), OpsSeen()
    eps, step = run(unet, "torch", plain)
    fused_eps, fused_step = run(unet, "triton", fused)
    assert plain.names == set()
    assert fused.names == {
        *("attention", "attention_backward", "cross_attention", "cross_attention_backward"),
        *("group_norm_silu", "group_norm_silu_backward", "geglu", "geglu_backward"),
        *("add_layer_norm", "add_layer_norm_backward"),
    }
    assert relative_error(fused_eps, eps.double()) < OUTPUT
    errors = {name: relative_error(fused_step[name], step[name].double()) for name in step}
    # A key's bias-like part of the time before a norm has no gradient but rounding: judged against the largest.
    largest = max(float(change.norm()) for change in step.values())
    wrong = {
        name: error
        for name, error in errors.items()
        if error > GRADIENT and error * float(step[name].norm()) > 1e-6 * largest
    }
    assert wrong == {}


def block(ops, x, weight, bias, norm, layer_norm):
    """Every kind of operation once, with layouts changing between them."""
    h = ops.group_norm(x, norm, time=weight[:, None].expand(-1, len(x)).T, silu=True)
    h = h.flatten(2).mT
    total, h = ops.add_layer_norm(h, h * bias, layer_norm)
    h = ops.attention(h, total, h * weight, heads=2)
    return ops.geglu(h) + total[..., ::2]


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_compiled_graph_holds_every_op_and_the_same_gradients(compiler):
    """`opcheck` of a forward does not see a backward whose strides are others than it promised; inductor does."""
    norm, layer_norm = nn.GroupNorm(8, 80), nn.LayerNorm(80)

    def gradients(function):
        leaves = [x.requires_grad_() for x in (randn(2, 80, 3, 2), randn(80, seed=1), randn(80, seed=2))]
        out = function(Ops("triton"), *leaves, norm, layer_norm)
        out.backward(randn(*out.shape, seed=3))
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    torch._dynamo.reset()
    eager, compiled = gradients(block), gradients(torch.compile(block, fullgraph=True, backend=compiler))
    for expected, got in zip(eager, compiled, strict=True):
        assert relative_error(got, expected.double()) < OUTPUT


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda ops: ops.attention(*[randn(1, 4, 12)] * 3, heads=1), "12 wide"),
        (lambda ops: ops.geglu(randn(2, 4).double()), "x: dtype torch.float64"),
        (lambda ops: ops.group_norm(randn(1, 12, 2, 2), nn.GroupNorm(4, 12)), "12 channels in 4 groups"),
    ],
)
def test_forced_where_a_kernel_cannot_is_an_error_that_says_why(call, complaint):
    call(Ops("torch"))
    with pytest.raises(ValueError, match=complaint):
        call(Ops("triton"))
