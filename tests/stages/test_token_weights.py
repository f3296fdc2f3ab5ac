import dataclasses
import math

import naive
import pytest
import tokcredit as tc
from tokcredit.methods.d3s import varied_rows
from tokcredit.methods.tip import drawn_share
import torch


def batch_of(entropies, lengths):
    return tc.Rollouts(
        torch.arange(sum(lengths)),
        torch.tensor([0, *lengths]).cumsum(0),
        torch.zeros(len(lengths), dtype=torch.long),
        torch.zeros(len(lengths)),
        entropies=torch.tensor(entropies),
    )


ENTROPIES = tc.token_score.given("entropies")


@pytest.mark.parametrize(
    ("share", "per_row", "round_up", "expected"),
    [
        (0.5, False, True, [0, 1, 0, 1, 1]),  # 2.5 becomes 3
        (0.5, False, False, [0, 1, 0, 1, 0]),
        (0.5, True, True, [0, 1, 1, 1, 0]),  # 1.5 of the first three
        (0.5, True, False, [0, 1, 0, 1, 0]),
        (0.01, True, False, [0, 1, 0, 1, 0]),  # at least one
        (1.0, False, True, [1, 1, 1, 1, 1]),
    ],
)
def test_top_share(share, per_row, round_up, expected):
    batch = batch_of([0.1, 0.9, 0.2, 0.8, 0.3], [3, 2])
    chosen = tc.filters.top_share(share, ENTROPIES, per_row=per_row, round_up=round_up)(batch, torch.ones(2, 1))
    assert chosen.int().tolist() == expected


@pytest.mark.parametrize("tenths", range(1, 11))
def test_a_share_of_ten_tokens_is_that_many(tenths):
    batch = batch_of([0.5] * 10, [10])
    for round_up in (True, False):
        chosen = tc.filters.top_share(tenths / 10, ENTROPIES, round_up=round_up)(batch, torch.ones(1, 1))
        assert chosen.sum() == tenths


def test_top_share_of_paid_tokens():
    batch = batch_of([0.5, 0.9, 0.5, 0.6], [2, 2])
    for advantages in (torch.tensor([[0.1], [-2.0]]), torch.tensor([0.1, 0.1, -2.0, -2.0])):
        chosen = tc.filters.top_share(0.5, ENTROPIES, paid=True)(batch, advantages)
        assert chosen.tolist() == [False, False, True, True]


def test_later_weights_do_not_see_what_earlier_ones_dropped():
    batch = batch_of([0.9, 0.1, 0.5, 0.4], [2, 2])
    batch = dataclasses.replace(batch, old_log_probs=torch.tensor([0.95, 0.1, 0.1, 0.1]).log())
    weights = (tc.filters.improbable(0.9), tc.filters.top_share(0.3, ENTROPIES))
    objective = tc.Objective(tc.credit.constant(), weights=weights)
    assert objective.prepare(batch).mask.tolist() == [False, False, True, False]
    back = dataclasses.replace(objective, weights=weights[::-1])
    assert back.prepare(batch).mask.tolist() == [False, False, True, False]
    one = dataclasses.replace(objective, weights=(tc.filters.top_share(0.25, ENTROPIES), weights[0]))
    assert not one.prepare(batch).mask.any()


def test_selected_tokens_keep_the_ratio_of_their_whole_row():
    """A token left out of training is still part of the sequence whose probability changed."""
    batch, current = naive.random_batch()
    objective = tc.Objective(
        ratio=tc.ratio.sequence(),
        weights=(tc.filters.improbable(0.6),),
        clip=tc.clip.unclipped(),
        aggregation=tc.aggregation.token_mean(),
    )

    def formula(batch, log_probs):
        losses, old = [], batch.old_log_probs
        for a, tokens in zip(naive.group_advantages(batch), naive.rows_of(batch), strict=True):
            mean = sum((log_probs[t] - old[t]).item() for t in tokens) / max(len(tokens), 1)
            kept = [t for t in tokens if old[t].exp() < 0.6]
            losses += [-a * (mean + log_probs[t] - log_probs[t].detach()).exp() for t in kept]
        return sum(losses) / len(losses)

    naive.check(objective, batch, current, formula)


def test_varied_rows_skip_rows_without_tokens():
    batch = batch_of([0.5] * 4, [1, 0, 1, 1, 1])
    advantages = torch.tensor([[1.0], [-9.0], [0.5], [-1.0], [0.0]])
    assert varied_rows(0.5)(batch, advantages)[:, 0].tolist() == [True, False, False, True, False]
    tokens = torch.tensor([1.0, 0.5, -1.0, 0.0])
    assert varied_rows(0.5)(batch, tokens)[:, 0].tolist() == [True, False, False, True, False]


def test_raised():
    batch = batch_of([0.0, 0.5], [2])
    assert tc.token_weights.raised(ENTROPIES, 0.7)(batch, torch.ones(1, 1)).tolist() == pytest.approx([1.0, 1.35])


@pytest.mark.parametrize("share", [0.0, 1.1, -1.0, math.nan])
def test_wrong_shares_are_errors(share):
    for make in (tc.filters.top_share, drawn_share):
        with pytest.raises(ValueError, match="share: expected more than 0 and at most 1"):
            make(share, ENTROPIES)
