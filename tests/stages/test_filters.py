import dataclasses

import naive
import pytest
import tokcredit as tc
from tokcredit.methods.ba import balanced
from tokcredit.methods.pods import most_varied
import torch


def test_mixed_keeps_groups_whose_rewards_differ():
    batch = tc.Rollouts(
        torch.arange(6), torch.arange(7), torch.tensor([3, 1, 3, 1, 2, 1]), torch.tensor([1.0, 0, 1, 0, 5, 0.5])
    )
    assert tc.filters.mixed_groups()(batch).tolist() == [False, True, False, True, False, True]


@pytest.mark.parametrize("credit", [tc.credit.group_normalized(), tc.credit.tempo_like()])
def test_rows_left_out_are_as_if_they_had_not_been_there(credit):
    """Credit per row and per token: the same as for the batch without them, and their share of nothing."""
    batch, current = naive.random_batch(size=6)
    objective = tc.Objective(credit, aggregation=balanced(), sampling=most_varied(3))
    kept = objective.sampling(batch)
    assert 0 < kept.sum() < batch.num_rows
    alone = dataclasses.replace(objective, sampling=None)
    grads = []
    for o, b, x in ((objective, batch, current), (alone, batch.select(kept), current[kept])):
        log_probs = x.clone().requires_grad_()
        o.loss(o.prepare(b), log_probs).loss.backward()
        grads.append(log_probs.grad)
    torch.testing.assert_close(grads[0][kept], grads[1])
    assert not grads[0][~kept].any() and grads[1].any()


def test_an_empty_choice_trains_nothing():
    batch, current = naive.random_batch()
    batch = dataclasses.replace(batch, rewards=torch.ones(12))
    objective = dataclasses.replace(tc.methods.tempo(), sampling=tc.filters.mixed_groups())
    prepared = objective.prepare(batch)
    assert not prepared.mask.any() and objective.loss(prepared, current).loss == 0
    with pytest.raises(ValueError, match="count: expected at least 1, got 0"):
        most_varied(0)
