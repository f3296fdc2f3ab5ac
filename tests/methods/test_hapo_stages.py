"""HAPO's clip stage and advantage scale by themselves."""

import math

import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.methods.hapo import outside_center, widened
from tokcredit.stages.clip import Window

H = tc.token_score.given("entropies")


def factors(scale, log_ratio, window, signal):
    n = log_ratio.numel()
    return scale(torch.zeros(n), log_ratio, torch.ones(n), tc.Spans.single(n), window, signal)


def test_middle_half_of_the_window():
    """Ratios just inside and outside of 0.9 and 1.14, the middle of [0.8, 1.28]; h = 0.5, then -0.5."""
    log_ratio = torch.tensor([0.899, 0.901, 1.0, 1.139, 1.141]).log()
    window = Window("clip", math.log(0.8), math.log(1.28))
    scale = outside_center(H, strength=0.8)
    uncertain = factors(scale, log_ratio, window, torch.full((5,), 0.5))
    certain = factors(scale, log_ratio, window, torch.full((5,), -0.5))
    assert uncertain.tolist() == pytest.approx([1.4, 1, 1, 1, 1.4])
    assert certain.tolist() == pytest.approx([1, 0.6, 0.6, 0.6, 1])


def test_bounds_may_differ_between_tokens():
    window = Window("clip", -0.1, 0.1, power=2.0).per_token(tc.Spans.single(2))
    assert factors(outside_center(H), torch.tensor([0.08, 0.08]), window, torch.ones(2)).tolist() == [2.0, 1.0]
    open_below = Window("clip", -math.inf, torch.tensor([0.1, 0.1]))
    ours = factors(outside_center(H), torch.tensor([-0.6, -0.8]), open_below, torch.ones(2))
    assert ours.tolist() == [1.0, 2.0]  # half of the way to a ratio of 0


def test_reads_the_score_that_widened_the_window():
    """Computed once where both stages have it; another score is computed on its own."""
    batch, _ = naive.random_batch(entropies=torch.rand(12, 7))
    scale = outside_center(H, strength=0.8)
    shared = widened(H)(batch, batch.rewards[:, None])
    plain = tc.clip.ppo()(batch, batch.rewards[:, None])
    assert scale.signal(batch, shared) is shared.score
    assert torch.equal(scale.signal(batch, plain), batch.entropies)
    chosen = batch.selection(torch.tensor([3]))
    assert torch.equal(shared.take(chosen).score, batch.entropies[21:28])
    assert torch.equal(shared.take(chosen).low, shared.low[21:28])
