import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.methods.ba import balanced


@pytest.mark.parametrize("seed", range(4))
def test_formula(seed):
    def formula(batch, log_probs):
        advantages = naive.group_advantages(batch)
        losses = naive.ppo(batch, log_probs, advantages, 0.8, 1.28)
        total, groups = 0.0, 0
        for rows in naive.group_rows(batch):
            rows = [r for r in rows if losses[r]]
            groups += bool(rows)
            for sign in (1, -1):
                side = [r for r in rows if advantages[r] * sign > 0]
                if side:
                    tokens = sum(len(losses[r]) for r in side)
                    total = total + len(side) / len(rows) * sum(sum(losses[r]) for r in side) / tokens
        return total / groups

    naive.check(tc.methods.ba(), *naive.random_batch(seed), formula)


def test_by_hand():
    batch = tc.Rollouts(
        torch.zeros(22, dtype=torch.long),
        torch.tensor([0, 2, 6, 12, 22]),
        torch.zeros(4, dtype=torch.long),
        torch.tensor([1.0, 0.0, 0.0, 0.0]),
    )
    weights = tc.methods.ba().prepare(batch).row_weights[:, 0]
    assert weights.tolist() == pytest.approx([0.125, 0.0375, 0.0375, 0.0375])
    advantages = torch.tensor([1.5, -0.5, -0.5, -0.5])
    lengths = torch.tensor([2.0, 4.0, 6.0, 10.0])
    assert (weights * lengths * advantages).sum().item() == pytest.approx(0.0, abs=1e-7)
    assert (lengths * advantages).sum().item() / 22 == pytest.approx(-0.318, abs=1e-3)


def test_defaults():
    assert tc.methods.ba() == tc.Objective(clip=tc.clip.ppo(low=0.2, high=0.28, cap=None), aggregation=balanced())
