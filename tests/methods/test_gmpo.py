import math

import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.methods.gmpo import clipped_mean

LOW, HIGH = 0.1, 0.2


def clipped(x, advantage):
    return x.clamp(max=HIGH) if advantage > 0 else x.clamp(min=-LOW) if advantage < 0 else x


def test_gradient_is_that_of_the_papers_loss():
    batch, current = naive.random_batch()
    advantages = naive.group_advantages(batch)
    ours, theirs = current.clone().requires_grad_(), current.clone().requires_grad_()
    objective = tc.methods.gmpo(LOW, HIGH)
    objective.loss(objective.prepare(batch), ours).loss.backward()
    x = theirs.reshape(-1) - batch.old_log_probs
    rows = [(r, tokens) for r, tokens in enumerate(naive.rows_of(batch)) if tokens]
    losses = [
        -advantages[r] * torch.stack([clipped(x[t], advantages[r]) for t in tokens]).mean().exp() for r, tokens in rows
    ]
    torch.stack(losses).mean().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-14)
    assert 0 < (ours.grad == 0).sum() - (~batch.response_mask).sum() < 40


def test_formula():
    def formula(batch, log_probs):
        advantages, losses = naive.group_advantages(batch), []
        for r, tokens in enumerate(naive.rows_of(batch)):
            x = [(log_probs[t] - batch.old_log_probs[t]).detach() for t in tokens]
            held = [clipped(y, advantages[r]) for y in x]
            weight = math.exp(sum(held) / len(held)) if held else 0.0
            losses.append(
                [-advantages[r] * weight * log_probs[t] * (y == h) for t, y, h in zip(tokens, x, held, strict=True)]
            )
        return naive.sequence_mean(batch, losses)

    naive.check(tc.methods.gmpo(LOW, HIGH), *naive.random_batch(), formula)


def test_by_hand():
    # Geometric means 1.0629 and 0.7853 of the ratios 1.1 1.49 .78 1 and .67 .67 1.08.
    found = naive.slopes(tc.methods.gmpo())
    assert found == pytest.approx([-1.062898, 0, -1.062898, -1.062898, 0, 0, 0.785292], abs=1e-6)


def test_defaults():
    assert tc.methods.gmpo() == tc.Objective(
        ratio=clipped_mean(0.4, 0.4, "old_log_probs"),
        clip=tc.clip.gated("difference", -0.4, 0.4, 0.0, 0.0, None, False),
        aggregation=tc.aggregation.sequence_mean(),
    )
