"""`ldm doctor`: what it prints on a CPU, what it would on a GPU, and that it tells what is broken."""

import copy
import json

import pytest
import torch
from ldm_kernels import geglu
from ldm_tools import doctor as command
from ldm_tools.cli import main

from ldm.bench import doctor
from ldm.fast import first_use

MODEL = {"error": 1e-6, "allowed": 1e-4, "ok": True, "ms": 3.0, "backend": "torch", "cuda_graph_used": False}
GPU = {"name": "NVIDIA H100", "capability": "9.0", "multiprocessors": 132, "memory_gib": 79.1, "memory_free_gib": 78.0}


@pytest.fixture
def checks(monkeypatch):
    """The check's answer, made up: it takes a process of its own."""
    answer = {"model": dict(MODEL)}
    monkeypatch.setattr(doctor, "check", lambda *args, **kwargs: answer)
    return answer


@pytest.mark.parametrize(
    ("version", "allowed", "ok"),
    [
        ("2.14.1+cu130", ">=2.11,<2.15", True),
        ("2.11", ">=2.11.0,<2.15", True),
        ("2.10.9", ">=2.11,<2.15", False),
        ("2.15.0", ">=2.11, <2.15", False),
        ("3.8.0.post1", ">=3.6,<3.9", True),
        ("13.0.0", ">=10.1", True),
        ("1.0", "", True),
    ],
)
def test_versions_are_held_against_what_is_allowed(version, allowed, ok):
    assert doctor.within(version, allowed) is ok


def test_requirements_are_the_projects():
    allowed = doctor.requirements()
    assert allowed["python"].startswith(">=3.")
    assert allowed["torch"].startswith(">=")
    assert allowed["triton"].startswith(">=")
    assert set(doctor.SHOWN) <= allowed.keys()
    assert all(of["ok"] for of in doctor.packages())


def test_on_a_cpu_it_says_what_is_here_and_that_nothing_is_broken(checks, capsys):
    assert main(["doctor", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "torch       " + torch.__version__.split("+")[0] in out
    assert "phantom.safetensors                   here" in out
    assert "cpu, float32, backend torch, no CUDA graphs; of SD1.5 at 512 x 512 8 rows in a U-Net call, 1 decoded" in out
    assert "kernels  none run here" in out
    assert out.endswith("nothing is broken\n")


def test_json_has_all_of_it(checks, capsys):
    assert main(["doctor", "--device", "cpu", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report.keys() == {"machine", "packages", "weights", "used", "checks", "broken"}
    assert report["broken"] == []
    assert report["used"] == {
        **{"device": "cpu", "dtype": "float32", "backend": "torch", "cuda_graph": False},
        **{"rows_a_call": 8, "images_a_call": 1},
    }


def refuse(answer):
    answer["kernels"] = {"by": "GPU", "checked": 5, "refused": ["geglu: wrong"], "ok": False, "seconds": 1.0}


@pytest.mark.parametrize(
    ("breaks", "complaint"),
    [
        (lambda answer: answer["model"].update(ok=False, error=0.5), "model: 5.0e-01 away from the CPU, at most 1e-04"),
        (refuse, "kernel: geglu: wrong"),
        (lambda answer: answer.update(failed="the process ended with -11"), "check: the process ended with -11"),
    ],
)
def test_what_is_broken_is_said_after_the_report_and_by_the_exit_status(checks, capsys, breaks, complaint):
    breaks(checks)
    assert main(["doctor", "--device", "cpu"]) == 2
    said = capsys.readouterr()
    assert f"BROKEN: {complaint}" in said.out
    assert said.err == f"ldm doctor: 1 broken: {complaint}" + said.err[said.err.index(complaint) + len(complaint) :]
    assert said.err.count("\n") == 1
    assert "nothing is broken" not in said.out


def test_a_version_or_weights_that_do_not_fit_are_broken(checks, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "requirements", lambda: {"python": ">=3.11", "torch": ">=99", "triton": ">=3.6"})
    monkeypatch.setattr(command, "SHIPPED", ("phantom", "nowhere"))
    assert main(["doctor", "--device", "cpu"]) == 2
    out = capsys.readouterr().out
    assert f"BROKEN: torch: {torch.__version__.split('+')[0]}, expected >=99" in out.replace("+cpu", "")
    assert "BROKEN: nowhere.safetensors: missing" in out
    assert "NOT ALLOWED" in out


def test_a_gpu_is_described_and_a_graph_that_is_not_used_is_said(checks, capsys, monkeypatch):
    machine = copy.deepcopy(doctor.machine())
    monkeypatch.setattr(doctor, "machine", lambda: {**machine, "gpus": [GPU]})
    used = {"device": "cuda", "dtype": "float16", "backend": "triton", "cuda_graph": True}
    monkeypatch.setattr(doctor, "choices", lambda *args: {**used, "rows_a_call": 64, "images_a_call": 16})
    assert main(["doctor", "--device", "cpu"]) == 2
    out = capsys.readouterr().out
    assert "gpu 0   NVIDIA H100, capability 9.0, 79.1 GiB, 78.0 free" in out
    assert "BROKEN: CUDA graph: none could be recorded" in out
    checks["model"]["cuda_graph_used"] = True
    assert main(["doctor", "--device", "cpu"]) == 0
    assert "replayed as a CUDA graph" in capsys.readouterr().out


def test_a_driver_without_a_torch_that_uses_it_is_noted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi" if name == "nvidia-smi" else None)
    (note,) = doctor.machine()["notes"]
    assert note.startswith("there is an NVIDIA driver, but torch ")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("CC", raising=False)
    assert doctor._notes() == ["no C compiler: triton needs one, such as gcc, to launch kernels"]


def test_a_check_that_fails_or_is_silent_is_reported():
    failed = doctor.check("cuda:7", torch.float16, "torch", interpret=False)
    assert "failed" in failed
    assert failed["failed"]
    assert doctor.check("cpu", torch.float32, "auto", False, seconds=0.0) == {"failed": "no answer in 0 s"}


def test_the_model_and_the_kernels_are_checked_by_what_they_compute(monkeypatch):
    monkeypatch.setattr(first_use, "_trusted", set())
    monkeypatch.setattr(first_use, "_refused", {})
    cpu = torch.device("cpu")
    model = doctor.check_model(cpu, torch.bfloat16, "auto")
    assert model["ok"]
    assert 0 < model["error"] < 0.1
    monkeypatch.setattr(geglu, "geglu", lambda x: 1.1 * geglu.geglu_op(x))
    kernels = doctor.check_kernels(cpu, torch.float32)
    assert kernels["checked"] == len(doctor.TINY)
    assert [line.split()[0] for line in kernels["refused"]] == ["geglu"]
    assert not kernels["ok"]


def test_the_interpreter_is_for_a_cpu(checks, capsys, monkeypatch):
    monkeypatch.setattr(command, "device_of", lambda args: torch.device("cuda"))
    assert main(["doctor", "--interpret"]) == 2
    assert "--interpret: got device cuda, expected --device cpu" in capsys.readouterr().err
