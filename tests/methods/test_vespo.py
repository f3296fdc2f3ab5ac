import math

import naive
import pytest
import tokcredit as tc
from tokcredit.methods.vespo import gamma


@pytest.mark.parametrize("to", ["old_log_probs", "rollout_log_probs"])
def test_formula(to):
    def formula(batch, log_probs):
        advantages, reference, losses = naive.group_advantages(batch), batch.input(to), []
        for r, tokens in enumerate(naive.rows_of(batch)):
            z = sum(max(min((log_probs[t] - reference[t]).item(), 20), -20) for t in tokens)
            z = min(max(z, math.log(1e-8)), 20)
            k, lam = (1.5, 2.5) if advantages[r] >= 0 else (3.5, 1.5)
            phi = math.exp(lam) * math.exp(z) ** k * math.exp(-lam * math.exp(z))
            losses.append([-phi * advantages[r] * log_probs[t] for t in tokens])
        return naive.token_mean(batch, losses)

    batch, current = naive.random_batch()
    batch = naive.with_inputs(batch, {"rollout_log_probs"})
    naive.check(tc.methods.vespo(1.5, 2.5, 3.5, 1.5, to=to), batch, current, formula)


def test_by_hand():
    # Sums of log-ratios 1.4534 and -2.0454.
    found = naive.slopes(tc.methods.vespo())
    assert found == pytest.approx([-0.000981463] * 4 + [0.012341924] * 3, abs=1e-9)
    # 1 on policy.
    batch, _ = naive.two_rows()
    assert naive.slopes(tc.methods.vespo(), batch, batch.shaped(batch.old_log_probs)) == pytest.approx(
        [-1] * 4 + [1] * 3
    )


def test_defaults():
    assert tc.methods.vespo() == tc.Objective(
        ratio=tc.ratio.sequence(bound=20.0, high=20.0, to="old_log_probs", over="sum"),
        clip=tc.clip.gated("ratio", 0.0, 0.0, 1.0, 1.0, None, True),
        scales=(gamma(2.0, 3.0, 3.0, 2.0),),
        aggregation=tc.aggregation.token_mean(),
    )
