import dataclasses
import math

import naive
import pytest
import tokcredit as tc
from tokcredit.methods.ce_gppo import stopped_above


def test_formula():
    def weight(now, before, advantage):
        q = math.exp(now - before)
        if advantage < 0:
            return 0.0 if q > 1.3 else 0.6 * 0.9 if q < 0.9 else q
        return 0.8 * 1.2 if q > 1.2 else q

    def formula(batch, log_probs):
        return naive.token_mean(batch, naive.scores(batch, log_probs, weight))

    naive.check(tc.methods.ce_gppo(0.1, 0.2, 0.6, 0.8, cap=1.3), *naive.random_batch(), formula)


def test_by_hand():
    found = naive.slopes(tc.methods.ce_gppo(share_low=0.75, share_high=0.5))
    assert found == pytest.approx([-1.1, -0.6, -0.777778, -1, 0.6, 0.6, 1.077778], abs=1e-6)
    # Shares of 0 are PPO.
    zero = naive.slopes(tc.methods.ce_gppo(share_low=0.0, share_high=0.0))
    ppo = dataclasses.replace(tc.methods.ce_gppo(cap=None), clip=tc.clip.ppo(0.2, 0.2))
    assert zero == pytest.approx(naive.slopes(ppo))
    assert zero == pytest.approx([-1.1, 0, -0.777778, -1, 0, 0, 1.077778], abs=1e-6)
    # A cap of 1.05 stops the last token.
    assert naive.slopes(tc.methods.ce_gppo(cap=1.05))[-1] == 0


def test_defaults():
    assert tc.methods.ce_gppo() == tc.Objective(
        clip=tc.clip.gated("ratio", math.log(0.8), math.log1p(0.2), 0.75, 1.0, None, False),
        scales=(stopped_above(10.0),),
        aggregation=tc.aggregation.token_mean(),
    )
