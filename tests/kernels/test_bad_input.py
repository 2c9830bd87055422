"""What no kernel may compute: one clear error, or the plain operation, but never a wrong number.

Tensors that are too large to exist here are on the meta device: they have shapes and strides, and no numbers.
"""

import re

import pytest
import torch
from accuracy import randn
from ldm_kernels import add_layer_norm, attention, cross_attention, geglu, group_norm_silu
from ldm_kernels.heads import why_unsupported
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.fast import first_use
from ldm.fast.ops import Ops

AUTO = Ops("auto")
KERNELS = ("attention", "cross_attention", "geglu", "add_layer_norm", "group_norm_silu")


def meta(*shape):
    return torch.empty(shape, device="meta")


def launch(name, x, other):
    """One kernel's launcher on tensors of fitting shapes, the first like x, the others like `other`."""
    q = x.new_zeros(1, 4, 1, 16)
    kv = other.new_zeros(1, 70, 1, 16)
    image, channels = x.new_zeros(1, 16, 2, 2), other.new_ones(16)
    rows = x.new_zeros(2, 16)
    return {
        "attention": lambda: attention.launch_forward(q, kv, kv, False),
        "cross_attention": lambda: cross_attention.launch_forward(q, kv, kv),
        "geglu": lambda: geglu.launch_backward(other.new_ones(2, 8), rows),
        "add_layer_norm": lambda: add_layer_norm.launch_forward(rows, other.new_zeros(2, 16), channels, channels, 1e-5),
        "group_norm_silu": lambda: group_norm_silu.launch_forward(image, channels, channels, 4, 1e-5, None, True),
    }[name]()


@pytest.mark.parametrize("name", KERNELS)
def test_tensors_on_different_devices(name):
    launch(name, randn(1), randn(1))
    with pytest.raises(ValueError, match=r"on meta, but .* on cpu; bring them together"):
        launch(name, randn(1), meta(1))


@pytest.mark.parametrize("name", KERNELS)
def test_another_dtype(name):
    with pytest.raises(ValueError, match=r"dtype torch.float64|torch.float64 on cpu"):
        launch(name, randn(1).double(), randn(1).double())
    with pytest.raises(ValueError, match=r"dtype torch.int64|torch.int64 on cpu"):
        launch(name, torch.zeros(1, dtype=torch.int64), randn(1))


@pytest.mark.parametrize(
    ("q", "k", "complaint"),
    [
        (meta(1, 0, 2, 40), meta(1, 77, 2, 40), "0 queries, 77 keys"),
        (meta(1, 4, 2, 40), meta(1, 0, 2, 40), "4 queries, 0 keys"),
        (meta(1, 4, 2, 176), meta(1, 77, 2, 176), "heads 176 wide"),
        (meta(70000, 1, 1, 16), meta(70000, 77, 1, 16), "a batch of 70000 with 1 heads, expected at most 65535"),
        (meta(1, 1, 70000, 16), meta(1, 77, 70000, 16), "a batch of 1 with 70000 heads"),
        (meta(1, 2**21, 64, 16), meta(1, 77, 64, 16), "2097152 rows 1024 elements apart, more than 32 bits"),
        (meta(1, 4, 2, 40), meta(1, 77, 3, 40)[:, :, 1:].mT.contiguous().mT, "k: strides .* heads side by side"),
        (meta(1, 4, 2, 40), meta(1, 77, 2, 48)[..., 8:], "k: strides .* heads side by side"),
        (meta(1, 4, 2, 40), meta(77, 80).as_strided((1, 77, 2, 40), (0, 40, 40, 1)), "k: strides .* a multiple of 16"),
        (meta(1, 4, 2, 40), meta(77, 80).as_strided((1, 77, 2, 40), (0, 48, 40, 1)), "k: .* make rows overlap"),
    ],
)
def test_heads_that_neither_attention_can_read(q, k, complaint):
    """Both raise what this says, before anything else."""
    assert re.search(complaint, why_unsupported(q, k, k) or "")


