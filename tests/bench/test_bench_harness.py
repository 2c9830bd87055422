"""The timing harness: who is timed when, what the numbers mean. No time itself is asserted."""

import pytest

from ldm.bench import harness
from ldm.bench.harness import environment, matmul_gflops, time_in_turn


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when told to."""
    now = [0.0]
    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])

    def work(seconds):
        def call():
            now[0] += next(seconds) if hasattr(seconds, "__next__") else seconds

        return call

    return work


def test_medians_quantiles_and_ratios_are_over_rounds_without_the_warm_up(clock):
    slow, fast = clock(iter([99.0, 2.0, 4.0, 6.0])), clock(iter([99.0, 1.0, 1.0, 2.0]))
    timings = time_in_turn({"slow": slow, "fast": fast}, rounds=3, warmup=1)
    assert timings["slow"].median_ms == pytest.approx(4000)
    assert timings["slow"].p20_ms == pytest.approx(2800)  # between 2 and 4 s, 0.4 of the way
    assert timings["slow"].p80_ms == pytest.approx(5200)
    assert timings["slow"].ratio == 1
    assert timings["fast"].ratio == pytest.approx(3)  # rounds: 2/1, 4/1, 6/2
    assert timings["fast"].rounds == 3


def test_candidates_take_turns_so_that_a_busy_machine_hits_all_alike():
    order = []
    time_in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2, warmup=1)
    assert order == ["a", "b"] * 3


def test_what_is_wrong_is_not_timed():
    def wrong():
        raise ValueError("the candidates disagree")

    timed = []
    with pytest.raises(ValueError, match="disagree"):
        time_in_turn({"a": lambda: timed.append(1)}, check=wrong)
    assert timed == []


@pytest.mark.parametrize(("candidates", "rounds"), [({}, 1), ({"a": int}, 0)])
def test_nothing_to_time_is_an_error(candidates, rounds):
    with pytest.raises(ValueError, match="expected some"):
        time_in_turn(candidates, rounds)


def test_the_rate_of_a_matrix_product_counts_two_operations_an_entry(clock, monkeypatch):
    monkeypatch.setattr(harness, "time_in_turn", lambda *_, **__: {"matmul": harness.Timing(1.0, 1.0, 1.0, 1.0, 1)})
    assert matmul_gflops(size=100) == pytest.approx(2.0)  # 2e6 operations in a millisecond


def test_the_environment_names_what_a_timing_depends_on():
    assert {"device", "cpu", "threads", "torch", "revision"} <= environment().keys()
