"""Whether the U-Net can be recorded: what would prevent it, the commands without CUDA, and the rest on a GPU."""

import argparse
import copy
import json
import logging
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from graphed import Watched, args, inputs, lines, replace_data
from ldm_tools import options
from ldm_tools.cli import main
from networks import small
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ldm import fast
from ldm.fast.cuda_graph import CudaCapture, GraphedUNet
from ldm.unet import UNet

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


# ---- whether the U-Net can be recorded -------------------------------------------------------------


class OnlyOn(TorchDispatchMode):
    """Notes every operation whose result is not on the device."""

    def __init__(self, device):
        super().__init__()
        self.device, self.elsewhere = device, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        leaves = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.elsewhere += [str(func) for x in leaves if x.device.type != self.device]
        return result


class FromNumbers(TorchFunctionMode):
    """Notes every tensor that is made of Python numbers: on a GPU they are copied there."""

    def __init__(self):
        super().__init__()
        self.numbers = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.tensor, torch.as_tensor, torch.from_numpy) and not isinstance(args[0], torch.Tensor):
            self.numbers.append(args[0])
        return func(*args, **(kwargs or {}))


def copied_to_the_device(network, x_t, t, context):
    with OnlyOn("meta") as results, FromNumbers() as made:
        network(x_t, t, context)
    return results.elsewhere + made.numbers


def test_nothing_in_the_unet_would_end_a_recording():
    """No copy from the CPU; nor is a value read back, for a meta tensor has none, and that would raise here."""
    with torch.device("meta"):
        network = UNet(small("unet").config)
        x_t, t, context = torch.empty(2, 4, 8, 8), torch.empty(2), torch.empty(2, 77, 64)
    assert copied_to_the_device(network, x_t, t, context) == []
    for number in (500, 0.5):
        assert copied_to_the_device(network, x_t, number, context) == []  # filled in there: no step waits for a copy
    with_table = nn.Module()
    with_table.forward = lambda x_t, t, context: x_t * torch.arange(8).to(x_t.device)
    assert copied_to_the_device(with_table, x_t, t, context) == ["aten.arange.default"]


# ---- the command -----------------------------------------------------------------------------------


def test_the_command_goes_on_without_cuda_and_records_it(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    command = ["generate", "--prompt", "a chest", "--steps", "1", "--seeds", "0,1", "--device", "cpu"]
    assert main([*command, "--out", str(tmp_path / "plain")]) == 0
    assert lines(caplog) == []
    assert main([*command, "--cuda-graph", "--out", str(tmp_path / "graph")]) == 0
    assert len(lines(caplog)) == 1
    plain, graph = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("plain", "graph"))
    assert graph["cuda_graph"] is plain["cuda_graph"] is False
    same = "latents.safetensors"
    assert (tmp_path / "plain" / same).read_bytes() == (tmp_path / "graph" / same).read_bytes()


@pytest.mark.parametrize(
    ("words", "on_cpu", "on_gpu"),
    [([], False, True), (["--cuda-graph"], True, True), (["--no-cuda-graph"], False, False)],
)
def test_on_a_gpu_graphs_are_the_default_and_can_be_declined(words, on_cpu, on_gpu):
    parser = argparse.ArgumentParser()
    options.add_cuda_graph(parser)
    said = parser.parse_args(words)
    assert options.wants_cuda_graph(said, torch.device("cpu")) is on_cpu
    assert options.wants_cuda_graph(said, torch.device("cuda")) is on_gpu
    assert not options.wants_cuda_graph(argparse.Namespace(), torch.device("cuda")), "a command that has none"


# ---- on a GPU --------------------------------------------------------------------------------------


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_on_a_gpu_a_replay_is_the_network_bit_for_bit(dtype, backend):
    network = copy.deepcopy(small("unet")).to("cuda", dtype)
    unet = copy.deepcopy(network)
    fast.install(network, kernels=backend)
    installed = fast.install(unet, kernels=backend, cuda_graph=True)
    for seed in (0, 1):
        for rows in (1, 2, 3, 18):
            x_t, context = inputs(rows, dtype, seed, "cuda")
            t = torch.arange(rows, device="cuda") * 50
            for time in (981, 0.5, t, t.cpu()):
                assert torch.equal(unet(x_t, time, context), network(x_t, time, context))
        x_t, context = inputs(17, dtype, seed, "cuda")
        padded = torch.arange(18).clamp(max=16)
        assert torch.equal(unet(x_t, 500, context), network(x_t[padded], 500, context[padded])[:17])
    assert installed.cuda_graph_used


def cannot_be_recorded() -> list[str]:
    """What is wrong after a recording that fails; before torch 2.12 no other one of the process succeeds then."""

    class Synchronising(Watched):
        def forward(self, x_t, t, context):
            return super().forward(x_t, t, context) * (1 + 0 * float(x_t.sum()))

    said = []
    logging.getLogger("ldm.fast.cuda_graph").addFilter(lambda record: said.append(record.getMessage()) or False)
    network = Synchronising().cuda()
    unet = GraphedUNet(network)
    stream = torch.cuda.current_stream()
    call = args(2, device="cuda")
    same = all(torch.equal(unet(*call), network(*call)) for _ in range(2))
    wrong = {
        "another result than the network's": not same,
        "another stream is current": torch.cuda.current_stream() != stream,
        "still recording": torch.cuda.is_current_stream_capturing(),
        "used": unet.used,
        f"said {said}, expected one line": len(said) != 1,
    }
    if torch.__version__ >= "2.12":  # another recording is possible afterwards
        replay, result, before = CudaCapture()(lambda: call[0] + 1)
        replay()
        wrong["the next recording is wrong"] = not torch.equal(result, before)
    return [what for what, is_so in wrong.items() if is_so]


@gpu
@pytest.mark.gpu
def test_on_a_gpu_what_cannot_be_recorded_falls_back():
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        assert process.submit(cannot_be_recorded).result() == []


@gpu
@pytest.mark.gpu
def test_on_a_gpu_weights_may_change():
    network = copy.deepcopy(small("unet")).to("cuda")
    unet = GraphedUNet(network)
    call = args(2, device="cuda")
    for change in (lambda: network.conv_out.weight.mul_(2), lambda: replace_data(network), lambda: network.half()):
        unet(*call)
        change()
        dtype = network.conv_out.weight.dtype
        call = (call[0].to(dtype), call[1], call[2].to(dtype))
        assert torch.equal(unet(*call), network(*call))
        assert unet._graphs, "recorded anew, not fallen back"
