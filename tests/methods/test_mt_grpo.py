import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.methods.mt_grpo import first_turn


def normalized(batch, x):
    found = [0.0] * batch.num_rows
    for rows in naive.counted_rows(batch):
        mean, std = naive.moments([x[r] for r in rows])
        for r in rows:
            found[r] = (x[r] - mean) / (std + 1e-4)
    return found


@pytest.mark.parametrize("seed", range(3))
def test_formula(seed):
    def formula(batch, log_probs):
        turns, rewards = naive.turns_of(batch), batch.token_rewards.tolist()
        judged = [sum(rewards[t] for t in row[0]) if row else 0.0 for row in turns]
        turn, outcome = normalized(batch, judged), normalized(batch, batch.rewards.tolist())
        both = normalized(batch, naive.total_rewards(batch))
        found = []
        for r, row in enumerate(turns):
            first = both[r] if len(row) == 1 else outcome[r] + 0.5 * turn[r]
            found.append([first] + [outcome[r]] * (len(row) - 1) if row else [])
        advantages = naive.spread_turns(batch, found)
        return naive.token_mean(batch, naive.token_ppo(batch, log_probs, advantages, 0.8, 1.2))

    batch, current = naive.random_batch(seed)
    batch = naive.with_inputs(batch, {"token_rewards"}, seed)
    naive.check(tc.methods.mt_grpo(weight=0.5), batch, current, formula)


@pytest.mark.parametrize(
    ("weight", "first"),
    [(1.0, [0.86587543, 0.35811990, -2.08987076]), (0.5, [0.86587543, -0.25387776, -1.47787309])],
)
def test_by_hand(weight, first):
    """Turn rewards 0.2, 0.4, 0, 0.2 and outcomes 1, 0, 0, 1; the last trajectory calls no tool."""
    batch = tc.Rollouts(
        torch.arange(7),
        torch.tensor([0, 2, 4, 6, 7]),
        torch.zeros(4, dtype=torch.long),
        torch.tensor([1.0, 0, 0, 1], dtype=torch.float64),
        token_rewards=torch.tensor([0.2, 0, 0.4, 0, 0, 0, 0.2], dtype=torch.float64),
        extras={"turn_ids": torch.tensor([0, 1, 0, 1, 0, 1, 0])},
    )
    advantages = tc.methods.mt_grpo(weight=weight).prepare(batch).advantages.tolist()
    assert advantages[:6:2] == pytest.approx(first)
    assert advantages[1:6:2] == pytest.approx([0.86587543, -0.86587543, -0.86587543])
    assert advantages[6] == pytest.approx(0.83319447)


def test_defaults():
    assert tc.methods.mt_grpo() == tc.Objective(
        first_turn(1.0, 1e-4), clip=tc.clip.ppo(0.2, 0.2), aggregation=tc.aggregation.token_mean()
    )
