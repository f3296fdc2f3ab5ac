import naive
import pytest
import tokcredit as tc
import torch


@pytest.mark.parametrize("seed", range(3))
def test_formula(seed):
    def formula(batch, log_probs):
        advantages = [0.1 if r > 0.5 else -1.0 for r in batch.rewards.tolist()]
        kept = [[a] * len(t) for a, t in zip(advantages, naive.rows_of(batch), strict=True) if a]
        losses = naive.ppo(batch, log_probs, advantages, 0.8, 1.2)
        return sum(map(sum, losses)) / sum(map(len, kept))

    naive.check(tc.methods.w_reinforce(), *naive.random_batch(seed), formula)


def test_by_hand():
    batch = tc.Rollouts(
        torch.arange(5), torch.tensor([0, 2, 3, 5]), torch.tensor([0, 0, 1]), torch.tensor([1.0, 0.0, 0.0])
    )
    objective = tc.methods.w_reinforce()
    log_probs = torch.zeros(5, requires_grad=True)
    objective.loss(objective.prepare(batch), log_probs).loss.backward()
    assert log_probs.grad.tolist() == pytest.approx([-0.02, -0.02, 0.2, 0.2, 0.2])


def test_is_the_weighted_sum_of_its_halves():
    batch, current = naive.random_batch()

    def gradient(name):
        log_probs = current.clone().requires_grad_()
        objective = tc.methods.load(name)
        prepared = objective.prepare(batch)
        objective.loss(prepared, log_probs).loss.backward()
        return log_probs.grad * prepared.mask.sum() / batch.lengths.sum()

    torch.testing.assert_close(gradient("w_reinforce"), 0.1 * gradient("psr") + gradient("nsr"))


def test_defaults():
    assert tc.methods.w_reinforce() == tc.Objective(
        credit=tc.credit.thresholded(above=0.1, below=-1.0, threshold=0.5), aggregation=tc.aggregation.token_mean()
    )