def test_heads_that_both_can_read():
    assert why_unsupported(meta(2, 4, 2, 40), meta(2, 77, 2, 40), meta(2, 77, 2, 40)) is None


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: geglu.launch_forward(meta(2**15, 2**16)), r"x: shape \(32768, 65536\), .* fewer than 2\^31"),
        (lambda: geglu.launch_forward(meta()), r"x: shape \(\), expected \(..., 2C\)"),
        (lambda: add_layer_norm.launch_forward(meta(), meta(), meta(1), meta(1), 1e-5), r"x: shape \(\), expected"),
        (
            lambda: add_layer_norm.launch_forward(meta(2, 9000), meta(2, 9000), meta(9000), meta(9000), 1e-5),
            "9000 channels .* at most 8192",
        ),
        (
            lambda: group_norm_silu.launch_forward(meta(1, 8, 2**14, 2**14), meta(8), meta(8), 1, 1e-5, None, True),
            r"fewer than 2\^31 numbers",
        ),
        (
            lambda: group_norm_silu.launch_forward(meta(70000, 8, 1, 1), meta(8), meta(8), 1, 1e-5, None, True),
            "a batch of 70000, expected at most 65535; split the batch",
        ),
    ],
)
def test_more_than_a_kernel_can_count_and_less_than_it_needs(call, complaint):
    with pytest.raises(ValueError, match=complaint):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda x: attention.attention(*3 * [x.view(1, 2, 1, 16)]),
        lambda x: geglu.geglu(x.view(2, 16)),
        lambda x: add_layer_norm.add_layer_norm(x.view(2, 16), x.view(2, 16), x[:16], x[16:])[1],
        lambda x: group_norm_silu.group_norm_silu(x.view(1, 16, 1, 2), x[:16], x[16:], 4, 1e-5),
        lambda x: cross_attention.cross_attention(x.view(1, 2, 1, 16), *2 * [x.repeat(35).view(1, 70, 1, 16)]),
    ],
)
def test_a_gradient_of_a_gradient_is_refused(call):
    x = randn(32).requires_grad_()
    (gradient,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("call", "launches"),
    [
        (lambda x: attention.attention(*3 * [x.view(1, 2, 1, 16)]), 1 + 2),  # the backward is two kernels
        (lambda x: cross_attention.cross_attention(x.view(1, 2, 1, 16), *2 * [x.repeat(35).view(1, 70, 1, 16)]), 1 + 2),
        (lambda x: geglu.geglu(x.view(2, 16)), 1 + 1),
        (lambda x: add_layer_norm.add_layer_norm(x.view(2, 16), x.view(2, 16), x[:16], x[16:])[1], 1 + 1),
        (lambda x: group_norm_silu.group_norm_silu(x.view(1, 16, 1, 2), x[:16], x[16:], 4, 1e-5), 1 + 1),
    ],
)
def test_a_kernel_runs_on_the_device_of_its_tensors(call, launches, monkeypatch):
    """And not on the current one, whose stream waits for nothing that another GPU does."""
    guarded = []
    device_of = torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: guarded.append(x) or device_of(x))
    call(randn(32).requires_grad_()).sum().backward()
    assert len(guarded) == launches


# ---- "auto" on a GPU: the plain operation for what no kernel was made for --------------------------


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ours = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "ldm":
            self.ours.append(func._opname)
        return func(*args, **(kwargs or {}))


def heads_of(n=10, m=10, width=40, dtype=torch.float16, batch=2):
    q, k = (torch.empty(batch, length, 2 * width, dtype=dtype, device="cuda") for length in (n, m))
    return AUTO.attention(q, k, k, heads=2)


def image(channels=16, layout=torch.channels_last, batch=2, dtype=torch.float16):
    x = torch.empty(batch, channels, 4, 4, dtype=dtype, device="cuda").to(memory_format=layout)
    return AUTO.group_norm(x, nn.GroupNorm(4, channels, device="cuda"), silu=True)


def normed(dtype=torch.float16, branch=torch.float16, batch=2):
    x, y = (torch.empty(batch, 16, dtype=of, device="cuda") for of in (dtype, branch))
    return AUTO.add_layer_norm(x, y, nn.LayerNorm(16, device="cuda", dtype=dtype))


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: heads_of(), ["attention"]),
        (lambda: heads_of(m=77), ["cross_attention"]),
        (lambda: heads_of(m=63), ["attention"]),
        (lambda: heads_of(m=81), ["attention"]),
        (lambda: heads_of(dtype=torch.bfloat16), ["attention"]),
        (lambda: heads_of(dtype=torch.float32), []),
        (lambda: heads_of(width=12), []),
        (lambda: heads_of(width=168), []),
        (lambda: heads_of(batch=0), []),
        (lambda: heads_of(n=0), []),
        (lambda: image(), ["group_norm_silu"]),
        (lambda: image(layout=torch.contiguous_format), []),
        (lambda: image(channels=12), []),
        (lambda: image(batch=0), []),
        (lambda: AUTO.geglu(torch.empty(2, 8, device="cuda")), ["geglu"]),
        (lambda: AUTO.geglu(torch.empty(0, 8, device="cuda")), []),
        (lambda: normed(), ["add_layer_norm"]),
        (lambda: normed(batch=0), []),
    ],
)
def test_auto_takes_a_kernel_only_for_what_it_was_made_for(call, expected, monkeypatch):
    """A GPU without one: tensors that say they are on it, and hold nothing, so that no kernel can be proven first."""
    monkeypatch.setattr(first_use, "trusted", lambda use, kernels, plain: True)
    with FakeTensorMode(), Seen() as seen:
        call()
    assert seen.ours == expected
