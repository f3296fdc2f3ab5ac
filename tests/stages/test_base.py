import dataclasses

import naive
import pytest
import tokcredit as tc
import torch
from tokcredit import schedule


def nested():
    """Evidence, whole-batch statistics and a schedule, each below two other choices."""
    h = tc.token_score.scaled(tc.token_score.given("entropies"), 0.98)
    kept = tc.filters.top_share(
        schedule.linear(0.2, 0.6), tc.token_score.either(h, tc.token_score.given("reverse_kl")), per_row=True
    )
    return dataclasses.replace(tc.methods.grpo(), weights=(tc.filters.nonzero_advantage(), kept))


def test_what_parts_need_the_whole_needs():
    assert nested().required_inputs == {"entropies", "reverse_kl"}
    assert dataclasses.replace(nested(), terms=(tc.term.kl(estimator="k3"),)).required_inputs == {"entropies", "reverse_kl", "ref_log_probs"}
    assert tc.methods.grpo().required_inputs == frozenset()
    assert tc.credit.whitened(tc.credit.value_changes(), below=0.9).required_inputs == {"state_values", "old_log_probs"}


def test_parts_need_not_be_ours():
    @dataclasses.dataclass(frozen=True)
    class foreign:
        required_inputs = frozenset({"entropies"})
        compares_groups = True

        def __call__(self, batch):
            return batch.rewards[:, None]

    objective = tc.Objective(tc.credit.negative_part(foreign()))
    assert objective.required_inputs == {"entropies"} and objective.compares_groups and not objective.is_scheduled


def test_what_parts_span_the_whole_spans():
    assert nested().compares_groups
    row_only = tc.filters.top_share(0.5, tc.token_score.scaled(tc.token_score.given("entropies")), per_row=True)
    assert not dataclasses.replace(tc.methods.grpo(), weights=(row_only,)).compares_groups
    assert dataclasses.replace(row_only, per_row=False).compares_groups
    assert tc.credit.negative_part(tc.credit.whitened(tc.credit.group_normalized())).compares_groups


def test_schedules_become_numbers():
    objective = nested()
    assert objective.is_scheduled and not tc.methods.grpo().is_scheduled
    at = objective.at(0.25)
    assert not at.is_scheduled and at.weights[1].share == pytest.approx(0.3)
    assert at == dataclasses.replace(objective, weights=(objective.weights[0], at.weights[1]))
    assert tc.methods.grpo().at(1.0) == tc.methods.grpo()
    with pytest.raises(ValueError, match="progress: expected a number from 0 to 1, got -0"):
        objective.at(-0.1)
    with pytest.raises(ValueError, match="progress: expected a number from 0 to 1 because of linear"):
        schedule.number(schedule.linear(0, 1))


def test_linear():
    assert [schedule.linear(2.0, 1.0)(p) for p in (0.0, 0.25, 1.0)] == [2.0, 1.75, 1.0]


def test_the_rows_of_all_ranks_are_asked_for():
    batch, _ = naive.random_batch()
    batch = naive.with_evidence(batch, {"entropies"})
    part = batch.select(batch.group_index < 2)
    with pytest.raises(ValueError, match=r"batch: expected the rows of all ranks because .* got 8 of 12"):
        tc.methods.hapo().prepare(part, batch_num_tokens=70, global_batch_size=12, dp_size=2)
    assert tc.methods.hapo().prepare(batch, dp_size=2).row_weights == 2 / batch.lengths.sum()


def test_evidence_is_checked_by_name():
    batch, _ = naive.random_batch()
    objective = tc.methods.thr()
    good = naive.with_evidence(batch, objective.required_inputs).extras
    cases = {
        "hidden_states: expected torch.Tensor": {"hidden_states": [1.0]},
        r"hidden_states: expected float \[N, d\], got int64": {"hidden_states": torch.zeros(84, 4, dtype=torch.long)},
        r"hidden_states: expected float \[84, d\], got \[84\]": {"hidden_states": torch.zeros(84)},
        r"token_probs: expected float \[84, K\], got \[12, 3\]": {"token_probs": torch.zeros(12, 3)},
        "token_probs: expected at least 3 columns, got 2": {"token_probs": torch.zeros(84, 2)},
        "token_probs: expected in the batch": {"token_probs": None},
    }
    for message, change in cases.items():
        with pytest.raises((ValueError, TypeError), match=message):
            objective.prepare(dataclasses.replace(batch, extras={**good, **change}))
    with pytest.raises(TypeError, match=r"node_ids: expected integer \[R\], got float32"):
        tc.methods.spo_tree().prepare(
            dataclasses.replace(batch, extras={"node_ids": torch.zeros(12), "parent_ids": torch.zeros(12).long()})
        )


def test_evidence_may_have_the_layout_of_the_batch():
    batch, _ = naive.random_batch()
    flat = naive.with_evidence(batch, {"hidden_states", "token_probs"})
    shaped = dataclasses.replace(flat, extras={name: x.view(12, 7, -1) for name, x in flat.extras.items()})
    a, b = (tc.methods.thr().prepare(x).advantages for x in (flat, shaped))
    assert torch.equal(a, b) and a.any()
    rows = torch.tensor([3, 0, 5])
    for name in flat.extras:
        taken = shaped.select(rows).input(name)
        torch.testing.assert_close(taken, shaped.extras[name][rows].flatten(0, 1), equal_nan=True)


def test_evidence_of_rows_is_not_mistaken_for_evidence_of_tokens():
    """Two rows and two tokens, all in the first row."""
    batch = tc.Rollouts(
        torch.arange(2),
        torch.tensor([0, 2, 2]),
        torch.tensor([0, 0]),
        torch.zeros(2),
        extras={"node_ids": torch.tensor([7, 8]), "turn_rewards": torch.tensor([0.25, 0.5])},
    )
    second, first = batch.select(torch.tensor([1])), batch.select(torch.tensor([0]))
    assert second.extras["node_ids"].tolist() == [8] and second.extras["turn_rewards"].tolist() == []
    assert first.extras["node_ids"].tolist() == [7] and first.extras["turn_rewards"].tolist() == [0.25, 0.5]
