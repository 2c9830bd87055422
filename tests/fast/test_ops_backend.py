"""The switch between torch and the kernels, where there is no GPU."""

import subprocess
import sys

import pytest
import torch

from ldm.fast import ops

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_on_the_cpu_the_default_is_torch():
    assert ops.resolved(CPU) == "torch"
    with ops.using("torch"):
        assert ops.resolved(CPU) == "torch"


def test_triton_forced_where_there_is_no_gpu_says_so():
    with ops.using("triton"):
        with pytest.raises(ValueError, match="triton was asked for, but the tensors are on cpu; expected a CUDA GPU"):
            ops.geglu(torch.zeros(2, 4))
        with pytest.raises(ValueError, match="triton was asked for"):
            ops.resolved(CPU)
    ops.geglu(torch.zeros(2, 4))  # and the choice ended with the `with`


def test_the_interpreter_lets_the_cpu_have_kernels_when_forced(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert ops.resolved(CPU) == "torch"
    with ops.using("triton"):
        assert ops.resolved(CPU) == "triton"


def test_without_triton_auto_is_torch_and_triton_an_error(monkeypatch):
    monkeypatch.setattr(ops, "_TRITON", False)
    assert ops.resolved(torch.device("cuda")) == "torch"
    with ops.using("triton"), pytest.raises(ValueError, match="triton is not installed"):
        ops.resolved(CPU)


@pytest.mark.parametrize(("major", "minor", "expected"), [(7, 5, "torch"), (8, 0, "triton"), (9, 0, "triton")])
def test_auto_goes_by_the_gpus_capability(monkeypatch, major, minor, expected):
    class Gpu:
        name = "a GPU"

    Gpu.major, Gpu.minor = major, minor
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Gpu)
    assert ops.resolved(torch.device("cuda")) == expected


def test_an_unknown_backend_is_refused_and_changes_nothing():
    with pytest.raises(ValueError, match="backend: got 'cuda', expected one of auto, torch, triton"):
        ops.use("cuda")
    assert ops.resolved(CPU) == "torch"


def test_the_cpu_never_imports_triton_nor_the_kernels():
    code = "import sys, torch, ldm; from ldm import ops; ops.geglu(torch.zeros(2, 4)); " + (
        "print(sorted({'triton', 'kernels', 'torch._dynamo'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
