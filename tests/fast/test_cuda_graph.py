"""CUDA graphs of the U-Net: everything but CUDA itself, on the CPU, by a stand-in for the recording.

The stand-in runs the work on the buffers when it is asked to replay it, and writes into the same result each time: what
a graph does. What it cannot show is whether the U-Net can be recorded: see test_recording.py.
"""

import copy
from dataclasses import replace

import pytest
import torch
from graphed import Recorder, Watched, args, inputs, lines, replace_data
from networks import small
from torch import nn

import ldm
from ldm import fast, probe
from ldm.conditioning import constant
from ldm.fast import cuda_graph
from ldm.fast.cuda_graph import GraphedUNet, bucket
from ldm.guidance import guided
from ldm.pipeline import PHANTOM_WEIGHTS
from ldm.probe import zero
from ldm.samplers import ddim
from ldm.schedule import Schedule
from ldm.traversal.plan import Traversal
from ldm.traversal.sampling import prompt_tree, sample


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


# ---- which graph a call gets -----------------------------------------------------------------------


def test_buckets():
    assert [bucket(rows) for rows in range(1, 17)] == list(range(1, 17))
    assert [bucket(rows) for rows in (17, 18, 19, 31, 33, 36, 37, 63, 65)] == [18, 18, 20, 32, 36, 36, 40, 64, 72]
    assert [bucket(2 * live) for live in range(1, 11)] == [2 * live for live in range(1, 11)]  # a style, nine forks
    for rows in range(1, 1000):
        assert 0 <= bucket(rows) - rows < rows / 8
        assert bucket(bucket(rows)) == bucket(rows)
    assert len({bucket(rows) for rows in range(1, 129)}) == 16 + 3 * 8


def test_each_shape_and_dtype_is_recorded_once():
    recorder = Recorder()
    unet = GraphedUNet(Watched(), recorder)
    for rows, recordings in ((2, 1), (2, 1), (17, 2), (18, 2), (2, 2), (3, 3)):
        unet(*args(rows))
        assert (rows, recorder.recordings) == (rows, recordings)
    unet(torch.zeros(2, 4, 8, 16), 1, torch.zeros(2, 77, 64))
    unet(torch.zeros(2, 4, 16, 16), 1, torch.zeros(2, 5, 64))
    unet(torch.zeros(2, 4, 16, 16, dtype=torch.bfloat16), 1, torch.zeros(2, 77, 64, dtype=torch.bfloat16))
    assert recorder.recordings == 6


def test_the_graphs_used_last_are_kept(monkeypatch):
    monkeypatch.setattr(cuda_graph, "MOST_GRAPHS", 2)
    recorder = Recorder()
    unet = GraphedUNet(Watched(), recorder)
    for rows, recordings in ((1, 1), (2, 2), (1, 2), (3, 3), (1, 3), (2, 4), (1, 4)):  # 3 drives out 2, then 2 drives 3
        unet(*args(rows))
        assert (rows, recorder.recordings) == (rows, recordings)


# ---- what is computed ------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [999, 0.5, torch.tensor(7), torch.tensor([1, 981, 3]), torch.tensor([0.25, 1, 999.5])])
def test_a_replay_is_what_the_network_computes(t):
    network = small("unet")
    unet = GraphedUNet(network, Recorder())
    for seed in (0, 1):
        x_t, _, context = args(3, seed=seed)
        assert torch.equal(unet(x_t, t, context), network(x_t, t, context))
    assert unet.used


def test_a_padded_call_repeats_its_last_row_and_returns_its_own():
    network = Watched()
    unet = GraphedUNet(network, Recorder())
    x_t, context = inputs(17)
    t = torch.arange(17) * 10
    eps = unet(x_t, t, context)
    for given, buffer in zip((x_t, t, context), network.calls[-1], strict=True):
        assert len(buffer) == 18
        assert torch.equal(buffer[:17], given.to(buffer.dtype))
        assert torch.equal(buffer[17], given[16].to(buffer.dtype))
    torch.testing.assert_close(eps, network(x_t, t, context))
    assert network.calls[-2][1].dtype == torch.float32


def test_buffers_stay_and_results_do_not_change_with_them():
    network = Watched()
    unet = GraphedUNet(network, Recorder())
    first = unet(*args(3))
    kept = first.clone()
    addresses = [x.data_ptr() for x in network.calls[-1]]
    unet(*args(3, t=1, seed=1))
    assert [x.data_ptr() for x in network.calls[-1]] == addresses
    assert torch.equal(first, kept)


