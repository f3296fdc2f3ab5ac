import math

import naive
import pytest
import tokcredit as tc
import torch


@pytest.mark.parametrize("renormalize", [False, True])
def test_formula(renormalize):
    def formula(batch, log_probs):
        advantages = [min(a, 0.0) for a in naive.group_advantages(batch)]
        losses = []
        for a, tokens in zip(advantages, naive.rows_of(batch), strict=True):
            ratio = sum(log_probs[t] - batch.old_log_probs[t] for t in tokens) / max(len(tokens), 1)
            losses.append([naive.clipped(a, ratio.exp(), 0.9, 1.1)] if tokens else [])
        if renormalize:
            losses = [row if advantages[r] else [] for r, row in enumerate(losses)]
        return naive.sequence_mean(batch, losses)

    naive.check(tc.methods.gspo_n(0.1, 0.1, renormalize=renormalize), *naive.random_batch(), formula)


def test_by_hand():
    # Rewards 1, 0, 0: mean 1/3, sample std 0.57735. The first row is left alone, and stays in the mean over three rows.
    batch = tc.Rollouts(
        torch.arange(4), torch.tensor([0, 1, 2, 4]), torch.zeros(3, dtype=torch.long), torch.tensor([1.0, 0.0, 0.0])
    )
    log_probs = torch.zeros(4, requires_grad=True)
    objective = tc.methods.gspo_n()
    prepared = objective.prepare(batch)
    assert prepared.advantages.tolist() == pytest.approx([0, -0.57735, -0.57735, -0.57735], abs=1e-5)
    assert prepared.has_gradient.tolist() == [False, True, True]
    objective.loss(prepared, log_probs).loss.backward()
    assert log_probs.grad.tolist() == pytest.approx([0, 0.19245, 0.096225, 0.096225], abs=1e-5)


def test_defaults():
    assert tc.methods.gspo_n() == tc.Objective(
        credit=tc.credit.negative_part(tc.credit.group_normalized(scale=True, epsilon=1e-6, count_empty=False)),
        ratio=tc.ratio.sequence(bound=math.inf, high=10.0, to="old_log_probs"),
        clip=tc.clip.ppo(low=3e-4, high=4e-4, cap=None),
    )
