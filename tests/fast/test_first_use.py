"""A kernel is used on a device only once its result there is torch's: wrong and failing ones, put in by hand.

The interpreter stands for the GPU: kernels run on the CPU, and `on_gpu` says so.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from ldm_kernels import add_layer_norm, attention, cross_attention, geglu, group_norm_silu
from torch import nn

from ldm import fast
from ldm.config import SD15
from ldm.fast import first_use, ops
from ldm.fast.cuda_graph import GraphedUNet
from ldm.fast.ops import Ops
from ldm.unet import UNet

HALF = torch.float16
# SD1.5's head width 40; everything else as small as it gets, for the interpreter.
CONFIG = replace(
    SD15.unet, widths=(80,), resnets_per_level=1, attention=(True,), heads=2, context_width=16, norm_groups=4
)


@pytest.fixture(autouse=True)
def _a_gpu(monkeypatch):
    monkeypatch.setattr(ops, "on_gpu", lambda x: True)
    monkeypatch.setattr(first_use, "_trusted", set())
    monkeypatch.setattr(first_use, "_refused", {})
    with torch.no_grad():
        yield


@pytest.fixture
def counted(monkeypatch):
    """How often each kernel is called."""
    calls = dict.fromkeys(KERNELS, 0)
    for name, module in KERNELS.items():
        kernel = getattr(module, name)

        def call(*args, kernel=kernel, name=name, **kwargs):
            calls[name] += 1
            return kernel(*args, **kwargs)

        monkeypatch.setattr(module, name, call)
    return calls


KERNELS = {
    "attention": attention,
    "cross_attention": cross_attention,
    "geglu": geglu,
    "group_norm_silu": group_norm_silu,
    "add_layer_norm": add_layer_norm,
}


def randn(*shape, seed=0, dtype=HALF):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def norm_of(kind, *sizes):
    return kind(*sizes).to(HALF)


X = randn(1, 16, 4, 4).contiguous(memory_format=torch.channels_last)
CALLS = {
    "attention": lambda by: by.attention(*(randn(1, 32, 80, seed=s) for s in range(3)), 2),
    "cross_attention": lambda by: by.attention(*(randn(1, n, 80, seed=n) for n in (16, 77, 77)), 2),
    "geglu": lambda by: by.geglu(randn(3, 16)),
    "group_norm_silu": lambda by: by.group_norm(X, norm_of(nn.GroupNorm, 4, 16), randn(1, 16), silu=True),
    "add_layer_norm": lambda by: by.add_layer_norm(randn(3, 16), randn(3, 16, seed=1), norm_of(nn.LayerNorm, 16)),
}


def lines(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "ldm.fast.first_use"]


def equal(one, other):
    one, other = (x if isinstance(x, tuple) else (x,) for x in (one, other))
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_a_right_kernel_is_proven_once_and_used(name, counted, caplog):
    for calls in (2, 3):  # the first of all is the check's
        assert equal(CALLS[name](Ops("auto")), CALLS[name](Ops("triton")))
        assert counted[name] == 2 * calls - 1
    assert lines(caplog) == []
    assert first_use.refused() == {}


@pytest.mark.parametrize("wrong", [1.02, 0.0, float("nan")])
@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_kernel_is_left_for_torch_and_named(name, wrong, monkeypatch, caplog):
    right = getattr(KERNELS[name], name)

    def kernel(*args):
        out = right(*args)
        return tuple(wrong * x for x in out) if isinstance(out, tuple) else wrong * out

    monkeypatch.setattr(KERNELS[name], name, kernel)
    for _ in range(2):
        assert equal(CALLS[name](Ops("auto")), CALLS[name](Ops("torch")))
    (line,) = lines(caplog)
    op = {"cross_attention": "attention", "group_norm_silu": "group_norm"}.get(name, name)
    assert line.startswith(f"kernel not used: {op} (")
    assert "float16 on cpu: error " in line
    assert line.endswith("; torch computes it instead. Please report this line with `ldm doctor --json`")
    assert not equal(CALLS[name](Ops("triton")), CALLS[name](Ops("torch"))), "triton asks nothing"


@pytest.mark.parametrize(
    "error", [RuntimeError("Failed to find C compiler.\nmore"), AssertionError(), OSError("ptxas")]
)
def test_a_kernel_that_raises_is_left_for_torch_with_one_line_an_operation(error, monkeypatch, caplog):
    def kernel(x):
        raise error

    monkeypatch.setattr(geglu, "geglu", kernel)
    for rows in (3, 3, 5, 128):
        x = randn(rows, 16)
        assert equal(Ops("auto").geglu(x), Ops("torch").geglu(x))
    (line,) = lines(caplog)
    said = str(error).split("\n")[0] or "no message"
    assert line.startswith(f"kernel not used: geglu (3, 16), float16 on cpu: {type(error).__name__}: {said};")
    assert len(first_use.refused()) == 3


def test_a_kernel_with_a_wrong_gradient_computes_forwards_only(monkeypatch, caplog):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return geglu.geglu_op(x)

        @staticmethod
        def backward(ctx, g):
            return torch.cat([g, g], -1)

    monkeypatch.setattr(geglu, "geglu", Wrong.apply)
    x = randn(3, 16)
    Ops("auto").geglu(x)
    assert lines(caplog) == []
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        (got,) = torch.autograd.grad(Ops("auto").geglu(leaf).sum(), leaf)
        (right,) = torch.autograd.grad(Ops("torch").geglu(leaf).sum(), leaf)
    assert torch.equal(got, right)
    assert "geglu (3, 16) with gradients, float16 on cpu: error" in lines(caplog)[0]


@pytest.mark.parametrize("name", CALLS)
def test_right_gradients_are_trusted(name, caplog):
    with torch.enable_grad():
        CALLS[name](Ops("auto"))
    assert lines(caplog) == []
    assert [use.gradients for use in first_use._trusted] == [True]


def test_modes_of_the_caller_are_not_the_checks(caplog):
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.random.fork_rng():
        before = torch.random.get_rng_state()
        for name in CALLS:
            CALLS[name](Ops("auto"))
        assert torch.equal(before, torch.random.get_rng_state())
    assert lines(caplog) == []
    assert len(first_use._trusted) == len(CALLS)


def test_out_of_memory_says_nothing_about_a_kernel(monkeypatch):
    def kernel(x):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(geglu, "geglu", kernel)
    with pytest.raises(torch.OutOfMemoryError):
        CALLS["geglu"](Ops("auto"))
    assert first_use.refused() == {}


def test_while_a_graph_is_recorded_torch_computes_what_is_not_proven(monkeypatch, caplog):
    use = first_use.Use("geglu", (3, 16), HALF, torch.device("cuda"), False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not first_use.trusted(use, Ops("triton"), Ops("torch"))
    assert first_use._trusted == set()
    assert first_use.refused() == {}
    first_use._trusted.add(use)
    assert first_use.trusted(use, Ops("triton"), Ops("torch"))


def test_a_gpu_that_a_kernel_took_down_is_said(monkeypatch):
    use = first_use.Use("geglu", (3, 16), HALF, torch.device("cuda"), False)

    def dead(*args, **kwargs):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")

    monkeypatch.setattr(first_use.Use, "__str__", lambda self: "geglu")
    monkeypatch.setattr(first_use, "errors", dead)
    monkeypatch.setattr(torch, "zeros", dead)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.raises(ValueError, match=r"geglu: the kernel left the GPU unusable \(RuntimeError: CUDA error: an ill"):
        first_use.trusted(use, Ops("triton"), Ops("torch"))


def test_many_threads_check_once(monkeypatch):
    checks = []

    def errors(*args):
        checks.append(args)
        time.sleep(0.1)
        return 0.0, 0.0

    monkeypatch.setattr(first_use, "errors", errors)
    use = first_use.Use("geglu", (3, 16), HALF, torch.device("cpu"), False)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: first_use.trusted(use, Ops("triton"), Ops("torch")), range(4)))
    assert found == [True] * 4
    assert len(checks) == 1


def test_traced_it_is_taken_as_it_is(caplog):
    """torch.compile has no numbers to check: kernels, unless one was refused before."""

    class Gated(nn.Module):
        def forward(self, x):
            return Ops("auto").geglu(x)

    x = randn(3, 16)
    compiled = torch.compile(Gated(), backend="eager", fullgraph=True)
    assert equal(compiled(x), Ops("triton").geglu(x))
    assert first_use._trusted == set()


def test_a_network_is_proven_before_its_graph_is_recorded(caplog, monkeypatch):
    network = UNet(CONFIG).to(HALF).eval()
    monkeypatch.setattr("ldm.fast.installing.resolved", lambda kernels, device: "triton")
    fast.install(network)
    known = []

    def capture(work):
        before = work()
        known.append(set(first_use._trusted))
        result = work()
        known.append(set(first_use._trusted))
        return lambda: None, result, before

    network.forward = graphed = GraphedUNet(network, capture)
    graphed(randn(1, 4, 4, 4), 500, randn(1, 77, 16))
    assert graphed.used
    assert known[0] == known[1] != set()
    assert {use.op for use in known[0]} == {"attention", "geglu", "group_norm", "add_layer_norm"}
    assert lines(caplog) == []


@pytest.mark.parametrize("length", [1, 64, 77, 128, 256, 257, 576, 640, 641, 1024, 4096, 9216])
def test_a_short_length_is_divided_as_the_long_one(length):
    short = first_use.short(length)
    assert short <= 640
    assert [short % 2**i == 0 for i in range(8)] == [length % 2**i == 0 for i in range(8)]


def test_a_model_says_which_kernels_were_refused(monkeypatch):
    monkeypatch.setattr(geglu, "geglu", lambda x: 2 * geglu.geglu_op(x))
    network = UNet(CONFIG)
    installed = fast.install(network, kernels="triton")
    assert installed.refused == []
    CALLS["geglu"](Ops("auto"))
    (line,) = installed.refused
    assert line.startswith("geglu (3, 16), float16 on cpu: error ")
    assert fast.install(network, kernels="torch").refused == []
