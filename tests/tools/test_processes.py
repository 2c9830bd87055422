"""Processes beside this one: how one that fails is told, and who goes on."""

import multiprocessing
import os
import signal
import subprocess
import sys
from functools import partial
from threading import Thread

import pytest
from ldm_tools import processes

from ldm.study.evaluation.workers import Worker


def test_what_a_failed_process_said_is_the_error():
    words = ["evaluate", "--predictions", "nowhere.csv"]
    told = "process 2 of 2 has failed: ldm evaluate: .*nowhere.csv.*; run it again to go on"
    with pytest.raises(ValueError, match=told), processes.beside(words, 2):
        processes.worker().wait()
    assert not processes.are_shared()


def test_a_failure_behind_the_last_meeting_is_told_too():
    with pytest.raises(ValueError, match="process 2 of 2 has failed"), processes.beside(["nothing-like-it"], 2):
        pass


def test_one_that_was_killed_is_told_by_its_signal():
    def lose_the_other() -> None:
        (other,) = multiprocessing.active_children()
        other.kill()
        processes.worker().wait()

    told = "process 2 of 2 has failed: stopped by signal 9"
    with pytest.raises(ValueError, match=told), processes.beside(["doctor"], 2):
        lose_the_other()


def test_one_that_ends_while_it_waits_for_the_rest_is_noticed():
    """A lock that a killed process has shared may never be free again; a pipe ends with it."""
    (ours, theirs), (slow, _) = multiprocessing.Pipe(), multiprocessing.Pipe()
    theirs.send_bytes(b"here")
    theirs.close()
    with pytest.raises(ConnectionError, match="has ended"):
        Worker(0, 3, partial(processes._gather, [ours, slow])).wait()


def test_nobody_goes_on_before_all_have_come():
    lines = [multiprocessing.Pipe() for _ in range(2)]
    gone = []
    first = Thread(target=lambda: (processes._gather([ours for ours, _ in lines]), gone.append(0)))
    first.start()
    lines[0][1].send_bytes(b"here")
    first.join(0.05)
    assert not gone
    assert not lines[0][1].poll()
    lines[1][1].send_bytes(b"here")
    first.join(10)
    assert gone == [0]
    assert all(theirs.poll() for _, theirs in lines)


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="no signals that a process can be started without")
def test_the_others_leave_an_interrupt_to_the_first():
    """Ctrl-C goes to all of them, and one line is enough."""

    def interrupt_the_other() -> None:
        (other,) = multiprocessing.active_children()
        os.kill(other.pid, signal.SIGINT)

    words = ["evaluate", "--predictions", "nowhere.csv"]
    told = "failed: ldm evaluate: .*nowhere.csv.*; run it again"
    with pytest.raises(ValueError, match=told), processes.beside(words, 2):
        interrupt_the_other()
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_an_own_error_ends_the_others():
    def fail() -> None:
        assert processes.are_shared()
        assert processes.worker().first
        raise KeyError("ours")

    with pytest.raises(KeyError), processes.beside(["doctor"], 2):
        fail()


def test_one_process_starts_none():
    with processes.beside(["evaluate"], 1):
        assert not processes.are_shared()
        assert processes.worker().world == 1


UNGUARDED = {
    "evaluate": "from ldm_tools import processes\nwith processes.beside(['evaluate', '--help'], 2):\n    pass\n",
    "doctor": "from ldm_tools.cli import main\nmain(['doctor', '--device', 'cpu'])\n",
}


@pytest.mark.parametrize("starts", UNGUARDED)
def test_a_script_is_not_run_again_by_what_it_starts(starts, tmp_path):
    """Not even without `if __name__ == "__main__"`."""
    script = tmp_path / "script.py"
    script.write_text(f"print('the script', flush=True)\n{UNGUARDED[starts]}print('its end')\n")
    ran = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines().count("the script") == 1
    assert ran.stdout.splitlines()[-1] == "its end"
    assert "BROKEN" not in ran.stdout + ran.stderr
