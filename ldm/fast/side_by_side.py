"""On a CPU, some rows of a U-Net's batch on each thread, from its first layer to its last.

torch lets all threads share every operation instead, and wait for each other after each, hundreds of times a call. That
costs where operations are short, and several times as much where other programs use the cores, too: whoever is held up
holds up all. Rows know nothing of each other, so they may as well go by themselves; results agree to the last bits.

Letters: B rows of a batch.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier, Lock

import torch
from torch import Tensor

from ldm.fast.watching import intercepted, known, ordinary
from ldm.unet import UNet

FEWEST_ROWS = 8  # a thread; with fewer, threads wait for Python instead


class SideBySide:
    """A U-Net's forward, its rows side by side; the plain one where that could be seen or would change something:

    - fewer rows than fill every thread, one thread, another device, training, gradients, autocast;
    - a part is watched, edited, replaced (ldm/probe, surgery) or somebody else's, as a subclass of the U-Net is;
    - torch compiles, traces or profiles, or operations are intercepted.
    """

    def __init__(self, network: UNet) -> None:
        self.network = network

    def __call__(self, x_t: Tensor, t: float | Tensor, context: Tensor) -> Tensor:
        """eps (B, C, H, W), see `ldm.unet.UNet.forward`, which also says what it raises."""
        if intercepted():  # first: a compiler cannot read what follows
            return self._plain(x_t, t, context)
        threads, parts = torch.get_num_threads(), _parts(x_t, t, context)
        if parts < 2 or not self._ordinary():
            return self._plain(x_t, t, context)
        times = torch.as_tensor(t).expand(len(x_t))
        split = (y.tensor_split(parts) for y in (x_t, times, context))
        return torch.cat(list(_pool(threads).map(self._alone, *split)))

    @torch.no_grad()  # a thread does not begin with what holds for its caller
    def _alone(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return self._plain(x_t, t, context)

    def _plain(self, x_t: Tensor, t: float | Tensor, context: Tensor) -> Tensor:
        return type(self.network).forward(self.network, x_t, t, context)

    def _ordinary(self) -> bool:
        """Whether all that is inside computes the same from one thread as from another."""
        inside = [module for module in self.network.modules() if module is not self.network]
        return not self.network.training and known(self.network) and all(map(ordinary, inside))


def _parts(x_t: Tensor, t: float | Tensor, context: Tensor) -> int:
    """Into how many the rows go; 1 too where the arguments do not go together, which the network says better."""
    rows = len(x_t) if x_t.ndim else 0
    each = [y for y in (t, context) if isinstance(y, Tensor) and y.ndim]
    if x_t.device.type != "cpu" or any(len(y) != rows for y in each) or getattr(t, "ndim", 0) > 1:
        return 1
    threads = torch.get_num_threads()
    return threads if rows >= threads * FEWEST_ROWS else 1  # on fewer parts, cores would stand idle


def _pool(threads: int) -> ThreadPoolExecutor:
    """This process's threads, however many callers ask at once for the first time."""
    process = os.getpid()
    with _STARTING.setdefault(process, Lock()):
        return _started(process, threads)


_STARTING: dict[int, Lock] = {}  # process -> a lock of its own: a fork copies its parent's, and some thread may hold it


@cache
def _started(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads of one process that compute by themselves; a forked process has none of its parent's."""
    started = Barrier(threads + 1)

    def begin() -> None:
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(threads, "ldm-rows", begin)
    for _ in range(threads):
        pool.submit(_nothing)
    started.wait()
    torch.set_num_threads(threads)  # what a thread sets for itself, threads that come later would begin with
    return pool


def _nothing() -> None:
    """So that a pool starts its threads."""
