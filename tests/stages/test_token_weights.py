import math

import naive
import pytest
import ragged
import tokcredit as tc
import torch


def engine_batch(seed=0):
    """A batch whose engine disagrees with the trainer and did not report one token."""
    engine = -torch.rand(12, 7, dtype=torch.float64, generator=ragged.generator(3))
    engine[0, 0] = math.nan
    return naive.random_batch(seed, rollout_log_probs=engine)


@pytest.mark.parametrize("whole_rows", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_importance_against_the_formula(whole_rows, masked):
    batch, _ = engine_batch()
    if masked:
        stage = tc.token_weights.importance_masked(0.5, 1.5, whole_rows)
    else:
        stage = tc.token_weights.importance_truncated(1.3, whole_rows)
    ours = stage(batch, batch.rewards[:, None])
    assert ours.shape == ((12, 1) if whole_rows else (84,)) and stage.required_inputs == {
        "old_log_probs",
        "rollout_log_probs",
    }
    seen = set()
    for r, tokens in enumerate(naive.rows_of(batch)):
        d = [(batch.old_log_probs[t] - batch.rollout_log_probs[t]).item() for t in tokens]
        d = [0.0 if math.isnan(x) else x for x in d]
        ratios = [math.exp(sum(d))] * len(d) if whole_rows else [math.exp(x) for x in d]
        for t, q in zip(tokens, ratios, strict=True):
            expected = (q if 0.5 <= q <= 1.5 else 0.0) if masked else min(q, 1.3)
            assert (ours[r, 0] if whole_rows else ours[t]).item() == pytest.approx(expected, rel=1e-12)
            seen.add(expected == q)
    assert seen == {True, False}, "a weight that never binds proves nothing"


def test_weights_leave_the_denominator():
    batch, _current = engine_batch()
    objective = tc.mix("dapo", token_weights=tc.token_weights.importance_masked(0.5, 1.5, False), filters=())
    plain = tc.mix("dapo", filters=())
    prepared = objective.prepare(batch)
    assert (prepared.multiplier[batch.response_mask] == 0).any()
    assert torch.equal(prepared.row_weights, plain.prepare(batch).row_weights)
    assert torch.equal(prepared.mask, batch.response_mask)


def test_raised():
    batch, _ = naive.random_batch()
    batch = naive.with_inputs(batch, {"entropies"})
    weight = tc.token_weights.raised(tc.token_score.given("entropies"), 0.7)(batch, None)
    torch.testing.assert_close(weight, 1 + 0.7 * batch.entropies, equal_nan=True)
    assert weight[batch.response_mask].std() > 0
