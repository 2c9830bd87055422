"""Rows side by side give what they give together, and where that could not be told apart, they go together."""

import copy
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from networks import small
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from ldm import fast, probe
from ldm.fast import side_by_side
from ldm.finite import NotFinite, blame

ROWS = 2 * side_by_side.FEWEST_ROWS + 1
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32 in other orders of summation


@pytest.fixture(autouse=True)
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


@pytest.fixture
def seen(monkeypatch):
    """The threads that rows went through the network's first layer on."""
    threads = []
    inside = nn.Conv2d.forward

    def spying(self, x):
        threads.append((threading.current_thread().name, len(x)))
        return inside(self, x)

    monkeypatch.setattr(nn.Conv2d, "forward", spying)
    return threads


def unet():
    network = copy.deepcopy(small("unet")).requires_grad_(True)
    fast.install(network, kernels="torch")
    return network


def call(rows=ROWS, seed=0):
    config = small("unet").config
    generator = torch.Generator().manual_seed(seed)
    x_t = torch.randn(rows, config.latent_channels, 8, 8, generator=generator)
    return x_t, torch.linspace(0, 999, rows), torch.randn(rows, 5, config.context_width, generator=generator)


def side_by_side_rows(seen):
    return sorted({rows for name, rows in seen if name.startswith("ldm-rows")})


@pytest.mark.parametrize("timed", ["a number", "one tensor", "a tensor a row"])
def test_as_together_and_each_row_on_one_thread(seen, timed):
    x_t, times, context = call()
    t = {"a number": 500.0, "one tensor": torch.tensor(500.0), "a tensor a row": times}[timed]
    network = unet()
    torch.testing.assert_close(network(x_t, t, context), type(network).forward(network, x_t, t, context), **CLOSE)
    assert side_by_side_rows(seen) == [ROWS // 2, ROWS // 2 + 1]


def test_rows_keep_their_order_when_there_are_more_parts_than_two(seen):
    torch.set_num_threads(3)
    x_t, times, context = call(3 * side_by_side.FEWEST_ROWS)
    network = unet()
    torch.testing.assert_close(
        network(x_t, times, context), type(network).forward(network, x_t, times, context), **CLOSE
    )
    assert side_by_side_rows(seen) == [side_by_side.FEWEST_ROWS]


def test_the_report_says_so_and_undo_takes_it_out(seen):
    network = unet()
    assert "UNet: rows of a large batch on threads of their own" in str(network.installed)
    network.installed.undo()
    network(*call())
    assert not side_by_side_rows(seen)


def test_a_copy_has_weights_of_its_own(seen):
    network = unet()
    twin = copy.deepcopy(network)
    nn.init.zeros_(network.conv_out.weight)
    nn.init.zeros_(network.conv_out.bias)
    assert network(*call()).eq(0).all()
    assert twin(*call()).ne(0).any()
    assert side_by_side_rows(seen)


def with_gradients(network):
    with torch.enable_grad():
        network(*call()).sum().backward()


def with_autocast(network):
    with torch.autocast("cpu", torch.bfloat16):
        network(*call())


def watched_from_outside(network):
    with probe.capture(network, "mid_block"):
        network(*call())


def counting_operations(network):
    with FlopCounterMode(display=False) as counter:
        network(*call())
    assert counter.get_total_flops()


def intercepted(network):
    class Mode(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    with Mode():
        network(*call())


def with_a_part_of_somebody_elses(network):
    class Own(nn.Conv2d):
        pass

    own = Own(network.conv_out.in_channels, network.conv_out.out_channels, 3, padding=1)
    network.conv_out = own
    network(*call())


def with_a_forward_of_somebody_elses(network):
    network.mid_block.forward = type(network.mid_block).forward.__get__(network.mid_block)
    network(*call())


def of_a_class_of_somebody_elses(network):
    class Own(type(network)):
        pass

    network.__class__ = Own
    network(*call())


def watched_as_every_module_is(network):
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    network(*call())
    handle.remove()


def profiled(network):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        network(*call())
    assert "aten::conv2d" in {event.key for event in profile.key_averages()}


def in_training(network):
    network.train()(*call())


def with_few_rows(network):
    network(*call(ROWS - 2))


def on_one_thread(network):
    torch.set_num_threads(1)
    network(*call())


def on_more_threads_than_the_rows_fill(network):
    torch.set_num_threads(3)
    network(*call())


@pytest.mark.parametrize(
    "way",
    [
        with_gradients,
        with_autocast,
        watched_from_outside,
        counting_operations,
        intercepted,
        with_a_part_of_somebody_elses,
        with_a_forward_of_somebody_elses,
        in_training,
        with_few_rows,
        on_one_thread,
        on_more_threads_than_the_rows_fill,
        of_a_class_of_somebody_elses,
        watched_as_every_module_is,
        profiled,
    ],
)
def test_together_where_threads_could_be_told_apart(seen, way):
    way(unet())
    assert seen
    assert not side_by_side_rows(seen)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_records_what_is_computed():
    network = unet().requires_grad_(False)
    traced = torch.jit.trace(lambda *inputs: network(*inputs), call(), check_trace=False)
    torch.testing.assert_close(traced(*call(seed=1)), network(*call(seed=1)), **CLOSE)


def test_compilers_read_the_plain_network():
    plain, network = small("unet"), copy.deepcopy(small("unet"))
    fast.install(network)
    x_t, t, context = call(2)
    expected = plain(x_t, t, context)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x_t, t, context), expected)
    exported = torch.export.export(network, (x_t, t, context), strict=False)
    assert torch.equal(exported.module()(x_t, t, context), expected)


