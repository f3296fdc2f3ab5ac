import math

import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.methods.divergence_weighted import divergence


@pytest.mark.parametrize("slope", [10.0, -30.0])
@pytest.mark.parametrize("seed", range(2))
def test_formula(slope, seed):
    def formula(batch, log_probs):
        losses = []
        for a, tokens in zip(naive.group_advantages(batch), naive.rows_of(batch), strict=True):
            losses.append([])
            for t in tokens:
                rho = (log_probs[t] - batch.old_log_probs[t]).exp()
                moved = rho.item() - 1 - math.log(rho.item())
                w = 1 + 0.8 * (1 / (1 + math.exp(-slope * moved)) - 0.5)
                losses[-1].append(naive.clipped(w * a, rho, 0.8, 1.28))
        return naive.token_mean(batch, losses)

    naive.check(tc.methods.divergence_weighted(0.8, slope), *naive.random_batch(seed), formula)


def log_ratio_of(k):
    """The positive log-ratio whose divergence is k, by bisection."""
    low, high = 0.0, 5.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if math.expm1(middle) - middle < k else (low, middle)
    return low


def test_by_hand():
    log_ratio = torch.tensor([log_ratio_of(k) for k in (0, 0.1, 1, 10)], dtype=torch.float64)
    high = divergence(1.0, 1.0)(None, log_ratio, None, None, None, None)
    low = divergence(1.0, -1.0)(None, log_ratio, None, None, None, None)
    assert high.tolist() == pytest.approx([1, 1.024979, 1.231059, 1.499955], abs=1e-6)
    assert low.tolist() == pytest.approx([1, 0.975021, 0.768941, 0.500045], abs=1e-6)


def test_the_first_step_is_that_of_dapo():
    batch, _ = naive.random_batch()
    grads = []
    for name in ("dapo", "divergence_weighted"):
        log_probs = batch.shaped(batch.old_log_probs.clone()).requires_grad_()
        objective = tc.methods.load(name)
        objective.loss(objective.prepare(batch), log_probs).loss.backward()
        grads.append(log_probs.grad)
    assert torch.equal(*grads)


def test_defaults():
    assert tc.methods.divergence_weighted() == tc.Objective(
        clip=tc.clip.ppo(low=0.2, high=0.28, cap=None),
        aggregation=tc.aggregation.token_mean(),
        scales=(divergence(strength=1.0, slope=10.0),),
    )
