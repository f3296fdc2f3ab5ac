import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.methods.process import step_normalized


@pytest.mark.parametrize("return_first", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_formula(seed, return_first):
    def formula(batch, log_probs):
        rewards = naive.turn_rewards(batch)
        found = [[0.0] * len(row) for row in rewards]
        for rows in naive.group_rows(batch):
            if return_first:
                to_go = {r: naive.to_go(rewards[r]) for r in rows}
                for k in range(max(map(len, to_go.values()))):
                    own = {r: x[k] for r, x in to_go.items() if len(x) > k}
                    for r, x in own.items():
                        found[r][k] = x - sum(own.values()) / len(own)
                continue
            mean, std = naive.moments([x for r in rows for x in rewards[r]])
            for r in rows:
                found[r] = naive.to_go([(x - mean) / (std + 1e-6) for x in rewards[r]])
        advantages = naive.spread_turns(batch, found)
        return naive.sequence_mean(batch, naive.token_ppo(batch, log_probs, advantages, 0.8, 1.2))

    batch, current = naive.random_batch(seed)
    batch = naive.with_inputs(batch, {"token_rewards"}, seed)
    naive.check(tc.methods.process(return_first=return_first), batch, current, formula)


@pytest.mark.parametrize(
    ("return_first", "expected"),
    [
        (False, [0.62418584, 1.66449556, 1.45643362, -1.45643362, -0.72821681, 0.83224778]),
        (True, [0.63333333, 0.6, 0, -0.46666667, -0.6, -0.16666667]),
    ],
)
def test_by_hand(return_first, expected):
    """Three trajectories, with rewards 0.1, 0.5, 0.9 | 0.2, 0.2 | 0.7 of their turns, of one token each."""
    batch = tc.Rollouts(
        torch.arange(6),
        torch.tensor([0, 3, 5, 6]),
        torch.zeros(3, dtype=torch.long),
        None,
        token_rewards=torch.tensor([0.1, 0.5, 0.9, 0.2, 0.2, 0.7], dtype=torch.float64),
        extras={"turn_ids": torch.arange(6)},
    )
    # 1e-6 is added to the standard deviation.
    advantages = tc.methods.process(return_first=return_first, epsilon=0.0).prepare(batch).advantages
    assert advantages.tolist() == pytest.approx(expected, abs=1e-5)


def test_defaults():
    assert tc.methods.process() == tc.Objective(step_normalized(1e-6), clip=tc.clip.ppo(0.2, 0.2))
