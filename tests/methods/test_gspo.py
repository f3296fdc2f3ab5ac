import math

import naive
import pytest
import tokcredit as tc
import torch


@pytest.mark.parametrize("seed", range(3))
def test_formula(seed):
    """The sequence form: one ratio per row with the gradient through all of its tokens."""

    def formula(batch, log_probs):
        advantages = naive.group_advantages(batch)
        losses = []
        for r, tokens in enumerate(naive.rows_of(batch)):
            if tokens:
                ratio = sum(log_probs[t] - batch.old_log_probs[t] for t in tokens) / len(tokens)
                losses.append([naive.clipped(advantages[r], ratio.exp(), 0.9, 1.1)])
        return naive.sequence_mean(batch, losses)

    naive.check(tc.methods.gspo(0.1, 0.1), *naive.random_batch(seed), formula)


def test_by_hand():
    # Log-ratios 0.2 and 0 average to 0.1, whatever each token's own ratio.
    batch = tc.Rollouts(
        torch.arange(3),
        torch.tensor([0, 2, 3]),
        torch.tensor([0, 0]),
        torch.tensor([1.0, 0.0]),
        old_log_probs=torch.tensor([-0.2, 0.0, 0.0]),
    )
    objective = tc.methods.gspo(1.0, 1.0)
    out = objective.loss(objective.prepare(batch), torch.zeros(3))
    assert out.loss.item() == pytest.approx(0.5 * (-1.1051709 + 1.0) * 0.7071057, abs=1e-5)


def test_token_ratios_are_not_bounded_before_the_mean():
    # Log-ratios -40 and 0 average to -20; only the mean is held below 10.
    batch = tc.Rollouts(
        torch.arange(4),
        torch.tensor([0, 2, 4]),
        torch.tensor([0, 0]),
        torch.tensor([0.0, 1.0]),
        old_log_probs=torch.tensor([0.0, 0.0, -60.0, 0.0], dtype=torch.float64),
    )
    log_probs = torch.tensor([-40.0, 0.0, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    objective = tc.mix("gspo", clip="unclipped")
    out = objective.loss(objective.prepare(batch), log_probs)
    out.loss.backward()
    advantage = 0.5 / (0.5**0.5 + 1e-6)
    assert out.loss.item() == pytest.approx(advantage * (math.exp(-20) - math.exp(10)) / 2, rel=1e-6)
    assert log_probs.grad.tolist() == pytest.approx([advantage * math.exp(-20) / 4] * 2 + [0, 0], rel=1e-6)


def test_defaults():
    assert tc.methods.gspo() == tc.Objective(
        ratio=tc.ratio.sequence(bound=math.inf, high=10.0, to="old_log_probs"),
        clip=tc.clip.ppo(low=3e-4, high=4e-4, cap=None),
    )
