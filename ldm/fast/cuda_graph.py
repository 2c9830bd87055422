"""The U-Net as CUDA graphs: one launch a step, where a thousand kernels one by one keep a fast GPU waiting for Python.

    installed = fast.install(sd.unet, cuda_graph=True)
    eps = sd.unet(x_t, t, context)
    installed.cuda_graph_used                        # where it cannot be, the log says why

A graph is a recording of kernels and of the memory that they read and write. So there is one for each shape, with
buffers of its own that never move: inputs are copied in, the graph is replayed, the rows asked for are copied out.

One thread and one CUDA stream at a time: all graphs work in the same memory. They keep to what torch's own switches
(TF32, deterministic algorithms, which attention) said when they were recorded. What is here has been run without CUDA
only, the recording replaced by a stand-in; tests/fast/test_recording.py has what is to be run on a GPU.

Letters: B rows of a call, R >= B rows of its graph, C channels, H W height and width, L tokens, D their width.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

MOST_GRAPHS = 32  # kept, those used last: three times as many as a prompt tree has sizes

Capture = Callable[[Callable[[], Any]], tuple[Callable[[], object], Any, Any]]
"""replay, result, before = capture(work): replay() does the work again, in the same memory, and `result` then holds
what it gives; `before` is what it gave when it ran as it is, ahead of the recording."""


def bucket(rows: int) -> int:
    """The rows of the graph that takes a call: every number up to 16, beyond that eight sizes to an octave.

    A prompt tree's batch grows at every fork, so it meets some ten sizes however they are rounded, and each graph then
    serves every seed: coarse sizes would save a few recordings and cost rows in every step. Here less than an eighth
    is padding; nothing up to 16 rows, and nothing for a style with nine forks under guidance (2, 4 .. 20 rows).
    It depends on the rows alone, so the same call is always the same batch, and gives the same bits.
    """
    grain = 1 << max(0, (rows - 1).bit_length() - 4)
    return -(-rows // grain) * grain


class CudaCapture:
    """`Capture` by `torch.cuda.CUDAGraph` on the current device, everything that it records in one pool of memory."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Any]) -> tuple[Callable[[], object], Any, Any]:
        """See `Capture`. Raises RuntimeError where memory runs out, or the work does what cannot be recorded."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):  # around the recording too: a failed one would leave its stream current
            before = work()  # compiles, loads and chooses whatever a first run does, which a recording may not
            graph = torch.cuda.CUDAGraph()
            # thread_local: what other threads do, such as the watchdog of a process group, does not spoil it.
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                result = work()
        torch.cuda.current_stream().wait_stream(self.stream)
        return graph.replay, result, before


@dataclass(frozen=True, eq=False)
class Graph:
    """One recording, and the memory that it reads and writes."""

    inputs: tuple[Tensor, Tensor, Tensor]  # x_t (R, C, H, W), t (R,) float32, context (R, L, D)
    eps: Tensor  # (R, C, H, W)
    replay: Callable[[], object]


class GraphedUNet:
    """A U-Net's forward that replays its CUDA graphs where it can, and is the forward it replaces where it cannot:

    - while something watches or edits its activations (ldm/probe), gradients are on, or autocast is;
    - for good, where there is no CUDA, or a recording fails or computes something else than the network.

    Each reason is logged once, taps are not. Weights changed in place are read where they lie; where they were
    replaced, or modules were, everything is recorded anew.

    Args:    network: eps = network(x_t, t, context).  capture: how to record; None: by CUDA, where x_t is there.
    Raises:  when called, whatever the network raises.
    """

    def __init__(self, network: nn.Module, capture: Capture | None = None) -> None:
        self.network = network
        self.plain = network.forward  # below the network's own hooks, which have run when this is called
        self.used = False  # has any call been a replay?
        self._capture = capture
        self._off = False
        self._said: set[str] = set()
        self._memory: tuple[int, ...] = ()
        self._graphs: dict[tuple[object, ...], Graph] = {}  # those used last come last

    def __call__(self, x_t: Tensor, t: float | Tensor, context: Tensor) -> Tensor:
        """eps (B, C, H, W); raises whatever the network raises."""
        if self._off or not _fits(x_t, t, context) or self._prevented(x_t.device):
            return self.plain(x_t, t, context)
        try:
            # In inference mode, buffers would be such that no later call outside of it could write them.
            with torch.cuda.device_of(x_t), torch.inference_mode(False), torch.no_grad():
                return self._replay(x_t, t, context)
        except (RuntimeError, ValueError) as error:
            failed = str(error.__context__ or error).strip().split("\n")[0]  # a failed end hides what made it fail
        self._graphs.clear()  # their memory may be what was missing
        eps = self.plain(x_t, t, context)  # where the input itself is wrong, this raises
        self._off = True
        self._say(f"no recording: {failed}")
        return eps

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphedUNet:
        """A copied network's, with nothing recorded: a graph reads the weights of the network it was made from."""
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        GraphedUNet.__init__(twin, copy.deepcopy(self.network, memo))
        twin.plain = copy.deepcopy(self.plain, memo)
        return twin

    def _prevented(self, device: torch.device) -> bool:
        """Whether something speaks against a replay now; says what."""
        if self._capture is None and device.type != "cuda":
            self._off = True
            self._say(f"there are none on {device}, expected a CUDA GPU")
        elif torch.is_grad_enabled():
            self._say("gradients are on")
        elif torch.is_autocast_enabled(device.type):
            self._say("autocast is on")
        else:
            return self._watched()
        return True

    def _watched(self) -> bool:
        """Whether taps are open. Forgets the graphs when weights lie elsewhere than they read them.

        Looks at every module: 0.7 ms of the CPU for SD1.5, while the GPU is still at the step before.
        """
        memory = []
        for module in self.network.modules():
            if module._forward_hooks or module._forward_pre_hooks:
                return True
            memory.append(id(module))
            for tensors in (module._parameters, module._buffers):
                memory += [tensor.data_ptr() for tensor in tensors.values() if tensor is not None]
        if tuple(memory) != self._memory:
            self._graphs.clear()
            self._memory = tuple(memory)
        return False

    def _replay(self, x_t: Tensor, t: float | Tensor, context: Tensor) -> Tensor:
        rows, dtypes = bucket(len(x_t)), (x_t.dtype, context.dtype)
        key = (rows, x_t.shape[1:], context.shape[1:], *dtypes, x_t.device)
        graph = self._graphs.pop(key, None) or self._record(rows, x_t, t, context)
        self._graphs[key] = graph
        if len(self._graphs) > MOST_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        _fill(graph.inputs, x_t, t, context)
        graph.replay()
        self.used = True
        return graph.eps[: len(x_t)].clone()

    def _record(self, rows: int, x_t: Tensor, t: float | Tensor, context: Tensor) -> Graph:
        """Raises RuntimeError when it cannot be recorded, or when the recording computes something else."""
        self._capture = self._capture or CudaCapture()
        inputs = (
            x_t.new_empty(rows, *x_t.shape[1:]),
            x_t.new_empty(rows, dtype=torch.float32),
            context.new_empty(rows, *context.shape[1:]),
        )
        _fill(inputs, x_t, t, context)
        replay, eps, before = self._capture(lambda: self.plain(*inputs))
        replay()
        difference, size = (torch.linalg.vector_norm(x, dtype=torch.float32) for x in (eps - before, before))
        if not difference <= size * torch.finfo(eps.dtype).eps ** 0.5:  # far above a rounding
            raise RuntimeError(f"a replay is {float(difference / size):.1e} away from what it replays")
        return Graph(inputs, eps, replay)

    def _say(self, why: str) -> None:
        if why not in self._said:
            self._said.add(why)
            logger.warning("CUDA graphs: %s; the plain network goes on", why)


def _fits(x_t: Tensor, t: float | Tensor, context: Tensor) -> bool:
    """Whether the arguments go together; where they do not, the network says so in its own words."""
    t_fits = not isinstance(t, Tensor) or t.shape in ((), x_t.shape[:1])
    shaped = (x_t.ndim, context.ndim) == (4, 3) and t_fits
    return shaped and len(x_t) == len(context) > 0 and x_t.device == context.device


def _fill(buffers: tuple[Tensor, Tensor, Tensor], x_t: Tensor, t: float | Tensor, context: Tensor) -> None:
    """Copy a call into longer buffers; the rows beyond repeat its last one, in which nothing overflows."""
    rows = len(x_t)
    t = t if isinstance(t, Tensor) else x_t.new_full((), t, dtype=torch.float32)  # there: a copy from here would wait
    for buffer, given in zip(buffers, (x_t, t.expand(rows), context), strict=True):
        buffer[:rows].copy_(given)
        buffer[rows:].copy_(given[-1:].expand_as(buffer[rows:]))
