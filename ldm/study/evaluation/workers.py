"""Work shared by several processes, as torchrun or `ldm evaluate --processes` starts them; alone there is but one.

Every seed is measured by itself and written to its own file, so how many processes there are changes no number.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

from torch import distributed

PATIENCE = timedelta(hours=24)  # of a process that is done with its share, for the others


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