def test_as_together_in_inference_mode(seen):
    network = unet()
    with torch.inference_mode():
        torch.testing.assert_close(network(*call()), type(network).forward(network, *call()), **CLOSE)
    assert side_by_side_rows(seen)


def test_gradients_come_to_the_weights():
    network = unet()
    with_gradients(network)
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("wrong", ["context", "t", "x_t"])
def test_what_does_not_go_together_is_said_of_the_whole_batch(wrong):
    x_t, times, context = call()
    inputs = {"x_t": x_t, "t": times, "context": context} | {
        wrong: {"x_t": x_t, "t": times, "context": context}[wrong][1:]
    }
    with pytest.raises(ValueError, match=f"{ROWS - 1}|{ROWS}"):
        unet()(*inputs.values())


def test_what_a_thread_raises_comes_to_the_caller(monkeypatch):
    network = unet()

    def failing(self, x):
        raise blame("U-Net", network)

    monkeypatch.setattr(nn.Conv2d, "forward", failing)
    with pytest.raises(NotFinite):
        network(*call())


def test_the_callers_threads_stay_as_they_were():
    network = unet()
    network(*call())
    assert torch.get_num_threads() == 2
    counted = []
    later = threading.Thread(target=lambda: counted.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert counted == [2]


def test_callers_that_are_the_first_at_once_share_one_pool(monkeypatch):
    made, pools, ready = [], [], threading.Barrier(4)

    class Slow(ThreadPoolExecutor):
        def __init__(self, *args):
            made.append(self)
            time.sleep(0.05)  # so that all ask while the first is being made
            super().__init__(*args)

    def first_call():
        ready.wait()
        pools.append(side_by_side._pool(5))  # 5: nobody else asked for so many

    monkeypatch.setattr(side_by_side, "ThreadPoolExecutor", Slow)
    callers = [threading.Thread(target=first_call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert len(made) == 1
    assert pools == 4 * made


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of a fork beside threads, which this is about
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_fork_while_another_thread_starts_a_pool_is_not_held_up():
    with side_by_side._STARTING.setdefault(os.getpid(), threading.Lock()):
        child = os.fork()
        if not child:
            signal.alarm(20)
            with side_by_side._STARTING.setdefault(os.getpid(), threading.Lock()):
                os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
