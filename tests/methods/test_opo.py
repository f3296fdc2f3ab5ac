import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.methods.opo import length_weighted


def test_formula():
    def formula(batch, log_probs):
        tokens, rewards = naive.rows_of(batch), naive.total_rewards(batch)
        advantages = [0.0] * batch.num_rows
        for rows in naive.counted_rows(batch):
            total = sum(len(tokens[r]) for r in rows)
            baseline = sum(len(tokens[r]) * rewards[r] for r in rows) / max(total, 1)
            for r in rows:
                advantages[r] = rewards[r] - baseline
        return naive.token_mean(batch, naive.ppo(batch, log_probs, advantages, 0.8, 1.2))

    batch, current = naive.random_batch()
    for extra in ((), ("token_rewards",)):
        naive.check(tc.methods.opo(), naive.with_inputs(batch, extra), current, formula)


def test_by_hand():
    # 5, 3 and 3 tokens with rewards 1, 0 and 0.5: the baseline is 6.5 / 11. A group of one has advantage 0.
    batch = tc.Rollouts(
        torch.arange(12),
        torch.tensor([0, 5, 8, 11, 12]),
        torch.tensor([0, 0, 0, 1]),
        torch.tensor([1.0, 0.0, 0.5, 4.0], dtype=torch.float64),
    )
    advantages = tc.methods.opo().prepare(batch).advantages.tolist()
    assert advantages == pytest.approx([0.40909091] * 5 + [-0.59090909] * 3 + [-0.09090909] * 3 + [0.0], rel=1e-7)


def test_defaults():
    assert tc.methods.opo() == tc.Objective(
        length_weighted(), clip=tc.clip.ppo(0.2, 0.2), aggregation=tc.aggregation.token_mean()
    )
