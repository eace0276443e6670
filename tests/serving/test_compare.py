"""When two servers agree: equal answers, ties by rounding, and everything that is neither."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from gemoe_ds.serving.compare import Agreement, compare
from gemoe_ds.serving.exchange import Answer

A = Answer([1, 2], [5, 6, 7], [-0.1, -0.2, -0.3], [8, 8, 8], [-2.0, -2.0, -2.0])
EPS = 1e-4


def test_equal_answers_differ_by_rounding_alone():
    b = replace(A, logprobs=[-0.1, -0.2 + 3e-6, -0.3])
    found = compare([A, A], [A, b], EPS)
    assert found == Agreement(2, 0, 2, 0, pytest.approx(3e-6)) and found.holds(EPS)
    assert not found.holds(1e-6)


def test_after_the_first_other_token_nothing_is_compared():
    b = replace(A, ids=[5, 9, 7], logprobs=[-0.1, -0.2, -9.0])
    found = compare([A], [b], EPS)
    assert found.largest == 0.0 and found.equal == 0 and found.ties == 0
    assert not found.holds(EPS)


def tied(gap):
    """The second token is 6 here and 9 there, and each server's second choice is the other's."""
    a = replace(A, second_ids=[8, 9, 8], second_logprobs=[-2.0, -0.2 - gap, -2.0])
    b = replace(
        A,
        ids=[5, 9, 3],
        logprobs=[-0.1, -0.2, -0.5],
        second_ids=[8, 6, 8],
        second_logprobs=[-2.0, -0.2 - gap, -2.0],
    )
    return compare([a], [b], EPS)


def test_two_best_tokens_as_good_as_each_other_are_a_tie():
    found = tied(1e-6)
    assert (found.equal, found.ties) == (0, 1) and found.holds(EPS)
    assert found.largest == pytest.approx(1e-6), "the same tokens are compared there, too"
    assert not tied(0.1).holds(EPS)


def test_a_tie_does_not_excuse_other_log_probabilities():
    a = replace(A, second_ids=[8, 9, 8], second_logprobs=[-2.0, -0.2, -2.0])
    b = replace(a, ids=[5, 9, 3], second_ids=[8, 6, 8], logprobs=[-0.6, -0.2, -0.5])
    found = compare([a], [b], EPS)
    assert found.ties == 1 and found.largest == pytest.approx(0.5) and not found.holds(EPS)


def test_other_prompts_are_no_agreement():
    found = compare([A], [replace(A, prompt_ids=[1, 3])], EPS)
    assert found.other_prompts == 1 and not found.holds(EPS)


def test_nan_is_no_agreement():
    found = compare([A, A], [replace(A, logprobs=[math.nan] * 3), A], EPS)
    assert math.isnan(found.largest) and not found.holds(EPS)


def test_an_answer_that_ends_early_is_another():
    assert not compare([A], [replace(A, ids=[5, 6], logprobs=[-0.1, -0.2])], EPS).holds(EPS)