def test_inputs_may_lie_in_any_way():
    network = Watched()
    x_t, context = inputs(3)
    expected = network(x_t, 3, context)
    unet = GraphedUNet(network, Recorder())
    assert torch.equal(unet(x_t.to(memory_format=torch.channels_last), 3, context), expected)
    x_t, context = inputs(1)
    assert torch.equal(unet(x_t.expand(3, -1, -1, -1), 3, context.expand(3, -1, -1))[2:], network(x_t, 3, context))


def test_recorded_in_inference_mode_and_used_outside_of_it():
    network = Watched()
    unet = GraphedUNet(network, Recorder())
    with torch.inference_mode():
        unet(*args(2))
    call = args(2, seed=1)
    assert torch.equal(unet(*call), network(*call))
    with torch.inference_mode():
        assert torch.equal(unet(*call), network(*call))


def test_a_run_under_guidance_is_the_plain_one():
    network, prompt, empty = small("unet"), *inputs(2, seed=3)[1][:, None]
    x_T = inputs(3, seed=4)[0]
    graphed = GraphedUNet(network, Recorder())
    runs = []
    for unet in (network, graphed):
        eps_fn = guided(unet, constant(prompt, 3), 7.5, empty, max_batch=4)  # batches of 4 and of 2 rows
        *_, last = ddim(eps_fn, x_T, Schedule.sd15(), 3)
        runs.append(last.x_prev)
    assert torch.equal(*runs)
    assert graphed.used


def test_a_traversal_goes_through_the_graphs():
    sd = ldm.load(PHANTOM_WEIGHTS, device="cpu")
    plan = Traversal(neutral="a", styles={"b": "b"}, seeds=(0,), steps=2, swap_steps=(1,), guidance=2)
    tree = prompt_tree(sd, plan)
    sd = replace(sd, max_batch=4)
    plain = sample(sd, plan, tree, [0]).latents
    sd.unet.forward = graphed = GraphedUNet(sd.unet, Recorder())
    replayed = sample(sd, plan, tree, [0]).latents
    assert graphed.used
    for name, latents in plain.items():
        # A number of its own for each row's time: the last bits of float32 over two steps.
        torch.testing.assert_close(replayed[name], latents, rtol=1e-5, atol=1e-5)


# ---- when the network itself is called -------------------------------------------------------------


def test_without_cuda_it_says_so_once(caplog):
    network = Watched()
    unet = GraphedUNet(network)
    for _ in range(2):
        assert torch.equal(unet(*args(2)), network(*args(2)))
    assert lines(caplog) == [
        "CUDA graphs: there are none on cpu, expected a CUDA GPU; the plain network goes on",
    ]
    assert not unet.used


def test_with_gradients_the_network_is_differentiated(caplog):
    unet = GraphedUNet(Watched(), Recorder())
    for _ in range(2):
        with torch.enable_grad():
            assert unet(*args(2)).requires_grad
    assert not unet.used
    unet(*args(2))  # without them, a replay
    assert unet.used
    assert lines(caplog) == ["CUDA graphs: gradients are on; the plain network goes on"]


def test_under_autocast_the_network_is_called(caplog):
    unet = GraphedUNet(Watched(), Recorder())
    with torch.autocast("cpu", torch.bfloat16):
        unet(*args(2))
    assert not unet.used
    assert lines(caplog) == ["CUDA graphs: autocast is on; the plain network goes on"]


def test_taps_are_seen_and_edits_act_while_they_are_open(caplog):
    network, call = copy.deepcopy(small("unet")), args(2)
    with probe.edit(network, {"mid_block": zero()}):
        expected = network(*call)
    network.forward = graphed = GraphedUNet(network, Recorder())
    plain = network(*call)
    assert graphed.used
    with probe.capture(network, "mid_block", "*.attn2.probabilities") as seen:
        assert torch.equal(network(*call), plain)
    assert len(seen.timesteps) == len(seen.runs["mid_block"]) == 1
    with probe.edit(network, {"mid_block": zero()}):
        assert torch.equal(network(*call), expected)
    assert not torch.allclose(expected, plain)
    assert torch.equal(network(*call), plain)
    assert lines(caplog) == []


