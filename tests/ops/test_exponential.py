"""The exponential of the native operations, seen through the ratio of rows of one token."""

import math

import pytest
import torch
from tokcredit import Spans, ops


@pytest.fixture
def ratios(device):
    def taken(x):
        rows = Spans.from_cu_seqlens(torch.arange(len(x) + 1))
        _, stats = ops.policy_loss(torch.zeros(len(x)), rows, "clip", log_ratio=x)
        return stats[:, ops.LOSS_STATS.index("ratio")]

    return taken


def test_within_two_units_of_the_last_place(ratios):
    x = torch.cat([torch.linspace(-87.3, 88.3, 200_001), torch.linspace(-1e-3, 1e-3, 2_001)])
    exact = x.double().exp()
    unit = torch.exp2(torch.log2(exact).floor() - 23)
    assert ((ratios(x) - exact).abs() / unit).max() < 2


def test_ends(ratios):
    x = torch.tensor([-math.inf, -1e30, -87.8, -87.6, 0.0, 88.3, 88.5, 1e30, math.inf, math.nan])
    q = ratios(x)
    assert q[:3].tolist() == [0, 0, 0] and q[3] > 0 and q[4] == 1 and q[5] < math.inf
    assert q[6:9].tolist() == [math.inf] * 3 and q[9].isnan()
