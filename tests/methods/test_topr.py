import math

import naive
import pytest
import tokcredit as tc
from tokcredit.methods.topr import reward, tapered


@pytest.mark.parametrize("token_ratio", [False, True])
@pytest.mark.parametrize("baseline", [False, True])
def test_formula(token_ratio, baseline):
    batch, current = naive.random_batch()
    if not baseline:
        batch = batch.with_rewards(batch.rewards - 0.6)

    def formula(batch, log_probs):
        advantages = naive.group_advantages(batch) if baseline else batch.rewards.tolist()
        losses = []
        for r, tokens in enumerate(naive.rows_of(batch)):
            x = [(log_probs[t] - batch.old_log_probs[t]).item() for t in tokens]
            x = x if token_ratio else [sum(x)] * len(x)
            weight = [1.0 if advantages[r] >= 0 else min(math.exp(y), 1.0) for y in x]
            losses.append([-advantages[r] * w * log_probs[t] for w, t in zip(weight, tokens, strict=True)])
        return naive.token_mean(batch, losses)

    naive.check(tc.methods.topr(baseline, token_ratio), batch, current, formula)


def test_by_hand():
    found = naive.slopes(tc.methods.topr())
    assert found == pytest.approx([-1] * 4 + [0.129333] * 3, abs=1e-6)
    found = naive.slopes(tc.methods.topr(token_ratio=True))
    assert found == pytest.approx([-1] * 4 + [0.6, 0.2, 1], abs=1e-6)


def test_defaults():
    assert tc.methods.topr() == tc.Objective(
        ratio=tc.ratio.sequence(20.0, 20.0, "old_log_probs", "sum"),
        clip=tapered(),
        aggregation=tc.aggregation.token_mean(),
    )
    assert tc.methods.topr(baseline=False).credit == reward()
