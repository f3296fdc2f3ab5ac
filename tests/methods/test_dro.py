import dataclasses

import naive
import pytest
import tokcredit as tc


def test_formula():
    def formula(batch, log_probs):
        advantages, losses = naive.group_advantages(batch), []
        for r, tokens in enumerate(naive.rows_of(batch)):
            score = [-advantages[r] * log_probs[t] for t in tokens]
            pull = [0.25 * (log_probs[t] - batch.old_log_probs[t]) ** 2 for t in tokens]
            losses.append([a + b for a, b in zip(score, pull, strict=True)])
        return naive.token_mean(batch, losses)

    naive.check(tc.methods.dro(0.5), *naive.random_batch(), formula)


def test_by_hand():
    objective = tc.methods.dro(0.5)
    found = naive.slopes(dataclasses.replace(objective, terms=()))
    assert found == pytest.approx([-1] * 4 + [1] * 3)
    found = naive.slopes(objective)
    assert found == pytest.approx([-0.952345, -0.195281, -1.125657, -1, 0.744587, 0.195281, 1.037451], abs=1e-6)


def test_defaults():
    assert tc.methods.dro() == tc.Objective(
        ratio=tc.ratio.one(),
        clip=tc.clip.gated(),
        aggregation=tc.aggregation.token_mean(),
        terms=(tc.term.kl(0.1, "k2", to="old_log_probs"),),
    )
