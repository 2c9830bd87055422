"""The embedding contexts: which context comes back at which step, exactly, and what is refused."""

import pytest
import torch

from ldm import conditioning
from ldm.conditioning import Contexts, constant, swap

GENERATOR = torch.Generator().manual_seed(0)
A, B, C = torch.randn(3, 1, 5, 8, generator=GENERATOR)


def letters(contexts: Contexts) -> str:
    """The contexts as a word, by bit-for-bit comparison; "?" where it is neither A, B nor C."""
    named = {"A": A, "B": B, "C": C}
    return "".join(
        next((name for name, known in named.items() if torch.equal(known, contexts.at(step))), "?")
        for step in range(len(contexts))
    )


def test_swap_takes_exactly_the_neutral_steps_asked_for():
    assert letters(conditioning.swap(A, B, at=3, steps=8)) == "AAABBBBB"
    assert letters(conditioning.swap(A, B, at=0, steps=4)) == "BBBB"
    assert letters(conditioning.swap(A, B, at=4, steps=4)) == "AAAA"
    assert letters(conditioning.swap(A, B)) == "A" * 20 + "B" * 30


def test_the_authors_count_one_more():
    assert letters(conditioning.swap(A, B, at=3, steps=8, indexing="authors")) == "AAAABBBB"
    with pytest.raises(ValueError, match=r"at: .*0\.\.8 steps, got 8 \(9 with indexing 'authors'\)"):
        conditioning.swap(A, B, at=8, steps=8, indexing="authors")
    with pytest.raises(ValueError, match="indexing: expected 'steps' or 'authors', got 'author'"):
        conditioning.swap(A, B, indexing="author")


def test_constant_and_piecewise():
    assert letters(conditioning.constant(A, 3)) == "AAA"
    assert letters(conditioning.piecewise([A, B, C], [2, 5], 7)) == "AABBBCC"
    assert letters(conditioning.piecewise([A, B, C], [2, 2], 4)) == "AACC"
    assert letters(conditioning.piecewise([A, B, A], [0, 3], 4)) == "BBBA"


def test_a_swap_is_a_blend_of_zeros_and_ones():
    assert letters(conditioning.blend(A, B, [0, 0, 1])) == letters(conditioning.swap(A, B, 2, 3)) == "AAB"


def test_neutral_to_neutral_is_neutral_bit_for_bit():
    assert letters(conditioning.swap(A, A.clone(), at=2, steps=5)) == "AAAAA"


def test_blend_mixes_linearly():
    contexts = conditioning.blend(A, B, torch.tensor([0.25, 0.5]))
    torch.testing.assert_close(contexts.at(0), 0.75 * A + 0.25 * B)
    torch.testing.assert_close(contexts.at(1), (A + B) / 2)
    assert contexts.at(0).dtype == torch.float32


def test_ramp_is_pure_at_both_ends_and_straight_between():
    contexts = conditioning.ramp(A, B, begin=2, end=6, steps=9)
    assert letters(contexts) == "AAA???BBB"
    assert contexts.weights[:, 0, 1].tolist() == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]


def test_contexts_are_stored_once():
    contexts = conditioning.swap(A, B, at=20, steps=1000)
    assert contexts.prompts.shape == (2, 1, 5, 8)
    assert contexts.at(999).data_ptr() == contexts.prompts[1].data_ptr()  # a view, not a copy


def test_one_context_may_serve_a_batch():
    many = torch.randn(4, 5, 8)
    contexts = conditioning.swap(A, many, at=1, steps=2)
    assert torch.equal(contexts.at(0), A.expand(4, -1, -1))
    assert torch.equal(contexts.at(1), many)


def test_rows_of_a_batch_may_differ():
    """Each with its own prompts, swaps and blends: bit for bit what each is alone."""
    pair = torch.cat([B, C])
    rows = [swap(A, B, at=1, steps=4), constant(C, 4), conditioning.blend(A, C, [0, 0.5, 1, 0]), constant(pair, 4)]
    together = side_by_side(*rows)
    for step in range(4):
        assert torch.equal(together.at(step), torch.cat([contexts.at(step) for contexts in rows]))


def test_rows_that_only_swap_are_never_mixed():
    together = side_by_side(*(swap(A, B, at=at, steps=3) for at in range(4)))
    assert [letters_of_rows(together.at(step)) for step in range(3)] == ["BAAA", "BBAA", "BBBA"]


def letters_of_rows(context):
    return "".join("A" if torch.equal(row, A[0]) else "B" if torch.equal(row, B[0]) else "?" for row in context)


def side_by_side(*rows):
    return conditioning.side_by_side(rows)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: conditioning.swap(A[0], B), r"context 0: .*\(B, L, D\), got \(5, 8\)"),
        (lambda: conditioning.swap(A, B[:, :4]), r"context 1: .* got \(1, 4, 8\)"),
        (lambda: conditioning.swap(A, B.double()), "context 1: .*float32.* got .*float64"),
        (lambda: conditioning.swap(A.long(), B), "context 0: expected floating-point"),
        (lambda: conditioning.swap(torch.zeros(2, 5, 8), torch.zeros(3, 5, 8)), r"one batch size .*\[2, 3\]"),
        (lambda: conditioning.swap(A, B, at=51), r"at: .*0\.\.50 steps, got 51"),
        (lambda: conditioning.swap(A, B, at=-1), r"at: .*got -1"),
        (lambda: conditioning.constant(A, 0), "steps: expected 1 or more, got 0"),
        (lambda: conditioning.piecewise([], [], 5), "contexts: expected at least one"),
        (lambda: conditioning.piecewise([A, B], [1, 2], 5), "boundaries: expected 1 for 2 contexts"),
        (lambda: conditioning.piecewise([A, B, C], [3, 2], 5), r"boundaries: expected rising steps in 0\.\.5"),
        (lambda: conditioning.blend(A, B, [0.5, 1.1]), r"weights: .*0\.\.1"),
        (lambda: conditioning.blend(A, B, [float("nan")]), r"weights: .*0\.\.1"),
        (lambda: conditioning.blend(A, B, []), "weights: expected one value"),
        (lambda: conditioning.ramp(A, B, 5, 5), "begin < end"),
        (lambda: Contexts(A, torch.ones(1, 1, 1)), r"prompts: .*\(K, B, L, D\)"),
        (lambda: Contexts(A[None], torch.ones(3, 1, 2)), r"weights: expected \(S, 1 or 1, 1\)"),
        (lambda: Contexts(A[None], torch.full((3, 1, 1), torch.inf)), "weights: expected finite"),
        (lambda: conditioning.side_by_side([]), "rows: expected at least one"),
        (lambda: side_by_side(constant(A, 3), constant(B, 4)), r"rows: expected as many steps each, got \[3, 4\]"),
        (lambda: side_by_side(constant(A, 3), constant(B[:, :4], 3)), r"context 1: .* got \(1, 4, 8\)"),
    ],
)
def test_errors_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("step", [-1, 50])
def test_a_step_outside_the_contexts_is_an_error_not_the_last_context(step):
    with pytest.raises(ValueError, match=rf"step: expected 0\.\.49, .* got {step}"):
        conditioning.constant(A, 50).at(step)
