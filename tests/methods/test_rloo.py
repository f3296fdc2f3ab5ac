import naive
import pytest
import tokcredit as tc
import torch


def test_formula():
    def formula(batch, log_probs):
        rewards = batch.rewards.tolist()
        advantages = [0.0] * batch.num_rows
        for rows in naive.counted_rows(batch):
            for r in rows:
                others = [rewards[k] for k in rows if k != r]
                advantages[r] = rewards[r] - sum(others) / len(others)
        return naive.token_mean(batch, naive.ppo(batch, log_probs, advantages, 0.8, 1.2))

    naive.check(tc.methods.rloo(), *naive.random_batch(), formula)


def test_by_hand():
    batch = tc.Rollouts(
        torch.arange(4),
        torch.arange(5),
        torch.tensor([0, 0, 0, 1]),
        torch.tensor([1.0, 0.0, 0.5, 9.0]),
    )
    assert tc.methods.rloo().prepare(batch).advantages.tolist() == pytest.approx([0.75, -0.75, 0.0, 0.0])


def test_defaults():
    assert tc.methods.rloo() == tc.Objective(
        credit=tc.credit.leave_one_out(count_empty=False), aggregation=tc.aggregation.token_mean()
    )
