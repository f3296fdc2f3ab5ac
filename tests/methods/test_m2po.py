import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.methods.m2po import second_moment

BUDGET = 0.02


def test_formula():
    def formula(batch, log_probs):
        advantages, behaviour = naive.group_advantages(batch), batch.rollout_log_probs
        tokens = [(r, t) for r, row in enumerate(naive.rows_of(batch)) for t in row]
        x = {t: (batch.old_log_probs[t] - behaviour[t]).item() for _, t in tokens}
        harmful = sorted((x[t] ** 2, t) for r, t in tokens if advantages[r] * x[t] > 0)
        kept, total = set(x) - {t for _, t in harmful}, 0.0
        for k, (square, t) in enumerate(harmful):
            total += square
            if total / (k + 1) > BUDGET:
                break
            kept.add(t)
        assert 0 < len(harmful) - sum(t in kept for _, t in harmful) < len(harmful)
        losses = [
            [-advantages[r] * (log_probs[t] - behaviour[t]).exp() * (t in kept) for t in row]
            for r, row in enumerate(naive.rows_of(batch))
        ]
        return naive.token_mean(batch, losses)

    batch, current = naive.random_batch()
    batch = batch.with_inputs(rollout_log_probs=batch.old_log_probs + 0.3 * torch.randn(84, dtype=torch.float64))
    naive.check(tc.methods.m2po(BUDGET), batch, current, formula)


def hand():
    x = torch.tensor([[0.1, 0.3, -0.5, 0.6], [-0.2, -0.8, 0.4, 0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]).bool()
    tokens = torch.zeros(2, 4, dtype=torch.long)
    rewards = torch.tensor([1.0, 0.0], dtype=torch.float64)
    return tc.Rollouts.from_padded(
        tokens, mask, tokens[:, 0], rewards, old_log_probs=x - 2, rollout_log_probs=torch.full_like(x, -2)
    )


def test_by_hand():
    # The squares of tokens that went where A pushes: .01 .04 .09 .36 .64 with running means .01 .025 .047 .125 .228.
    batch = hand()
    advantages = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    kept = second_moment(0.04)(batch, advantages)[batch.response_mask]
    assert kept.tolist() == [1, 0, 1, 0, 1, 0, 1]
    # All seven: .01 .04 .09 .16 .25 .36 .64 with running means .01 .025 .047 ...
    kept = second_moment(0.04, every_token=True)(batch, advantages)[batch.response_mask]
    assert kept.tolist() == [1, 0, 0, 0, 1, 0, 0]
    kept = second_moment(0.001, every_token=True)(batch, advantages)[batch.response_mask]
    assert kept.tolist() == [1, 0, 0, 0, 0, 0, 0]
    # Dropped tokens stay in the denominator.
    objective = tc.methods.m2po()
    current = batch.shaped(batch.old_log_probs).clone().requires_grad_()
    objective.loss(objective.prepare(batch), current).loss.backward()
    assert current.grad[0].tolist() == pytest.approx([-0.707106 * q / 7 for q in (1.105171, 0, 0.606531, 0)], abs=1e-5)


def test_defaults():
    assert tc.methods.m2po() == tc.Objective(
        token_weights=(second_moment(0.04, False, "old_log_probs", "rollout_log_probs"),),
        ratio=tc.ratio.token(to="rollout_log_probs"),
        clip=tc.clip.unclipped(),
        aggregation=tc.aggregation.token_mean(),
    )
