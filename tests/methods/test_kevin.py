import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.methods.kevin import pooled_turn_returns


@pytest.mark.parametrize("largest", [False, True])
def test_formula(largest):
    def formula(batch, log_probs):
        scores = naive.turn_rewards(batch)
        to_go = [
            [max(0.4 ** (i - k) * row[i] for i in range(k, len(row))) for k in range(len(row))]
            if largest
            else naive.to_go(row, 0.4)
            for row in scores
        ]
        for rows in naive.group_rows(batch):
            mean, std = naive.moments([x for r in rows for x in to_go[r]])
            for r in rows:
                to_go[r] = [(x - mean) / (std + 1e-6) for x in to_go[r]]
        advantages = naive.spread_turns(batch, to_go)
        return naive.sequence_mean(batch, naive.token_ppo(batch, log_probs, advantages, 0.8, 1.2))

    batch, current = naive.random_batch()
    batch = naive.with_inputs(batch, {"token_rewards"})
    naive.check(tc.methods.kevin(largest=largest), batch, current, formula)


def test_by_hand():
    """Scores 0, 0.3, 1.3 | 0.3, 0.3 | 0; returns 0.328, 0.82, 1.3 | 0.42, 0.3 | 0 with mean 0.528."""
    batch = tc.Rollouts(
        torch.arange(6),
        torch.tensor([0, 3, 5, 6]),
        torch.zeros(3, dtype=torch.long),
        None,
        token_rewards=torch.tensor([0.0, 0.3, 1.3, 0.3, 0.3, 0.0], dtype=torch.float64),
        extras={"turn_ids": torch.arange(6)},
    )
    expected = [-0.43361926, 0.63308411, 1.67377033, -0.23415440, -0.49432595, -1.14475483]
    assert tc.methods.kevin().prepare(batch).advantages.tolist() == pytest.approx(expected, rel=1e-6)


def test_defaults():
    assert tc.methods.kevin() == tc.Objective(pooled_turn_returns(0.4, False, 1e-6), clip=tc.clip.ppo(0.2, 0.2))
