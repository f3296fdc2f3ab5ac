import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.methods.vapo import imitation, rewarded
from tokcredit.stages.credit.returns import adaptive_trace


def test_formula():
    def formula(batch, log_probs):
        rewards, values, advantages = naive.token_rewards(batch), batch.extras["values"].tolist(), {}
        positive = []
        for r, row in enumerate(naive.rows_of(batch)):
            delta = [rewards[t] - values[t] for t in row]
            delta = [d + v for d, v in zip(delta, [*(values[t] for t in row[1:]), 0.0], strict=False)]
            trace = max(0.0, 1 - 1 / max(0.3 * len(row), 1))
            advantages |= dict(zip(row, naive.to_go(delta, trace), strict=True))
            positive += [-log_probs[t] for t in row if batch.rewards[r] > 0.4]
        losses = naive.token_ppo(batch, log_probs, naive.whitened(advantages), 0.8, 1.28)
        return naive.token_mean(batch, losses) + 0.2 * sum(positive) / len(positive)

    batch, current = naive.random_batch()
    batch = naive.with_inputs(batch, {"values"})
    naive.check(tc.methods.vapo(alpha=0.3, nll=0.2, above=0.4), batch, current, formula)


def test_by_hand():
    lengths = torch.tensor([19, 20, 21, 40, 400, 4000])
    assert adaptive_trace(lengths, 0.05).tolist() == pytest.approx([0, 0, 0.04761905, 0.5, 0.95, 0.995])
    # Two rows of two tokens are one trajectory of four, with a lambda of 0.5; a row alone would have 0.
    batch = tc.Rollouts(
        torch.arange(4),
        torch.tensor([0, 2, 4]),
        torch.zeros(2, dtype=torch.long),
        None,
        token_rewards=torch.tensor([0, 0.1, 0, 1], dtype=torch.float64),
        trajectory_ids=torch.zeros(2, dtype=torch.long),
        extras={"values": torch.tensor([0.5, 0.6, 0.4, 0.8], dtype=torch.float64)},
    )
    stage = tc.methods.vapo(alpha=0.5).credit.of
    assert stage(batch.whole).tolist() == pytest.approx([0.175, 0.15, 0.5, 0.2])
    assert stage.targets(batch).tolist() == pytest.approx([1.1, 1.1, 1, 1])


def test_imitation_by_hand():
    """Log-probs -0.1, -0.2 | -0.3 | -0.5, -0.7, -0.9, of which the second trajectory is wrong: 0.1 * 2.4 / 5."""
    batch = tc.Rollouts(
        torch.arange(6),
        torch.tensor([0, 2, 3, 6]),
        torch.zeros(3, dtype=torch.long),
        torch.tensor([1.0, 0, 1], dtype=torch.float64),
        extras={"values": torch.zeros(6, dtype=torch.float64)},
    )
    log_probs = torch.tensor([-0.1, -0.2, -0.3, -0.5, -0.7, -0.9], dtype=torch.float64)
    objective = tc.methods.vapo()
    prepared = objective.prepare(batch)
    out = objective.loss(prepared, log_probs)
    assert (out.loss - out.metrics["policy_loss"]).item() == pytest.approx(0.048)
    parts = [objective.loss(prepared.select(r), log_probs[t]) for r, t in (([0], slice(2)), ([1, 2], slice(2, 6)))]
    assert sum(x.loss.item() for x in parts) == pytest.approx(out.loss.item())


def test_defaults():
    assert tc.methods.vapo() == tc.Objective(
        tc.credit.whitened(tc.credit.gae(1.0, adaptive=0.05, target_trace=1.0)),
        clip=tc.clip.ppo(0.2, 0.28),
        aggregation=tc.aggregation.token_mean(),
        terms=(imitation(0.1, rewarded(0.0), tc.aggregation.token_mean()),),
    )