def test_a_copy_of_the_network_records_its_own():
    network, call = copy.deepcopy(small("unet")), args(2)
    fast.install(network, cuda_graph=True)
    network.forward._capture = Recorder()
    before = network(*call)
    twin = copy.deepcopy(network)
    twin.conv_out.weight.mul_(2)
    twin.forward._capture = Recorder()
    assert not fast.installed(twin).cuda_graph_used
    assert not torch.equal(twin(*call), before)
    assert fast.installed(twin).cuda_graph_used
    assert torch.equal(network(*call), before)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory.\nmore"), RuntimeError("unsupported")])
def test_a_recording_that_fails_is_tried_once(error, caplog):
    tried = []

    def capture(work):
        tried.append(work)
        try:
            raise error
        finally:
            raise RuntimeError("the recording could not be ended")  # as torch.cuda.graph does

    network = Watched()
    unet = GraphedUNet(network, capture)
    for rows in (2, 2, 3):
        assert torch.equal(unet(*args(rows)), network(*args(rows)))
    assert len(tried) == 1
    first = str(error).split("\n")[0]
    assert lines(caplog) == [f"CUDA graphs: no recording: {first}; the plain network goes on"]
    assert not unet.used


def test_a_recording_that_fails_later_gives_its_graphs_back(caplog):
    recorder = Recorder()

    def capture(work):
        if recorder.recordings == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return recorder(work)

    unet = GraphedUNet(Watched(), capture)
    for rows in (1, 2, 3, 1):
        unet(*args(rows))
    assert unet.used
    assert len(unet._graphs) == 0
    assert len(lines(caplog)) == 1


@pytest.mark.parametrize("wrong", [1.1, 0.0, float("nan")])
def test_a_recording_that_computes_something_else_is_not_used(wrong, caplog):
    def capture(work):
        before = work()
        result = before.clone()
        return lambda: result.copy_(wrong * work()), result, before

    network = Watched()
    unet = GraphedUNet(network, capture)
    for _ in range(2):
        assert torch.equal(unet(*args(2)), network(*args(2)))
    (line,) = lines(caplog)
    assert "away from what it replays" in line


@pytest.mark.parametrize(
    ("x_t", "t", "context", "words"),
    [
        (torch.zeros(2, 4, 8, 8), 1, torch.zeros(3, 77, 64), "context: shape"),
        (torch.zeros(4, 16, 16), 1, torch.zeros(4, 77, 64), "x_t: shape"),
        (torch.zeros(2, 4, 16, 16), 1, torch.zeros(2, 77, 65), "context: shape"),
        (torch.zeros(17, 4, 8, 7), 1, torch.zeros(17, 77, 64), "x_t: 8 x 7"),
        (torch.zeros(2, 4, 16, 16), torch.zeros(3), torch.zeros(2, 77, 64), r"t: shape \(3,\)"),
        (torch.zeros(()), 1, torch.zeros(2, 77, 64), "x_t: shape"),
    ],
)
def test_bad_input_is_refused_in_the_networks_words_and_ends_nothing(x_t, t, context, words, caplog):
    unet = GraphedUNet(small("unet"), Recorder())
    with pytest.raises(ValueError, match=words):
        unet(x_t, t, context)
    unet(*args(2))
    assert unet.used
    assert lines(caplog) == []


# ---- weights that change ---------------------------------------------------------------------------


def test_weights_changed_in_place_are_read():
    network, recorder = copy.deepcopy(small("unet")), Recorder()
    unet = GraphedUNet(network, recorder)
    before = unet(*args(2))
    network.conv_out.weight.mul_(2)
    assert torch.equal(unet(*args(2)), network(*args(2)))
    assert not torch.equal(unet(*args(2)), before)
    assert recorder.recordings == 1


def replace_parameter(network):
    network.conv_out.bias = nn.Parameter(1 + network.conv_out.bias)


def replace_module(network):
    network.down_blocks[0].resnets[0].norm1 = nn.Identity()  # which has no numbers


def load_by_assignment(network):
    network.load_state_dict({name: 1.1 * x for name, x in network.state_dict().items()}, assign=True)


@pytest.mark.parametrize("replace", [replace_data, replace_parameter, replace_module, load_by_assignment])
def test_weights_and_modules_that_were_replaced_are_noticed(replace):
    network, recorder = copy.deepcopy(small("unet")), Recorder()
    unet = GraphedUNet(network, recorder)
    before = unet(*args(2)), unet(*args(3))
    replace(network)
    assert torch.equal(unet(*args(2)), network(*args(2)))
    assert not torch.equal(unet(*args(2)), before[0])
    assert torch.equal(unet(*args(3)), network(*args(3)))
    assert recorder.recordings == 4
