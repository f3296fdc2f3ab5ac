import naive
import pytest
import tokcredit as tc
import torch


@pytest.mark.parametrize("renormalize", [False, True])
def test_formula(renormalize):
    def formula(batch, log_probs):
        advantages = [min(a, 0.0) for a in naive.group_advantages(batch)]
        losses = naive.ppo(batch, log_probs, advantages, 0.8, 1.2)
        if renormalize:
            losses = [row if advantages[r] else [] for r, row in enumerate(losses)]
        return naive.sequence_mean(batch, losses)

    naive.check(tc.methods.grpo_n(renormalize=renormalize), *naive.random_batch(), formula)


def test_by_hand():
    # Rewards 1, 0, 0: mean 1/3, sample std 0.57735. The first row is left alone, and stays in the mean over three rows.
    batch = tc.Rollouts(
        torch.arange(4), torch.tensor([0, 1, 2, 4]), torch.zeros(3, dtype=torch.long), torch.tensor([1.0, 0.0, 0.0])
    )
    log_probs = torch.zeros(4, requires_grad=True)
    objective = tc.methods.grpo_n()
    prepared = objective.prepare(batch)
    assert prepared.advantages.tolist() == pytest.approx([0, -0.57735, -0.57735, -0.57735], abs=1e-5)
    assert prepared.has_gradient.tolist() == [False, True, True]
    objective.loss(prepared, log_probs).loss.backward()
    assert log_probs.grad.tolist() == pytest.approx([0, 0.19245, 0.096225, 0.096225], abs=1e-5)


def test_defaults():
    assert tc.methods.grpo_n() == tc.Objective(
        credit=tc.credit.negative_part(tc.credit.group_normalized(scale=True, epsilon=1e-6, count_empty=False))
    )
