import math

import pytest
import tokcredit as tc
import torch


@pytest.mark.parametrize(("beta", "margin", "smoothing"), [(0.1, 0.0, 0.0), (2.0, 0.5, 0.0), (1.0, 0.3, 0.1)])
def test_logistic(beta, margin, smoothing):
    chosen, rejected = torch.tensor([2.0, -1.0, 0.0]).double(), torch.tensor([1.0, 1.0, 0.0]).double()
    ours = tc.link.logistic(beta, margin, smoothing)(chosen, rejected)
    for c, r, got in zip(chosen.tolist(), rejected.tolist(), ours.tolist(), strict=True):
        z = beta * (c - r) - margin
        expected = (1 - smoothing) * math.log1p(math.exp(-z)) + smoothing * math.log1p(math.exp(z))
        assert got == pytest.approx(expected)


def test_a_better_score_of_the_chosen_row_lowers_the_loss():
    chosen = torch.tensor([0.5], requires_grad=True)
    rejected = torch.tensor([0.25], requires_grad=True)
    tc.link.logistic(1.0)(chosen, rejected).sum().backward()
    assert chosen.grad.item() == pytest.approx(-1 / (1 + math.exp(0.25))) and rejected.grad == -chosen.grad


def test_large_scores_do_not_overflow():
    loss = tc.link.logistic(1.0)(torch.tensor([-1e4, 1e4]), torch.tensor([1e4, -1e4]))
    assert loss.tolist() == [2e4, 0.0]
