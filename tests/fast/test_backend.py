"""The choice between torch and the kernels, where there is no GPU."""

import subprocess
import sys

import pytest
import torch

import ldm
from ldm import fast
from ldm.fast import backend
from ldm.fast.ops import Ops
from ldm.pipeline import PHANTOM_WEIGHTS

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_on_the_cpu_the_default_is_torch():
    assert fast.resolved("auto", CPU) == fast.resolved("torch", CPU) == "torch"


def test_triton_forced_where_there_is_no_gpu_says_so():
    complaint = "triton was asked for, but the tensors are on cpu; expected a CUDA GPU"
    with pytest.raises(ValueError, match=complaint):
        fast.resolved("triton", CPU)
    with pytest.raises(ValueError, match=complaint):
        Ops("triton").geglu(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=complaint):
        ldm.load("no file is read for this", backend="triton")


def test_the_interpreter_lets_the_cpu_have_kernels_when_forced(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert fast.resolved("auto", CPU) == "torch"
    assert fast.resolved("triton", CPU) == "triton"


def test_without_triton_auto_is_torch_and_triton_an_error(monkeypatch):
    monkeypatch.setattr(backend, "_TRITON", False)
    assert fast.resolved("auto", torch.device("cuda")) == "torch"
    with pytest.raises(ValueError, match="triton is not installed"):
        fast.resolved("triton", CPU)


@pytest.mark.parametrize(("major", "minor", "expected"), [(7, 5, "torch"), (8, 0, "triton"), (9, 0, "triton")])
def test_auto_goes_by_the_gpus_capability(monkeypatch, major, minor, expected):
    class Gpu:
        name = "a GPU"

    Gpu.major, Gpu.minor = major, minor
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Gpu)
    assert fast.resolved("auto", torch.device("cuda")) == expected


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend: got 'cuda', expected one of auto, torch, triton"):
        fast.resolved("cuda", CPU)


def test_a_model_says_what_computes_it(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    sd = ldm.load(PHANTOM_WEIGHTS)
    assert sd.backend == "torch"
    installed = fast.install(sd.unet, kernels="triton")
    assert sd.backend == "triton"
    installed.undo()
    assert sd.backend == "torch"


def test_the_cpu_never_imports_triton_nor_the_kernels():
    code = "import sys, torch, ldm; from ldm.pipeline import PHANTOM_WEIGHTS; ldm.load(PHANTOM_WEIGHTS); " + (
        "print(sorted({'triton', 'ldm_kernels', 'torch._dynamo'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
