"""The two parts of an objective, without a host: together they are the whole, and each refuses what it cannot carry."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import tokcredit as tc
import torch
from tokcredit.adapters import two_phase
from tokcredit.adapters.capabilities import arguments, host_fields, policy_methods
from tokcredit.adapters.rows import HostRows

sys.path.insert(0, str(Path(__file__).parent))

import rows as rr

ROWS = rr.batch()
BATCH = rr.rollouts(ROWS)
LOG_PROBS = torch.cat([row["log_probs"] for row in ROWS])


@dataclass(frozen=True)
class by_group(tc.clip.ppo):
    reads_rollouts: ClassVar[bool] = True


@dataclass(frozen=True)
class wide(tc.scale.within):
    whole_batch: ClassVar[bool] = True


@dataclass(frozen=True)
class minus_one(tc.token_weights.TokenWeight):
    def __call__(self, batch, advantages):
        return -torch.ones(batch.num_rows, 1)


def both_parts(objective, **denominators):
    """Loss and gradient through the two parts, packed."""
    advantages = two_phase.advantages(two_phase.advantage_part(objective, "host"), BATCH, "host")
    log_probs = LOG_PROBS.clone().requires_grad_()
    out = two_phase.loss(
        two_phase.loss_part(objective, "host", "beta"),
        log_probs,
        BATCH.old_log_probs,
        advantages,
        BATCH.response_mask,
        BATCH.cu_seqlens,
        **denominators,
    )
    out.loss.backward()
    return out, log_probs.grad


@pytest.mark.parametrize(
    "objective",
    [
        tc.methods.tempo(),
        tc.mix("ctpo", credit="tempo"),
        tc.mix("gspo", token_weights="importance(high=1.1)"),
        tc.mix("grpo", scales="divergence(strength=2.0)"),
    ],
    ids=["tempo", "tempo_ctpo", "gspo_weighted", "grpo_scaled"],
)
def test_the_parts_are_the_whole(objective):
    _, loss, gradient = rr.expected(objective, ROWS)
    out, found = both_parts(objective)
    torch.testing.assert_close(out.loss.detach(), loss)
    torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-8)


def test_denominators_of_the_host():
    objective = tc.methods.tempo()
    whole, doubled = both_parts(objective), both_parts(objective, batch_num_tokens=2 * int(BATCH.lengths.sum()))
    torch.testing.assert_close(2 * doubled[1], whole[1])


def test_weights_of_the_host():
    part = two_phase.loss_part(tc.methods.tempo(), "host", "beta")
    arguments = (LOG_PROBS[None], BATCH.old_log_probs[None], torch.ones(1, len(LOG_PROBS)), BATCH.response_mask[None])
    plain = two_phase.loss(part, *arguments)
    weighted = two_phase.loss(part, *arguments, weights=torch.full((1, len(LOG_PROBS)), 3.0))
    torch.testing.assert_close(weighted.loss, 3 * plain.loss)
    assert plain.loss != 0


def test_rows_padded_on_either_side():
    """Advantages of left-padded rows are those of the packed rows, and 0 on padding."""
    lengths = torch.tensor([len(row["response"]) for row in ROWS])
    tokens = rr.left([row["response"] for row in ROWS])
    real = torch.arange(tokens.shape[1]).flip(0) < lengths[:, None]
    mask = rr.left([row["mask"].long() for row in ROWS])
    part = two_phase.advantage_part(tc.methods.tempo(), "host")
    found = two_phase.advantages_padded(part, tokens, real, mask, BATCH.group_ids, BATCH.rewards, "host")
    torch.testing.assert_close(found[real], tc.methods.tempo().prepare(BATCH).advantages)
    assert (found[~real] == 0).all()


def test_rewards_of_tokens_may_sum_to_the_outcomes():
    """By chance they do in every row; both count."""
    real, tokens = torch.ones(2, 2), torch.zeros(2, 2, dtype=torch.long)
    dense = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    part = two_phase.advantage_part(tc.Objective(tc.credit.returns()), "host")
    groups, outcomes = torch.arange(2), dense.sum(1)
    rows = HostRows(groups, outcomes, dense)
    for given, named in ((rows, {}), (rows._replace(token_rewards=None), {"token_rewards": dense})):
        found = two_phase.advantages_padded(part, tokens, real, real, groups, given, "host", **named)
        assert found.tolist() == [[2.0, 1.0], [4.0, 4.0]]


def test_groups_of_prompts():
    tokens = torch.tensor([[7, 8, 1, 2], [7, 9, 1, 2], [7, 8, 3, 4]])
    mask = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 0]])
    first, second, third = two_phase.prompt_groups(tokens, mask).tolist()
    assert first == third != second
    assert two_phase.group_ids(["b", "a", "b"]).tolist() == [0, 1, 0]


def test_metrics_are_numbers():
    out, _ = both_parts(tc.methods.tempo())
    names = {"ratio_mean", "kl_k3_mean", "clip_low_fraction", "clip_high_fraction", "clip_cap_fraction"}
    found = two_phase.metrics(out)
    assert found.keys() == {f"tokcredit/{name}" for name in names | {"nonfinite_log_probs"}}
    assert found["tokcredit/ratio_mean"] == pytest.approx(out.metrics["ratio_mean"].item())


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (tc.mix("grpo", clip=by_group()), "expected a clip stage that reads neither token ids nor groups, .* of host"),
        (tc.mix("grpo", scales=wide(low=0.5)), "expected a scale stage that reads neither token ids nor groups"),
        (tc.methods.hapo(), "expected a clip stage that reads neither token ids nor groups"),
        (tc.mix("grpo", ratio=tc.ratio.token(to="rollout_log_probs")), "ratio stage .* which requires rollout_log"),
        (tc.mix("grpo", terms="kl(0.1)"), r"no terms, because host adds its own \(beta for KL\), got \(kl"),
        (tc.methods.ba(), "aggregation stage without group statistics"),
        (tc.methods.real(), r"expected scales that do not compare the rows of a group, because host .* got misclassi"),
    ],
)
def test_losses_that_are_refused(objective, message):
    with pytest.raises(ValueError, match=f"objective: .*{message}"):
        two_phase.loss_part(objective, "host", "beta")


def test_advantages_that_are_refused():
    with pytest.raises(ValueError, match=r"expected no filters, because host .* got .*nonzero_advantage"):
        two_phase.advantage_part(tc.mix("grpo", filters="nonzero_advantage()"), "host")
    part = two_phase.advantage_part(tc.mix("grpo", token_weights=minus_one()), "host")
    with pytest.raises(ValueError, match=r"token weights of at least 0, .* got -1\.0"):
        two_phase.advantages(part, BATCH, "host")
    part = two_phase.advantage_part(tc.methods.otb(), "host")
    carried = r"host with this batch carries \(old_log_probs, rollout_log_probs\), got .* requires squared_probs"
    with pytest.raises(ValueError, match=carried):
        two_phase.advantages(part, BATCH, "host")


def test_denominators():
    grpo = tc.methods.grpo()
    assert two_phase.denominator(tc.methods.tempo(), "host") == "batch_num_tokens"
    assert two_phase.denominator(grpo, "host") == "global_batch_size"
    summed = replace(grpo, aggregation=tc.aggregation.sequence_sum(8))
    assert two_phase.denominator(summed, "host") == "global_batch_size"
    with pytest.raises(ValueError, match="expected a length in the aggregation stage, because host shows the loss"):
        two_phase.denominator(tc.methods.dr_grpo(), "host")
    with pytest.raises(ValueError, match="expected an aggregation stage that is a mean, got token_sum"):
        two_phase.denominator(replace(grpo, aggregation=tc.aggregation.token_sum()), "host")


def test_names_of_aggregations():
    names = {tc.aggregation.token_mean: "token-mean"}
    assert two_phase.host_aggregation(tc.aggregation.token_mean(), names, "host") == "token-mean"
    with pytest.raises(ValueError, match=r"expected one of aggregation\.token_mean, which host has too, got seq"):
        two_phase.host_aggregation(tc.aggregation.sequence_mean(), names, "host")


def test_inputs_are_those_of_the_registry():
    with pytest.raises(ValueError, match="input: expected a registered name, got 'entropys'; did you mean entropies"):
        host_fields(entropys="entropy")
    x = torch.zeros(3)
    assert arguments({"old_log_probs": x, "weights": x}) == {"old_log_probs": x, "extras": {"weights": x}}
    assert {"advantages", "weights", "importance_sampling_ratio"} <= tc.inputs.names("host")


def test_methods_of_hosts_are_policy_gradients():
    assert {"grpo", "tempo", "ctpo"} <= policy_methods().keys()
    assert not {"dpo", "sft", "tip"} & policy_methods().keys()
