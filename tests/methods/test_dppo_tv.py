import math

import naive
import pytest
import tokcredit as tc


@pytest.mark.parametrize("to", ["old_log_probs", "rollout_log_probs"])
def test_formula(to):
    def weight(now, before, advantage):
        change = math.exp(now) - math.exp(before)
        stopped = change > 0.1 if advantage > 0 else change < -0.2
        return 0.0 if stopped else min(math.exp(now - before), 1.5)

    def formula(batch, log_probs):
        losses = naive.scores(batch, log_probs, weight, to=to)
        return sum(sum(row) for row in losses) / 11 / 7

    batch, current = naive.random_batch()
    batch = naive.with_inputs(batch, {"rollout_log_probs"})
    naive.check(tc.methods.dppo_tv(0.2, 0.1, cap=1.5, to=to, max_length=7), batch, current, formula)


def test_by_hand():
    # The second token rose by 0.2 and the fifth fell by 0.2.
    found = naive.slopes(tc.methods.dppo_tv(cap=3.0, to="old_log_probs"))
    assert found == pytest.approx([-1.1, 0, -0.777778, -1, 0, 0.2, 1.077778], abs=1e-6)
    # Relative to the engine, with a cap of 1.
    found = naive.slopes(tc.methods.dppo_tv(cap=1.0))
    assert found == pytest.approx([-1, 0, -0.777778, -0.8, 0, 0, 1], abs=1e-6)


def test_defaults():
    assert tc.methods.dppo_tv() == tc.Objective(
        ratio=tc.ratio.token(bound=20.0, to="rollout_log_probs"),
        clip=tc.clip.gated("probability", -0.15, 0.15, 0.0, 0.0, cap=math.log(10_000), both_sides=False),
        aggregation=tc.aggregation.sequence_sum(None),
    )
