"""Processes beside this one: how one that fails is told, and who goes on."""

import multiprocessing

import pytest
from ldm_tools import processes


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
