"""Work shared by several processes, as torchrun or `ldm evaluate --processes` starts them; alone there is but one.

Every seed is measured by itself and written to its own file, so how many processes there are changes no number.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import ModuleType

from torch import distributed

PATIENCE = timedelta(hours=24)  # of a process that is done with its share, for the others


@contextmanager
def without_the_script() -> Iterator[None]:
    """Processes that are spawned here do not import the script that this one runs, which may call a command again.

    Python lets them import it, as what they are to do may be defined there; nothing of this package is.
    """
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


@dataclass(frozen=True)
class Worker:
    """One of the processes, each of which measures its share of the seeds."""

    rank: int = 0
    world: int = 1
    meet: Callable[[], object] = distributed.barrier  # RuntimeError, EOFError where one has ended

    @classmethod
    def join(cls) -> "Worker":
        """Meet the other processes that torchrun has started, if it has."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1:
            return cls()
        if not distributed.is_initialized():
            distributed.init_process_group("gloo", timeout=PATIENCE)
        return cls(distributed.get_rank(), world)

    @property
    def first(self) -> bool:
        """Whether this is the one that summarises and talks."""
        return self.rank == 0

    def share(self, seeds: Sequence[int]) -> list[int]:
        """This process' seeds: every world-th one."""
        return list(seeds[self.rank :: self.world])

    def wait(self) -> None:
        """Until every process is here. Raises ConnectionError where one has ended before."""
        if self.world == 1:
            return
        try:
            self.meet()
        except (RuntimeError, EOFError) as error:  # gloo's and a pipe's, where the other end was closed
            raise ConnectionError("another of the processes that share the seeds has ended") from error

    def leave(self) -> None:
        """Say goodbye to the others."""
        if distributed.is_initialized():
            distributed.destroy_process_group()
