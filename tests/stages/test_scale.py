import math

import naive
import pytest
import tokcredit as tc
from tokcredit.methods.hapo import outside_center
from tokcredit.methods.hapo import widened
import torch
from tokcredit.stages.clip import Window

H = tc.token_score.given("entropies")


def test_middle_half_of_the_window():
    """Ratios just inside and outside of 0.9 and 1.14, the middle of [0.8, 1.28]; h = 0.5, then -0.5."""
    log_ratio = torch.tensor([0.899, 0.901, 1.0, 1.139, 1.141]).log()
    window = Window("clip", math.log(0.8), math.log(1.28))
    gain = outside_center(H, strength=0.8)
    uncertain = gain(log_ratio, window, torch.full((5,), 0.5))
    certain = gain(log_ratio, window, torch.full((5,), -0.5))
    assert uncertain.tolist() == pytest.approx([1.4, 1, 1, 1, 1.4])
    assert certain.tolist() == pytest.approx([1, 0.6, 0.6, 0.6, 1])


def test_windows_may_differ_between_tokens():
    window = Window("clip", -0.1, 0.1, power=2.0).spelled_out(tc.ops.Rows(torch.tensor([0]), torch.tensor([2])), 2)
    gain = outside_center(H)(torch.tensor([0.08, 0.08]), window, torch.ones(2))
    assert gain.tolist() == [2.0, 1.0]
    open_below = Window("clip", -math.inf, torch.tensor([0.1, 0.1]))
    gain = outside_center(H)(torch.tensor([-0.6, -0.8]), open_below, torch.ones(2))
    assert gain.tolist() == [1.0, 2.0]  # half of the way to 0


def test_reads_the_score_that_widened_the_window():
    """Asked for once where both have it; another score is asked for on its own."""
    batch, _ = naive.random_batch(entropies=torch.rand(12, 7))
    gain = outside_center(H, strength=0.8)
    shared, own = widened(H)(batch), widened(tc.token_score.scaled(H))(batch)
    assert gain.signal(batch, shared) is None
    assert torch.equal(gain.signal(batch, own), batch.entropies)
    log_ratio = torch.linspace(-0.4, 0.4, batch.num_tokens)
    torch.testing.assert_close(gain(log_ratio, shared, None), gain(log_ratio, shared, batch.entropies))
    assert shared.at(torch.tensor([3])).h == batch.entropies[3]


@pytest.mark.parametrize("ratio", [tc.ratio.token(), tc.ratio.sequence(), tc.ratio.cumulative(), tc.ratio.one()])
def test_sees_the_ratio_of_the_loss(ratio):
    rows = tc.ops.Rows(torch.tensor([0, 3]), torch.tensor([3, 5]), torch.tensor([True, False, True, True, True]))
    log_probs, old = torch.tensor([0.3, 9.0, -0.1, 0.2, 40.0]), torch.zeros(5)
    seen = ratio(rows, log_probs, old).per_token(rows, log_probs)[rows.mask].tolist()
    expected = {
        "token": [0.3, -0.1, 0.2, 20.0],
        "sequence": [0.1, 0.1, 10.0, 10.0],
        "cumulative": [0.3, 0.2, 0.2, 10.0],
        "one": [0.0, 0.0, 0.0, 0.0],
    }
    assert seen == pytest.approx(expected[type(ratio).__name__])
