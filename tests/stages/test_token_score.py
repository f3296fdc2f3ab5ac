import math

import naive
import pytest
import tokcredit as tc
import torch

A, B = tc.token_score.given("entropies"), tc.token_score.given("reverse_kl")


def batch_with_scores(a, b=None, lengths=None):
    lengths = lengths or [len(a)]
    batch = tc.Rollouts(
        torch.arange(len(a)),
        torch.tensor([0, *lengths]).cumsum(0),
        torch.zeros(len(lengths), dtype=torch.long),
        torch.zeros(len(lengths)),
        entropies=torch.tensor(a),
    )
    return batch if b is None else batch.with_inputs(reverse_kl=torch.tensor(b))


def test_scaled_to_each_row():
    batch = batch_with_scores([1.0, 3.0, 2.0, 5.0, 5.0], lengths=[3, 2])
    assert tc.token_score.scaled(A)(batch).tolist() == [0.0, 1.0, 0.5, 0.0, 0.0]


def test_a_row_with_a_nan_is_scaled_to_nan():
    """Like a row of other scores, not like one of equal scores."""
    batch = batch_with_scores([1.0, math.nan, 2.0, 5.0, 6.0], lengths=[3, 2])
    scores = tc.token_score.scaled(A)(batch)
    assert scores[:3].isnan().all() and scores[3:].tolist() == [0.0, 1.0]


def test_scaled_below_a_quantile_of_the_batch():
    batch = batch_with_scores([0.0, 1.0, 2.0, 3.0, 100.0])
    scaled = tc.token_score.scaled(A, 0.75)
    assert scaled(batch).tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1, 1])
    assert scaled.compares_groups and not tc.token_score.scaled(A).compares_groups


def test_either_keeps_exact_ties():
    """Equal pairs have equal scores, in both orders; ``a + b - a b`` breaks some of them by rounding."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.rand(2000, generator=g), torch.rand(2000, generator=g)
    batch = batch_with_scores(a.tolist() + b.tolist(), b.tolist() + a.tolist())
    one, other = tc.token_score.either(A, B)(batch).chunk(2)
    assert torch.equal(one, other)
    ones = batch_with_scores([1.0] * 3, [0.1, 0.7, 0.3])
    assert tc.token_score.either(A, B)(ones).tolist() == [1.0, 1.0, 1.0]
    assert tc.token_score.either(A, B)(batch_with_scores([0.5], [0.5])).item() == 0.75


def test_but_not():
    batch = batch_with_scores([1.0, 0.5, 0.5], [0.0, 0.5, 1.0])
    assert tc.token_score.but_not(A, B)(batch).tolist() == [1.0, 0.25, 0.0]
    assert tc.token_score.but_not(A, B).required_inputs == {"entropies", "reverse_kl"}


def test_float64_scores_stay_float64():
    batch = naive.with_inputs(naive.random_batch()[0], {"entropies", "reverse_kl"})
    for score in (tc.token_score.scaled(A, 0.9), tc.token_score.either(A, B)):
        assert score(batch).dtype == torch.float64
