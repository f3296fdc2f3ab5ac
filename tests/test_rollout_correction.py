"""verl's rollout correction as stages of an objective; ``tests/adapters/test_verl_gates.py`` compares it with verl."""

import math

import naive
import pytest
import tokcredit as tc
import torch

from_verl = tc.rollout_correction.from_verl


def batch_of():
    """A batch without old log-probs, whose engine differs from the current policy."""
    batch, current = naive.random_batch(2)
    g = torch.Generator().manual_seed(1)
    engine = current.reshape(-1) + 0.3 * torch.randn(84, generator=g, dtype=torch.float64)
    return batch.with_inputs(old_log_probs=None, rollout_log_probs=engine), current


def kept(batch, log_probs, rejects):
    """The tokens of each row that a rule keeps; the rule is given the log-ratios of the row, and the token's own."""
    out = []
    for tokens in naive.rows_of(batch):
        row = [(log_probs[t] - batch.rollout_log_probs[t]).item() for t in tokens]
        out.append([not rejects(row, x) for x in row])
    return out


@pytest.mark.parametrize(
    ("options", "thresholds", "rejects"),
    [
        (None, None, lambda row, x: False),
        ("token_k1", "0.8_1.3", lambda row, x: not math.log(0.8) <= -x <= math.log(1.3)),
        ("seq_mean_k3", 0.05, lambda row, x: sum(math.exp(y) - 1 - y for y in row) / len(row) > 0.05),
        ("seq_max_k2,token_k2", "0.2,0.1", lambda row, x: max(y * y / 2 for y in row) > 0.2 or x * x / 2 > 0.1),
    ],
)
def test_bypass_mode_with_a_clipped_loss(options, thresholds, rejects):
    def formula(batch, log_probs):
        engine, losses = batch.rollout_log_probs, []
        keep = kept(batch, log_probs, rejects)
        for a, tokens, own in zip(naive.group_advantages(batch), naive.rows_of(batch), keep, strict=True):
            each = [naive.clipped(a, (log_probs[t] - engine[t]).exp(), 0.8, 1.2) for t in tokens]
            losses.append([x if k else 0 * x for x, k in zip(each, own, strict=True)])
        return naive.sequence_mean(batch, losses)

    # rollout_is has no effect here.
    config = {"bypass_mode": True, "rollout_is": "token", "rollout_rs": options, "rollout_rs_threshold": thresholds}
    objective = from_verl(tc.methods.grpo(), config)
    batch, current = batch_of()
    naive.check(objective, batch, current, formula)
    flags = [x for row in kept(batch, current.reshape(-1), rejects) for x in row]
    assert options is None or 0 < sum(flags) < len(flags)
    assert objective.required_inputs == {"rollout_log_probs"}


@pytest.mark.parametrize(
    ("level", "threshold", "weight"),
    [
        (None, 2.0, lambda row, x: 1.0),
        ("token", 1.2, lambda row, x: min(math.exp(x), 1.2)),
        ("token", "0.8_1.3", lambda row, x: math.exp(x) if 0.8 <= math.exp(x) <= 1.3 else 0.0),
        ("sequence", 1.2, lambda row, x: min(math.exp(sum(row)), 1.2)),
        ("sequence", "0.5_1.5", lambda row, x: math.exp(sum(row)) if 0.5 <= math.exp(sum(row)) <= 1.5 else 0.0),
        ("token", None, lambda row, x: 1.0),
    ],
)
def test_bypass_mode_with_reinforce(level, threshold, weight):
    def formula(batch, log_probs):
        losses = []
        for a, tokens in zip(naive.group_advantages(batch), naive.rows_of(batch), strict=True):
            row = [(log_probs[t] - batch.rollout_log_probs[t]).item() for t in tokens]
            losses.append([-a * weight(row, x) * log_probs[t] for t, x in zip(tokens, row, strict=True)])
        return naive.sequence_mean(batch, losses)

    config = {"bypass_mode": True, "loss_type": "reinforce", "rollout_is": level, "rollout_is_threshold": threshold}
    naive.check(from_verl(tc.methods.grpo(), config), *batch_of(), formula)


def test_without_bypass_mode_stages_are_added():
    config = {"rollout_is": "token", "rollout_rs": "token_k2", "rollout_rs_threshold": 0.1}
    base = tc.mix("dapo", token_weights="within(low=0.5)", filters="nonzero_advantage()")
    found = from_verl(base, config)
    assert found.filters == (*base.filters, tc.filters.within("k2", high=0.1))
    assert found.token_weights == (*base.token_weights, tc.token_weights.importance())
    assert from_verl(base, {}) == base


def test_ratio_and_scales_of_the_objective_stay():
    found = from_verl(
        tc.methods.deepseek_v32(), {"bypass_mode": True, "rollout_rs": "token_k2", "rollout_rs_threshold": 1}
    )
    assert found.scales[:-1] == tc.methods.deepseek_v32().scales
    assert found.scales[-1] == tc.scale.within("k2", high=1.0, to="rollout_log_probs")
    found = from_verl(tc.methods.gspo(), {"bypass_mode": True})
    assert found.ratio == tc.ratio.sequence(to="rollout_log_probs") and found.clip == tc.methods.gspo().clip


def test_settings_of_trl():
    """``tests/adapters/test_trl.py`` compares them with TRL."""
    base = tc.mix("grpo", token_weights="within(low=0.5)", scales="vespo")
    assert tc.rollout_correction.from_trl(base, {"vllm_importance_sampling_correction": True}) == base
    found = tc.rollout_correction.from_trl(base, {"use_vllm": True, "off_policy_mask_threshold": 0.5})
    assert found.token_weights == (*base.token_weights, *tc.token_weights.from_trl({}))
    mask = tc.scale.within("difference", "mean", low=-0.5, signs="negative", to="rollout_log_probs")
    assert found.scales == (*base.scales, mask)
    (mask,) = tc.rollout_correction.from_trl(tc.methods.grpo(), {"off_policy_mask_threshold": 0.1}).scales
    assert mask.to == "old_log_probs" and mask.low == -0.1


@pytest.mark.parametrize(
    ("objective", "config", "message"),
    [
        (tc.methods.dro(), {}, r"objective: expected a ratio that divides by old_log_probs, got one\(\)"),
        (tc.methods.grpo(), {"loss_type": "ppo"}, "loss_type: expected ppo_clip or reinforce, got 'ppo'"),
        (tc.methods.grpo(), {"loss_type": "reinforce", "rollout_is": "row"}, "rollout_is: expected token, sequence or"),
        (
            tc.methods.grpo(),
            {"loss_type": "reinforce", "rollout_is": "token", "rollout_is_batch_normalize": True},
            "rollout_is_batch_normalize: expected False with loss_type=reinforce, .* got True",
        ),
    ],
)
def test_what_is_refused(objective, config, message):
    with pytest.raises(ValueError, match=message):
        from_verl(objective, {"bypass_mode": True, **config})
