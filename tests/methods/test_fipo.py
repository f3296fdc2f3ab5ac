import math

import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.methods.fipo import future_kl


def factors(x, advantage, half_life, width, upward, safe, cap):
    """The factors of one row, from its log-ratios."""
    found, future, decay = [], 0.0, 2 ** (-1 / half_life)
    for y in reversed(x):
        future = (y if cap is None or math.exp(y) <= cap else 0.0) + decay * future
        low, high = (1.0 if upward else 1 - width, 1 + width) if width else (0.0, 10.0)
        w = min(max(math.exp(future), low), high)
        if advantage < 0 and math.exp(y) > safe:
            w = min(max(w, 0.8), 1.0)
        found.append(w)
    return found[::-1]


@pytest.mark.parametrize("upward", [False, True])
@pytest.mark.parametrize("width", [0.0, 0.3])
@pytest.mark.parametrize("drop_rows", [False, True])
def test_formula(upward, width, drop_rows):
    def formula(batch, log_probs):
        advantages, losses, dropped = naive.group_advantages(batch), [], 0
        for r, tokens in enumerate(naive.rows_of(batch)):
            q = [(log_probs[t] - batch.old_log_probs[t]).exp() for t in tokens]
            x = [y.log().item() for y in q]
            w = factors(x, advantages[r], 3.0, width, upward, 1.2, 1.5)
            if drop_rows and advantages[r] < 0 and sum(math.exp(y) > 1.5 for y in x) > 1:
                w, dropped = [0.0] * len(x), dropped + 1
            losses.append([naive.clipped(advantages[r] * f, y, 0.8, 1.28, 1.5) for f, y in zip(w, q, strict=True)])
        assert bool(dropped) == drop_rows
        return naive.token_mean(batch, losses)

    batch, current = naive.random_batch(seed=3)
    naive.check(tc.methods.fipo(0.2, 0.28, 3.0, width, upward, 1.2, 1.5, drop_rows), batch, current, formula)


def scale(stage, x, advantage):
    spans = tc.Spans.from_cu_seqlens(torch.tensor([0, len(x)]))
    x = torch.tensor(x, dtype=torch.float64)
    return stage(x, x, torch.tensor([[float(advantage)]], dtype=torch.float64), spans, None, None).tolist()


def test_by_hand():
    x = [0.2, 1.5, -0.3, 0.1]
    # F is .085 -.162 -.229 .1: the second log-ratio exceeds log 3 and does not count.
    two_sided = scale(future_kl(2.0, 0.2, False, 4.0, 3.0), x, -1)
    assert two_sided == pytest.approx([1.089104, 0.850329, 0.8, 1.105171], abs=1e-6)
    assert scale(future_kl(2.0, 0.2, True, 4.0, 3.0), x, -1) == pytest.approx([1.089104, 1, 1, 1.105171], abs=1e-6)
    assert scale(future_kl(2.0, 0.2, False, 4.0, None), x, 1) == pytest.approx([1.2, 1.2, 0.8, 1.105171], abs=1e-6)


def test_defaults():
    assert tc.methods.fipo() == tc.Objective(
        clip=tc.clip.ppo(0.2, 0.28, 10.0),
        scales=(future_kl(128.0, 0.2, True, 4.0, 10.0, False),),
        aggregation=tc.aggregation.token_mean(),
    )
