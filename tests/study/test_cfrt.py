"""CFRT: each reading against hand-made seeds and against plain loops, and what must hold for any probabilities."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ldm.study.metrics import stats
from ldm.study.metrics.cfrt import READINGS, cfrt, successes

NAN = math.nan
EXAMPLES = settings(max_examples=40)


def probabilities(*shape):
    # Quarters are exact, so that a tie is a tie in any order of adding, and there are many.
    return arrays(np.float64, shape, elements=st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, NAN]))


# ---- by hand ---------------------------------------------------------------------------------------


def one(neutral, swapped, **named):
    """The report of attribute a, of classifiers a, b (and so on), from one seed at one or more swap steps."""
    heads = list("abcdef")[: len(neutral)]
    return cfrt([neutral], [[swapped]], heads, ["a"], **named)["a"]


@pytest.mark.parametrize(
    ("neutral", "swapped", "signed", "absolute", "strict"),
    [
        ((0.1, 0.1), (0.9, 0.2), 1, 1, 1),  # a rises, b hardly
        ((0.1, 0.2), (0.4, 0.6), 0, 0, 0),  # b rises more
        ((0.1, 0.9), (0.5, 0.3), 1, 0, 0),  # b falls more than a rises
        ((0.9, 0.1), (0.2, 0.2), 0, 1, 1),  # a falls: only without its sign the largest
        ((0.1, 0.4), (0.9, 0.6), 1, 1, 0),  # b crosses 1/2 upwards
        ((0.1, 0.6), (0.9, 0.4), 1, 1, 0),  # and downwards
        ((0.1, 0.4), (0.9, 0.5), 1, 1, 0),  # 1/2 itself counts as present
        ((0.4, 0.1), (0.6, 0.2), 1, 1, 1),  # the target may cross
    ],
)
def test_readings_of_one_seed(neutral, swapped, signed, absolute, strict):
    found = one(neutral, [swapped])["cfrt"]
    assert [found[name]["value"] for name in ("own_head_signed", "own_head_abs", "strict")] == [
        signed,
        absolute,
        strict,
    ]


def test_a_tie_fails_and_is_counted():
    found = one((0.5, 0.5), [(0.75, 0.75)])["cfrt"]
    for reading in ("own_head_signed", "own_head_abs", "strict"):
        assert (found[reading]["value"], found[reading]["n"], found[reading]["ties"]) == (0, 1, 1)


def test_a_tie_in_decimals_is_a_tie():
    # 0.5 - 0.3 and 0.3 - 0.1 differ by 6e-17 in binary.
    assert 0.5 - 0.3 != 0.3 - 0.1
    assert one((0.3, 0.1), [(0.5, 0.3)])["cfrt"]["own_head_signed"]["ties"] == 1


def test_a_tie_is_signed_or_not():
    found = one((0.25, 0.75), [(0.5, 0.5)])["cfrt"]  # +1/4 and -1/4
    assert (found["own_head_signed"]["value"], found["own_head_signed"]["ties"]) == (1, 0)
    assert (found["own_head_abs"]["value"], found["own_head_abs"]["ties"]) == (0, 1)


def test_the_mean_over_swap_steps_decides():
    # a: +.5, +0; b: +.1, +.3. At the second step b changes more, on the mean a.
    assert one((0.1, 0.1), [(0.6, 0.2), (0.1, 0.4)])["cfrt"]["own_head_signed"]["value"] == 1


def test_strict_looks_at_every_averaged_step():
    swapped = [(0.9, 0.1), (0.9, 0.6), (0.9, 0.1)]  # b is above 1/2 at the second only, below it on the mean
    assert one((0.1, 0.1), swapped)["cfrt"]["strict"]["value"] == 0
    assert one((0.1, 0.1), swapped, swap_steps=[5, 10, 15], averaged=[5, 15])["cfrt"]["strict"]["value"] == 1


@pytest.mark.parametrize(("classes", "strict"), [([1, 1], 1), ([1, 0], 0), ([0, 1], 0)])
def test_strict_wants_the_class_unchanged(classes, strict):
    swapped = [(0.9, 0.1), (0.9, 0.1)]
    found = one((0.1, 0.1), swapped, decision_neutral=[1], decision_swapped=[[classes]])
    assert found["cfrt"]["strict"]["value"] == strict
    assert found["cfrt"]["own_head_abs"]["value"] == 1
    assert found["decision"]["value"] == strict


def test_without_decisions_the_report_says_so():
    assert one((0.1, 0.1), [(0.9, 0.1)])["decision"] is None


def test_single_f_compares_prompts_by_one_classifier():
    neutral = [[0.1, 0.1], [0.1, 0.1], [0.1, 0.1]]
    swapped = np.array(
        [
            # swap to a    swap to b        classifiers a, b
            [[0.5, 0.9], [0.4, 0.9]],  # a's classifier rises most on a, though b's rises more
            [[0.5, 0.1], [0.6, 0.9]],  # a's classifier rises more on the swap to b
            [[0.5, 0.1], [0.5, 0.9]],  # as much
        ]
    )[:, :, None]
    found = cfrt(neutral, swapped, ["a", "b"], ["a", "b"])
    assert found["a"]["cfrt"]["single_f"]["value"] == pytest.approx(1 / 3)
    assert found["a"]["cfrt"]["single_f"]["ties"] == 1
    assert found["b"]["cfrt"]["single_f"]["ties"] == 1


def test_single_f_of_one_prompt_is_null():
    found = one((0.1, 0.1), [(0.9, 0.1)])["cfrt"]["single_f"]
    assert found == {"value": None, "n": 0, "interval": [None, None], "ties": 0, "dropped": 0, "chance": None}


def test_nan_drops_the_seed_where_it_is_used():
    neutral = np.full((4, 2), 0.1)
    swapped = np.tile([0.9, 0.2], (4, 2, 3, 1))  # 4 seeds, 2 attributes, 3 steps
    neutral[0, 1] = NAN
    swapped[1, 0, 0, 1] = NAN
    swapped[2, 0, 2, 0] = NAN  # at a step that is not averaged
    swapped[3, 1, 0, 0] = NAN  # on the other prompt: only single_f of a compares it
    found = cfrt(neutral, swapped, ["a", "b"], ["a", "b"], swap_steps=[5, 10, 15], averaged=[5, 10])["a"]
    for reading in ("own_head_signed", "own_head_abs", "strict"):
        assert [found["cfrt"][reading][key] for key in ("value", "n", "dropped")] == [1, 2, 2]
    assert [found["cfrt"]["single_f"][key] for key in ("n", "dropped")] == [3, 1]
    assert found["per_swap_step"]["own_head_signed"] == [1, 1, 1]
    assert found["target_change"]["n"] == 4  # a's own numbers are there at 5 and 10


def test_all_dropped_is_null():
    found = one((NAN, 0.1), [(0.9, 0.1)])
    assert [found["cfrt"]["strict"][key] for key in ("value", "n", "dropped", "interval")] == [None, 0, 1, [None, None]]
    assert found["flip_rate"] == {"value": None, "n": 0, "interval": [None, None], "already_present": 0}
    assert found["largest_off_target"] == {"attribute": None, "value": None}
    json.dumps(found, allow_nan=False)


def test_flip_rate_and_changes():
    neutral = [[0.1, 0.5, 0.3], [0.4, 0.5, 0.3], [0.6, 0.5, 0.3], [0.2, 0.5, 0.3]]
    swapped = np.array(
        [
            [[0.3, 0.6, 0.3], [0.7, 0.6, 0.3]],  # mean .5: flips
            [[0.4, 0.4, 0.3], [0.4, 0.4, 0.3]],
            [[0.9, 0.6, 0.3], [0.9, 0.6, 0.3]],  # was there already
            [[0.9, 0.4, 0.3], [0.9, 0.4, 0.3]],
        ]
    )[:, None]
    found = cfrt(neutral, swapped, ["a", "b", "c"], ["a"])["a"]
    assert found["flip_rate"] == {**stats.share([1, 0, 0, 1]), "already_present": 1}
    assert found["target_change"]["value"] == pytest.approx((0.4 + 0 + 0.3 + 0.7) / 4)
    # b moves by +.1, -.1, +.1, -.1: signs would cancel.
    assert found["largest_off_target"] == {"attribute": "b", "value": pytest.approx(0.1)}
    curves = found["per_swap_step"]
    assert curves["flip_rate"] == [0.25, 0.5]
    assert curves["target_change"] == pytest.approx([(0.2 + 0 + 0.3 + 0.7) / 4, (0.6 + 0 + 0.3 + 0.7) / 4])
    assert curves["off_target"] == pytest.approx([0.1, 0.1])
    assert curves["swap_steps"] == [0, 1]


def test_chance_is_that_of_the_largest_of_those_compared():
    rng = np.random.default_rng(0)
    found = cfrt(rng.random((4000, 4)), rng.random((4000, 2, 1, 4)), list("abcd"), ["a", "b"])["a"]["cfrt"]
    assert [found[reading]["chance"] for reading in READINGS] == [1 / 4, 1 / 4, 1 / 2, 1 / 4]
    for reading in ("own_head_signed", "own_head_abs", "single_f"):
        # Three standard errors of a share of 4,000.
        assert found[reading]["value"] == pytest.approx(found[reading]["chance"], abs=3 * 0.5 / math.sqrt(4000))


def test_interpolated_frames_are_scored_alike():
    rng = np.random.default_rng(1)
    neutral, frames = rng.random((20, 3)), rng.random((20, 1, 50, 3))
    late = cfrt(neutral, frames, list("abc"), ["b"], averaged=range(30, 50))["b"]
    assert late["swap_steps"] == list(range(30, 50))
    assert late["cfrt"] == cfrt(neutral, frames[:, :, 30:], list("abc"), ["b"])["b"]["cfrt"]


# ---- by plain loops --------------------------------------------------------------------------------


def brute_force(reading, p0, p, heads, attributes, a, classes0, classes, columns):
    """One seed: p0 (K), p (A, S, K) -> "hit", "miss", "tie" or "dropped"."""
    k = heads.index(attributes[a])

    def change(prompt, head):
        return sum(p[prompt][s][head] - p0[head] for s in columns) / len(columns)

    if reading == "single_f":
        mine, others = change(a, k), [change(j, k) for j in range(len(attributes)) if j != a]
    else:
        mine, others = change(a, k), [change(a, j) for j in range(len(heads)) if j != k]
    if reading in ("own_head_abs", "strict"):
        mine, others = abs(mine), [abs(other) for other in others]
    if math.isnan(mine) or any(math.isnan(other) for other in others):
        return "dropped"
    if mine == max(others):
        return "tie"
    if mine < max(others):
        return "miss"
    if reading == "strict":
        for s in columns:
            crosses = [(p0[j] >= 0.5) != (p[a][s][j] >= 0.5) for j in range(len(heads)) if j != k]
            if any(crosses) or classes[a][s] != classes0:
                return "miss"
    return "hit"


def test_every_reading_agrees_with_plain_loops():
    rng = np.random.default_rng(7)
    n, heads, attributes = 400, ["hair", "gel", "ruler", "ink"], ["ink", "gel", "hair"]
    # Eighths, averaged over two steps, are exact: many ties, and none of them a matter of rounding.
    p0 = rng.integers(0, 9, (n, 4)) / 8
    p = np.clip(p0[:, None, None] + rng.integers(-2, 3, (n, 3, 3, 4)) / 8, 0, 1)
    for a, attribute in enumerate(attributes):
        p[:, a, :, heads.index(attribute)] = np.clip(p[:, a, :, heads.index(attribute)] + 0.25, 0, 1)
    p[rng.random(p.shape) < 0.005] = NAN
    classes0, classes = rng.integers(0, 2, n), rng.integers(0, 2, (n, 3, 3))
    classes = np.where(rng.random(classes.shape) < 0.8, classes0[:, None, None], classes)
    columns, named = [0, 2], {"swap_steps": [5, 10, 15], "averaged": [5, 15]}
    found = cfrt(p0, p, heads, attributes, classes0, classes, **named)
    seedwise = successes(p0, p, heads, attributes, classes0, classes, **named)
    for a, attribute in enumerate(attributes):
        for reading in READINGS:
            verdicts = [
                brute_force(reading, p0[i], p[i], heads, attributes, a, classes0[i], classes[i], columns)
                for i in range(n)
            ]
            hits, dropped = verdicts.count("hit"), verdicts.count("dropped")
            report = found[attribute]["cfrt"][reading]
            assert 0 < hits < n - dropped  # the data asks something of every branch
            assert dropped > 0
            assert verdicts.count("tie") > 0
            assert report["value"] == hits / (n - dropped)
            assert (report["n"], report["dropped"], report["ties"]) == (n - dropped, dropped, verdicts.count("tie"))
            assert report["interval"] == list(stats.wilson(hits, n - dropped))
            expected = [{"hit": 1.0, "miss": 0.0, "tie": 0.0, "dropped": NAN}[verdict] for verdict in verdicts]
            np.testing.assert_array_equal(seedwise[attribute][reading], expected)


# ---- whatever the probabilities --------------------------------------------------------------------


@EXAMPLES
@given(p0=probabilities(6, 3), p=probabilities(6, 3, 2, 3), order=st.permutations(range(3)))
def test_the_order_of_the_heads_does_not_matter(p0, p, order):
    heads, attributes = list("abc"), list("abc")
    found = cfrt(p0, p, heads, attributes)
    shuffled = cfrt(p0[:, order], p[..., order], [heads[i] for i in order], attributes)
    for attribute in attributes:
        assert shuffled[attribute]["cfrt"] == found[attribute]["cfrt"]
        assert shuffled[attribute]["flip_rate"] == found[attribute]["flip_rate"]
        assert shuffled[attribute]["per_swap_step"] == found[attribute]["per_swap_step"]


@EXAMPLES
@given(p0=probabilities(6, 3), p=probabilities(6, 3, 2, 3), order=st.permutations(range(6)))
def test_the_order_of_the_seeds_does_not_matter(p0, p, order):
    found = cfrt(p0, p, list("abc"), list("abc"))
    shuffled = cfrt(p0[order], p[order], list("abc"), list("abc"))
    assert all(shuffled[name]["cfrt"] == found[name]["cfrt"] for name in "abc")


@EXAMPLES
@given(p0=probabilities(5, 3), p=probabilities(5, 3, 2, 3))
def test_a_shift_of_every_swapped_head_is_no_change_to_signed_readings(p0, p):
    shifted = cfrt(p0 / 2, p / 2 + 0.25, list("abc"), list("abc"))
    found = cfrt(p0 / 2, p / 2, list("abc"), list("abc"))
    for name in "abc":
        for reading in ("own_head_signed", "single_f"):
            assert shifted[name]["cfrt"][reading] == found[name]["cfrt"][reading]


@EXAMPLES
@given(p0=probabilities(6, 3), p=probabilities(6, 3, 2, 3))
def test_what_always_holds(p0, p):
    verdicts = successes(p0, p, list("abc"), list("abc"))
    for name, report in cfrt(p0, p, list("abc"), list("abc")).items():
        json.dumps(report, allow_nan=False)
        found = report["cfrt"]
        for reading in READINGS:
            assert found[reading]["n"] + found[reading]["dropped"] == 6
            assert found[reading]["ties"] <= found[reading]["n"]
        # strict only takes away from own_head_abs
        strict, absolute = verdicts[name]["strict"], verdicts[name]["own_head_abs"]
        assert np.array_equal(np.isnan(strict), np.isnan(absolute))
        assert not (strict > absolute).any()


@EXAMPLES
@given(p0=probabilities(4, 2), p=probabilities(4, 2, 3, 2))
def test_an_edit_of_nothing_always_ties(p0, p):
    p[:] = p0[:, None, None]
    for report in cfrt(p0, p, list("ab"), list("ab")).values():
        for reading in READINGS:
            assert report["cfrt"][reading]["ties"] == report["cfrt"][reading]["n"]


@EXAMPLES
@given(p0=probabilities(8, 3), p=probabilities(8, 2, 3, 3), column=st.integers(0, 2))
def test_a_curve_is_the_report_of_each_step(p0, p, column):
    whole = cfrt(p0, p, list("abc"), list("ab"))
    single = cfrt(p0, p[:, :, [column]], list("abc"), list("ab"))
    for name in "ab":
        curve = whole[name]["per_swap_step"]
        assert all(curve[reading][column] == single[name]["cfrt"][reading]["value"] for reading in READINGS)
        assert curve["flip_rate"][column] == single[name]["flip_rate"]["value"]
        assert curve["target_change"][column] == single[name]["target_change"]["value"]
        assert curve["off_target"][column] == single[name]["largest_off_target"]["value"]
        for reading in READINGS:
            assert curve["interval"][reading][column] == single[name]["cfrt"][reading]["interval"]
        assert curve["interval"]["flip_rate"][column] == single[name]["flip_rate"]["interval"]
        if not np.isnan(p0).any() and not np.isnan(p).any():  # a NaN is left out before or after seeds are drawn
            expected = single[name]["target_change"]["interval"]
            assert curve["interval"]["target_change"][column] == pytest.approx(expected, abs=1e-12)  # order of adding


def test_the_intervals_of_a_curve_by_hand():
    neutral = np.full((20, 2), 0.25)
    swapped = np.tile([0.75, 0.25], (20, 1, 2, 1))
    swapped[:5, 0, 1, 0] = 0.25  # a quarter does not change at the second step
    curve = cfrt(neutral, swapped, ["a", "b"], ["a"], swap_steps=[5, 10])["a"]["per_swap_step"]
    assert curve["flip_rate"] == [1, 0.75]
    assert curve["interval"]["flip_rate"] == [list(stats.wilson(20, 20)), list(stats.wilson(15, 20))]
    assert curve["interval"]["strict"] == curve["interval"]["flip_rate"]
    assert curve["interval"]["target_change"][0] == [0.5, 0.5]
    low, high = curve["interval"]["target_change"][1]
    assert 0.2 < low < 0.375 < high < 0.5
    assert curve["interval"].keys() == {*READINGS, "flip_rate", "target_change"}
    assert curve.keys() == {*curve["interval"], "off_target", "swap_steps", "interval"}


# ---- what is refused -------------------------------------------------------------------------------

P0, P = np.full((2, 2), 0.5), np.full((2, 1, 3, 2), 0.5)


@pytest.mark.parametrize(
    ("arguments", "named", "message"),
    [
        ((P0[:, :1], P[..., :1], ["a"], ["a"]), {}, "heads: CFRT compares classifiers, expected two or more"),
        ((P0, P, ["a", "a"], ["a"]), {}, "heads: expected names, each once"),
        ((P0, P, ["hair", "ink"], ["hairs"]), {}, "no 'hairs' among .*did you mean 'hair'"),
        ((P0[0], P, ["a", "b"], ["a"]), {}, r"neutral: expected \(seeds, 2 heads\), got \(2,\)"),
        ((P0, P[:1], ["a", "b"], ["a"]), {}, r"swapped: expected \(2 seeds, 1 attributes"),
        ((P0, P[:, :, :0], ["a", "b"], ["a"]), {}, "swapped: expected"),
        ((P0, P * 3, ["a", "b"], ["a"]), {}, "swapped: expected probabilities in 0..1 or NaN, got 1.5"),
        ((P0 * math.inf, P, ["a", "b"], ["a"]), {}, "neutral: expected probabilities"),
        ((P0, P, ["a", "b"], ["a"], [0, 1]), {}, "expected both or neither"),
        ((P0, P, ["a", "b"], ["a"], [0, 1], np.zeros((2, 1, 3))), {}, "decision_swapped: expected .* got .* float64"),
        ((P0, P, ["a", "b"], ["a"]), {"swap_steps": [5, 10]}, "swap_steps: expected 3 different steps"),
        ((P0, P, ["a", "b"], ["a"]), {"averaged": [0, 7]}, r"averaged: expected some of the swap steps \[0, 1, 2\]"),
        ((P0, P, ["a", "b"], ["a"]), {"averaged": []}, "averaged: expected some"),
    ],
)
def test_bad_input_is_named(arguments, named, message):
    with pytest.raises(ValueError, match=message):
        cfrt(*arguments, **named)
