import naive
import pytest
import tokcredit as tc
import torch


def estimates(rewards, values, discount, trace, after=0.0):
    """Generalized advantage estimates of one trajectory, as lists."""
    found, advantage, following = [], 0.0, after
    for r, v in zip(reversed(rewards), reversed(values), strict=True):
        advantage = r + discount * following - v + discount * trace * advantage
        found.append(advantage)
        following = v
    return found[::-1]


@pytest.mark.parametrize("dense", [False, True])
def test_formula(dense):
    def formula(batch, log_probs):
        rewards, values, advantages = naive.token_rewards(batch), batch.extras["values"].tolist(), {}
        after = batch.extras["bootstrap_values"].tolist()
        for r, row in enumerate(naive.rows_of(batch)):
            own = [rewards[t] - 0.1 * (batch.old_log_probs[t] - batch.ref_log_probs[t]).item() for t in row]
            advantages |= dict(zip(row, estimates(own, [values[t] for t in row], 0.9, 0.8, after[r]), strict=True))
        return naive.token_mean(batch, naive.token_ppo(batch, log_probs, naive.whitened(advantages), 0.8, 1.2))

    batch, current = naive.random_batch()
    names = {"values", "bootstrap_values", "ref_log_probs"} | ({"token_rewards"} if dense else set())
    batch = naive.with_inputs(batch, names)
    naive.check(tc.methods.ppo(discount=0.9, trace=0.8, kl=0.1), batch, current, formula)


def test_by_hand():
    """The reward of a model is at the last token, an implicit reward and a KL penalty at every token."""
    batch = tc.Rollouts(
        torch.arange(3),
        torch.tensor([0, 3]),
        torch.tensor([0]),
        torch.tensor([2.0], dtype=torch.float64),
        token_rewards=torch.tensor([0.015, -0.05, 0.01], dtype=torch.float64),
        old_log_probs=torch.tensor([-1, -2, -0.5], dtype=torch.float64),
        ref_log_probs=torch.tensor([-1.2, -1.5, -0.6], dtype=torch.float64),
        extras={"values": torch.tensor([0.5, 0.6, 0.7], dtype=torch.float64)},
    )
    before_whitening = tc.methods.ppo(kl=0.01).credit.of(batch).tolist()
    assert before_whitening == pytest.approx([1.34662250, 1.29855000, 1.30900000])


def test_defaults():
    assert tc.methods.ppo() == tc.Objective(
        tc.credit.whitened(tc.credit.gae(1.0, 0.95)),
        clip=tc.clip.ppo(0.2, 0.2),
        aggregation=tc.aggregation.token_mean(),
    )
