import dataclasses
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
        stage = tc.token_weights.importance("sum" if whole_rows else "token", 0.5, 1.5, "zero")
    else:
        stage = tc.token_weights.importance("sum" if whole_rows else "token", high=1.3)
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
    objective = tc.mix("dapo", token_weights=tc.token_weights.importance("token", 0.5, 1.5, "zero"), filters=())
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


def weights_of(stage):
    """Weights of the tokens of the two rows, or of the rows."""
    batch, _ = naive.two_rows()
    found = stage(batch, batch.rewards[:, None])
    return (found[:, 0] if found.dim() == 2 else found[batch.response_mask]).tolist()


def test_importance_by_hand():
    """Ratios 1.11 .83 1 .8 and 1 .25 .95; products .741 .237; geometric means .928 .619."""
    importance = tc.token_weights.importance
    ratios = [1.111111, 0.833333, 1, 0.8, 1, 0.25, 0.947368]
    assert weights_of(importance()) == pytest.approx(ratios, abs=1e-6)
    assert weights_of(importance("sum")) == pytest.approx([0.740741, 0.236842], abs=1e-6)
    assert weights_of(importance("mean")) == pytest.approx([0.927719, 0.618709], abs=1e-6)
    assert weights_of(importance("mean", 0.7, 0.9)) == pytest.approx([0.9, 0.7])
    # The second row is masked after its first token: turns of one token and of two.
    by_turn = [0.927719] * 4 + [1] + [(0.25 * 0.947368) ** 0.5] * 2
    assert weights_of(importance("turn")) == pytest.approx(by_turn, abs=1e-6)
    normalized = [x * 7 / sum(by_turn) for x in by_turn]
    assert weights_of(importance("turn", normalize=True)) == pytest.approx(normalized, abs=1e-6)
    # Clamped to 1.1 the mean is .847; of the clamped weights of rows it is .489.
    normalized = [1.298329, 0.983582, 1.180299, 0.944239, 1.180299, 0.295075, 1.118178]
    assert weights_of(importance(high=1.1, normalize=True)) == pytest.approx(normalized, abs=1e-6)
    assert weights_of(importance("sum", normalize=True)) == pytest.approx([1.515454, 0.484546], abs=1e-6)
    assert weights_of(tc.token_weights.icepop()) == pytest.approx([*ratios[:5], 0, ratios[6]], abs=1e-6)
    assert importance(normalize=True).compares_groups and not importance().compares_groups


def test_normalization_counts_tokens_that_filters_rejected():
    """As in verl, whose weights are made before tokens are rejected, whatever the order of the two."""
    batch, _ = naive.random_batch()
    batch = naive.with_inputs(batch, {"rollout_log_probs"})
    some = tc.filters.within("ratio", "token", 0.7, 1.4)
    for over in ("token", "turn", "sum", "mean"):
        weight = tc.token_weights.importance(over, normalize=True)
        filtered = tc.Objective(filters=(some,), token_weights=(weight,)).prepare(batch)
        assert 0 < filtered.lengths.sum() < batch.lengths.sum()
        assert torch.equal(filtered.multiplier, weight(batch, None))


def test_presets():
    importance = tc.token_weights.importance
    for preset, same in (
        (tc.token_weights.tis(), importance("token", 0.0, 2.0, "clamp")),
        (tc.token_weights.mis(), importance("sum", 0.0, 3.0, "zero")),
        (tc.token_weights.icepop(), importance("token", 0.5, 5.0, "zero")),
    ):
        assert isinstance(preset, importance)
        assert {f.name: getattr(preset, f.name) for f in dataclasses.fields(preset)} == vars(same)
    with pytest.raises(ValueError, match=r"importance: low: expected at most high, 0\.5, got 0\.6"):
        importance(low=0.6, high=0.5)


def test_settings_of_hosts():
    weights, importance = tc.token_weights, tc.token_weights.importance
    assert weights.from_verl({"rollout_is": None}) == weights.from_verl({}) == ()
    assert weights.from_verl({"rollout_is": "token", "rollout_is_threshold": None}) == ()
    assert weights.from_verl({"rollout_is": "token"}) == (importance("token", 0.0, 2.0, "clamp"),)
    both = {"rollout_is": "sequence", "rollout_is_threshold": "0.5_5", "rollout_is_batch_normalize": True}
    assert weights.from_verl(both) == (importance("sum", 0.5, 5.0, "zero", True),)
    for wrong, message in (
        ({"rollout_is": "row"}, "rollout_is: expected token, sequence or None, got 'row'"),
        ({"rollout_is": "token", "rollout_is_threshold": "1_2_3"}, "threshold: expected .*, got '1_2_3'"),
        ({"rollout_is": "token", "rollout_is_threshold": -1}, "threshold: expected .*, got -1"),
        ({"rollout_is": "token", "rollout_is_threshold": "2_1"}, "threshold: expected .*, got '2_1'"),
        ({"rollout_is": "token", "bypass_mode": True}, "bypass_mode: expected False"),
    ):
        with pytest.raises(ValueError, match=message):
            weights.from_verl(wrong)
    assert weights.from_trl({}) == (importance("sum", 0.0, 3.0, "zero"),)
    assert weights.from_trl({"vllm_importance_sampling_correction": False}) == ()
    named = {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": None}
    named["vllm_importance_sampling_clip_min"] = 0.3
    assert weights.from_trl(named) == (importance("token", 0.3, math.inf, "clamp"),)
    with pytest.raises(ValueError, match="vllm_importance_sampling_mode: expected"):
        weights.from_trl({"vllm_importance_sampling_mode": "row_mask"})
