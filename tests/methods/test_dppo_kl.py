import math

import naive
import pytest
import tokcredit as tc


def divergence(now, before):
    p, q = math.exp(before), math.exp(now)
    return p * (before - now) + (1 - p) * math.log((1 - p + 1e-8) / (1 - q + 1e-8))


@pytest.mark.parametrize("to", ["old_log_probs", "rollout_log_probs"])
def test_formula(to):
    def weight(now, before, advantage):
        towards = now > before if advantage > 0 else now < before
        stopped = towards and divergence(now, before) > (0.03 if advantage > 0 else 0.01)
        return 0.0 if stopped else min(math.exp(now - before), 1.5)

    def formula(batch, log_probs):
        losses = naive.scores(batch, log_probs, weight, to=to)
        return sum(sum(row) for row in losses) / 11 / 7

    batch, current = naive.random_batch()
    current = current.clamp(max=-0.01)  # probabilities below 1
    batch = naive.with_inputs(batch, {"rollout_log_probs"})
    naive.check(tc.methods.dppo_kl(0.01, 0.03, cap=1.5, to=to, max_length=7), batch, current, formula)


def test_by_hand():
    # Divergences .005 .144 .116 0 and .087 .041 .053: of the tokens that went where A pushes, the second is too far.
    found = naive.slopes(tc.methods.dppo_kl(0.1, 0.1, cap=3.0, to="old_log_probs"))
    assert found == pytest.approx([-1.1, 0, -0.777778, -1, 0.6, 0.2, 1.077778], abs=1e-6)
    found = naive.slopes(tc.methods.dppo_kl(0.06, 0.2, cap=3.0, to="old_log_probs"))
    assert found == pytest.approx([-1.1, -3, -0.777778, -1, 0, 0.2, 1.077778], abs=1e-6)


def test_defaults():
    assert tc.methods.dppo_kl() == tc.Objective(
        ratio=tc.ratio.token(bound=20.0, to="rollout_log_probs"),
        clip=tc.clip.gated("binary_kl", -0.05, 0.05, 0.0, 0.0, cap=math.log(10_000), both_sides=False),
        aggregation=tc.aggregation.sequence_sum(None),
    )
