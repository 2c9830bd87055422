"""More processes of this machine for one command, which share its seeds with it as torchrun's would.

This process is the first and talks; what another says is shown where that one has failed.
"""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing import connection, get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import RLock, Thread

from tqdm import tqdm

from ldm.study.evaluation.workers import Worker, without_the_script

_here: Worker | None = None  # which of the processes this is, where `beside` has started others


def worker() -> Worker:
    """This process, among those that `beside` or torchrun has started."""
    return _here or Worker.join()


def are_shared() -> bool:
    """Whether this process is already one of several."""
    return _here is not None or int(os.environ.get("WORLD_SIZE", "1")) > 1


def of_this_machine() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def beside(words: Sequence[str], processes: int) -> Iterator[None]:
    """Run `ldm WORDS` in `processes` - 1 others beside what this one does.

    Raises:  ValueError: one of the others has failed, with the last line that it said.
    """
    global _here
    if processes == 1:
        yield
        return
    context = get_context("spawn")  # a forked process would inherit torch's threads half alive
    lines = [context.Pipe() for _ in range(1, processes)]
    with TemporaryDirectory() as folder:
        said = [Path(folder) / f"{rank}.txt" for rank in range(1, processes)]
        others: list[BaseProcess] = [
            context.Process(target=_be, args=(list(words), rank, processes, theirs, file), daemon=True)
            for rank, ((_, theirs), file) in enumerate(zip(lines, said, strict=True), start=1)
        ]
        _here = Worker(0, processes, partial(_gather, [ours for ours, _ in lines]))
        try:
            with _without_interrupts(), without_the_script():
                for other, (_, theirs) in zip(others, lines, strict=True):
                    other.start()
                    theirs.close()  # so that ours ends where that process does
            yield
            for other in others:
                other.join()
            _complain(others, said)
        except ConnectionError:  # this one waited in vain: why is what another has said
            _complain(others, said)
            raise
        finally:
            _here = None
            for other in others:
                if other.is_alive():
                    other.terminate()
                    other.join()
            for ours, _ in lines:
                ours.close()


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """What is started here hears no Ctrl-C, from its first import on: this process does, and ends the others."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # its start would let the signal through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _gather(others: Sequence[Connection]) -> None:
    """The first's meeting: all others come, then all go on. Raises EOFError, ConnectionError where one has ended."""
    come = set[Connection]()
    while len(come) < len(others):
        for other in {*others}.intersection(connection.wait(others)):  # those that came, too: they may end as they wait
            other.recv_bytes()
            come.add(other)
    for other in others:
        other.send_bytes(b"go on")


def _come(first: Connection) -> None:
    """Another's meeting. Raises EOFError, ConnectionError where the first has ended."""
    first.send_bytes(b"here")
    first.recv_bytes()


def _be(words: list[str], rank: int, processes: int, first: Connection, said: Path) -> None:
    """One of the others, from its start to its end."""
    global _here
    file = os.open(said, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    tqdm.set_lock(RLock())  # its own is a semaphore of the system's, which would outlive a process that is ended
    _here = Worker(rank, processes, partial(_come, first))
    Thread(target=_leave_with_the_first, daemon=True).start()
    from ldm_tools.cli import main  # which imports this

    raise SystemExit(main(words))


def _leave_with_the_first() -> None:
    """However that ends: nobody else would come to the next meeting."""
    first = parent_process()
    assert first is not None
    connection.wait([first.sentinel])
    os._exit(1)


def _complain(others: Sequence[BaseProcess], said: Sequence[Path]) -> None:
    """ValueError where one of the others has failed."""
    for sentinel in connection.wait([other.sentinel for other in others], timeout=5):
        next(other for other in others if other.sentinel == sentinel).join()  # its exit status comes a moment later
    for rank, (other, file) in enumerate(zip(others, said, strict=True), start=2):
        if other.exitcode:
            why = _why(other.exitcode, file)
            raise ValueError(f"process {rank} of {len(others) + 1} has failed: {why}; run it again to go on")


def _why(status: int, said: Path) -> str:
    """The last line of one that has failed, if it ended by itself."""
    if status < 0:
        return f"stopped by signal {-status} (9: often too little memory, --processes 1 takes less)"
    text = said.read_text(errors="replace") if said.exists() else ""
    lines = [line.strip() for line in text.replace("\r", "\n").split("\n") if line.strip()]
    return lines[-1] if lines else f"exit status {status}"
