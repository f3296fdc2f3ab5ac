import naive
import pytest
import tokcredit as tc
import torch


@pytest.mark.parametrize("seed", range(3))
def test_formula(seed):
    def formula(batch, log_probs):
        advantages = [0.0 if r > 0.5 else -1.0 for r in batch.rewards.tolist()]
        kept = [[a] * len(t) for a, t in zip(advantages, naive.rows_of(batch), strict=True) if a]
        losses = naive.ppo(batch, log_probs, advantages, 0.8, 1.2)
        return sum(map(sum, losses)) / sum(map(len, kept))

    naive.check(tc.methods.nsr(), *naive.random_batch(seed), formula)


def test_by_hand():
    batch = tc.Rollouts(
        torch.arange(5), torch.tensor([0, 2, 3, 5]), torch.tensor([0, 0, 1]), torch.tensor([1.0, 0.0, 0.0])
    )
    objective = tc.methods.nsr()
    log_probs = torch.zeros(5, requires_grad=True)
    objective.loss(objective.prepare(batch), log_probs).loss.backward()
    assert log_probs.grad.tolist() == pytest.approx([0, 0, 1 / 3, 1 / 3, 1 / 3])


def test_batch_without_a_wrong_row_is_skipped():
    batch = tc.Rollouts(torch.arange(2), torch.tensor([0, 1, 2]), torch.tensor([0, 0]), torch.full((2,), 1.0))
    objective = tc.methods.nsr()
    prepared = objective.prepare(batch)
    log_probs = torch.zeros(2, requires_grad=True)
    objective.loss(prepared, log_probs).loss.backward()
    assert not prepared.has_gradient.any() and not log_probs.grad.any()


def test_defaults():
    assert tc.methods.nsr() == tc.Objective(
        credit=tc.credit.thresholded(above=0.0, below=-1.0, threshold=0.5),
        filters=(tc.filters.nonzero_advantage(),),
        aggregation=tc.aggregation.token_mean(),
    )
