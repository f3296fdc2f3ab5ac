import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.methods.remax import above_greedy


@pytest.mark.parametrize("dense", [False, True])
def test_formula(dense):
    def formula(batch, log_probs):
        rewards, advantages = naive.token_rewards(batch), {}
        for r, row in enumerate(naive.rows_of(batch)):
            own = naive.to_go([rewards[t] for t in row], 0.9)
            advantages |= {t: g - batch.extras["greedy_rewards"][r].item() for t, g in zip(row, own, strict=True)}
        return naive.token_mean(batch, naive.token_ppo(batch, log_probs, advantages, 0.8, 1.2))

    batch, current = naive.random_batch()
    batch = naive.with_inputs(batch, {"greedy_rewards", *(["token_rewards"] if dense else [])})
    naive.check(tc.methods.remax(discount=0.9), batch, current, formula)


def test_by_hand():
    batch = tc.Rollouts(
        torch.arange(5),
        torch.tensor([0, 5]),
        torch.tensor([0]),
        None,
        token_rewards=torch.tensor([0.1, 0, 0.2, -0.1, 1], dtype=torch.float64),
        extras={"greedy_rewards": torch.tensor([0.75])},
    )
    advantages = tc.methods.remax().prepare(batch).advantages.tolist()
    assert advantages == pytest.approx([0.45, 0.35, 0.35, 0.15, 0.25])
    assert above_greedy(tc.credit.constant(1.0))(batch).tolist() == [[0.25]]


def test_defaults():
    assert tc.methods.remax() == tc.Objective(
        above_greedy(tc.credit.returns(1.0)), clip=tc.clip.ppo(0.2, 0.2), aggregation=tc.aggregation.token_mean()
    )
