import naive
import pytest
import tokcredit as tc
import torch


def test_formula():
    def formula(batch, log_probs):
        rewards, values, advantages = naive.token_rewards(batch), batch.extras["values"].tolist(), {}
        for row in naive.rows_of(batch):
            delta = [rewards[t] - values[t] for t in row]
            delta = [d + v for d, v in zip(delta, [*(values[t] for t in row[1:]), 0.0], strict=False)]
            advantages |= dict(zip(row, naive.to_go(delta, 0.7), strict=True))
        return naive.token_mean(batch, naive.token_ppo(batch, log_probs, naive.whitened(advantages), 0.8, 1.2))

    batch, current = naive.random_batch()
    naive.check(tc.methods.vc_ppo(trace=0.7), naive.with_inputs(batch, {"values"}), current, formula)


def test_by_hand():
    """With a lambda of 1 the targets are the returns, however far the values are off; masked tokens have none."""
    batch = tc.Rollouts(
        torch.arange(6),
        torch.tensor([0, 6]),
        torch.tensor([0]),
        None,
        torch.tensor([True, True, False, False, True, True]),
        token_rewards=torch.tensor([0, 0.1, 0, 0, 0, 1], dtype=torch.float64),
        extras={"values": torch.tensor([0.5, 0.6, 9, 7, 0.4, 0.8], dtype=torch.float64)},
    )
    objective = tc.methods.vc_ppo()
    assert objective.credit.of.targets(batch).tolist() == pytest.approx([1.1, 1.1, 0, 0, 1, 1])
    shorter = tc.methods.vc_ppo(target_trace=0.0).credit.of.targets(batch).tolist()
    assert shorter == pytest.approx([0.6, 0.5, 0, 0, 0.8, 1])


def test_defaults():
    assert tc.methods.vc_ppo() == tc.Objective(
        tc.credit.whitened(tc.credit.gae(trace=0.95, target_trace=1.0)),
        clip=tc.clip.ppo(0.2, 0.2),
        aggregation=tc.aggregation.token_mean(),
    )
