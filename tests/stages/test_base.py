import dataclasses
import math
import pickle
from typing import ClassVar

import naive
import numpy as np
import pytest
import tokcredit as tc
import torch
from tokcredit import schedule
from tokcredit.methods.tempo import tempo_credit
from tokcredit.stages.base import Range, Stage, number, option, part, parts, whole_number


def nested():
    """Inputs, statistics of the whole batch and a schedule, each below two other stages."""
    h = tc.token_score.scaled(tc.token_score.given("entropies"), 0.98)
    kept = tc.filters.top_share(
        schedule.linear(0.2, 0.6), tc.token_score.either(h, tc.token_score.given("reverse_kl")), per_row=True
    )
    return dataclasses.replace(tc.methods.grpo(), filters=(tc.filters.nonzero_advantage(), kept))


def test_what_stages_read_the_objective_requires():
    assert nested().required_inputs == {"entropies", "reverse_kl"}
    assert dataclasses.replace(nested(), terms=(tc.term.kl(),)).required_inputs == {
        "entropies",
        "reverse_kl",
        "ref_log_probs",
    }
    assert tc.methods.grpo().required_inputs == frozenset()
    assert tc.credit.whitened(tc.credit.value_changes(), below=0.9).required_inputs == {"state_values", "old_log_probs"}
    assert tc.Objective(ratio=tc.ratio.token(to="rollout_log_probs")).required_inputs == {"rollout_log_probs"}
    assert tc.filters.within(to="ref_log_probs").required_inputs == {"old_log_probs", "ref_log_probs"}


def test_a_stage_of_ones_own():
    @dataclasses.dataclass(frozen=True)
    class by_entropy(tc.credit.Credit):
        factor: float = number(1.0, above=0)
        reads: ClassVar[frozenset[str]] = frozenset({"entropies"})
        whole_batch: ClassVar[bool] = True

        def __call__(self, batch):
            return batch.rewards[:, None] * self.factor

    objective = tc.Objective(tc.credit.negative_part(by_entropy(2)))
    assert objective.required_inputs == {"entropies"} and objective.compares_groups and not objective.is_scheduled
    assert tc.mix("grpo", credit="by_entropy(2.0)").credit == by_entropy(2.0)


def test_what_compares_groups():
    assert nested().compares_groups
    per_row = tc.filters.top_share(0.5, tc.token_score.scaled(tc.token_score.given("entropies")), per_row=True)
    assert not dataclasses.replace(tc.methods.grpo(), filters=(per_row,)).compares_groups
    assert dataclasses.replace(per_row, per_row=False).compares_groups
    assert tc.credit.negative_part(tc.credit.whitened(tc.credit.group_normalized())).compares_groups


def test_stages_are_yielded_with_their_settings():
    found = [type(x).__name__ for x in nested().stages()]
    assert found[:2] == ["Objective", "group_normalized"]
    assert {"top_share", "either", "scaled", "given", "ppo", "token"} <= set(found)
    assert found.count("given") == 2


@pytest.mark.parametrize("name", tc.methods.names())
def test_stages_print_compare_and_pickle(name):
    objective = tc.methods.load(name)
    again = pickle.loads(pickle.dumps(objective))
    assert again == objective and hash(again) == hash(objective) and repr(again) == repr(objective)
    with pytest.raises(dataclasses.FrozenInstanceError):
        objective.kind = "other"


def test_schedules_become_numbers():
    objective = nested()
    assert objective.is_scheduled and not tc.methods.grpo().is_scheduled
    assert objective.adjustables == (schedule.linear(0.2, 0.6),)
    at = objective.resolved(schedule.resolver(0.25, None))
    assert not at.is_scheduled and at.filters[1].share == pytest.approx(0.3)
    assert at == dataclasses.replace(objective, filters=(objective.filters[0], at.filters[1]))
    grpo = tc.methods.grpo()
    assert grpo.resolved(schedule.resolver(1.0, None)) is grpo


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: tc.Objective(tc.ratio.token()), TypeError, r"Objective: credit: expected a credit stage, got token\("),
        (lambda: tc.Objective(clip=tc.clip.ppo), TypeError, "Objective: clip: expected a clip stage, got <class"),
        (
            lambda: tc.Objective(filters=tc.filters.mixed_groups()),
            TypeError,
            "expected a tuple of filter stages, got mixed",
        ),
        (lambda: tc.Objective(filters=(tc.token_weights.within(),)), TypeError, "filters: expected a tuple of filter"),
        (
            lambda: tc.Objective(token_weights=(tc.filters.within(),)),
            TypeError,
            "expected a tuple of token_weight stages",
        ),
        (lambda: tc.Objective(terms=("kl",)), TypeError, r"terms: expected a tuple of term stages, got \('kl',\)"),
        (
            lambda: tc.clip.growing(-0.1, 0.1),
            ValueError,
            r"clip\.growing: low: expected a number at least 0 \(or a schedule\), got -0\.1",
        ),
        (
            lambda: tc.clip.growing(0.1, math.nan),
            ValueError,
            r"growing: high: expected a number at least 0 \(or a schedule\), got nan",
        ),
        (
            lambda: tc.clip.soft(0, 0),
            ValueError,
            r"soft: tau_positive: expected a number above 0 \(or a schedule\), got 0",
        ),
        (
            lambda: tc.clip.ppo(cap=0.5),
            ValueError,
            r"ppo: cap: expected a number at least 1 \(or a schedule\) or None, got 0\.5",
        ),
        (lambda: tc.clip.ppo("0.2"), TypeError, r"ppo: low: expected a number at least 0 \(or a schedule\), got '0.2'"),
        (lambda: tc.clip.ppo(True), TypeError, r"ppo: low: expected a number at least 0 \(or a schedule\), got True"),
        (lambda: tc.clip.gated("ratios"), ValueError, "gated: on: expected one of 'ratio', 'difference', .*'ratios'"),
        (
            lambda: tc.clip.gated(low=0.1),
            ValueError,
            r"gated: low: expected a number at most 0 \(or a schedule\), got 0\.1",
        ),
        (lambda: tc.ratio.sequence(high=-5), ValueError, "sequence: high: expected a number at least 0, got -5"),
        (lambda: tc.ratio.token(bound=0), ValueError, "token: bound: expected a number above 0, got 0"),
        (lambda: tc.ratio.token(to="old_logprobs"), ValueError, "to: .*'old_logprobs'; did you mean old_log_probs"),
        (
            lambda: tc.aggregation.sequence_sum(-4),
            ValueError,
            "length: expected a whole number at least 1 or None, got -4",
        ),
        (
            lambda: tc.aggregation.sequence_sum(1.5),
            TypeError,
            "length: expected a whole number at least 1 or None, got 1.5",
        ),
        (
            lambda: tc.term.kl(-1),
            ValueError,
            r"term\.kl: coefficient: expected a number at least 0 \(or a schedule\), got -1",
        ),
        (
            lambda: tc.term.kl(math.nan),
            ValueError,
            r"term\.kl: coefficient: expected a number at least 0 \(or a schedule\), got nan",
        ),
        (
            lambda: tc.term.kl(0.1, "k4"),
            ValueError,
            "kl: estimator: expected one of 'k3', 'k1', 'k2', 'abs', 'k3_corrected', got 'k4'",
        ),
        (lambda: tc.term.nll(0.1, where=tc.clip.ppo()), TypeError, "nll: where: expected a filter stage or None"),
        (lambda: tc.link.logistic(label_smoothing=0.5), ValueError, "at least 0 and below 0.5, got 0.5"),
        (
            lambda: tc.credit.whitened(tc.credit.constant(), nonzero=1),
            TypeError,
            "whitened: nonzero: expected a bool, got 1",
        ),
        (lambda: tc.methods.match_tir(discount=7), ValueError, "discount: expected a number .*at most 1, got 7"),
        (lambda: tc.Supervised(tc.credit.constant()), TypeError, "Supervised: token_loss: expected a token_loss stage"),
        (
            lambda: tc.Preference(reference="ref_logprobs"),
            ValueError,
            "Preference: reference: .*did you mean ref_log_probs",
        ),
    ],
)
def test_settings_are_checked_when_a_stage_is_made(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_combinations_without_meaning_are_refused_with_both_sides_named():
    with pytest.raises(ValueError, match=r"clip: expected a stage with bounds because of outside_center\(.*got soft\("):
        tc.mix("hapo", clip=tc.clip.soft())
    with pytest.raises(
        ValueError, match=r"clip: expected a stage with bounds because of outside_center.*unclipped\(\)"
    ):
        tc.mix("hapo", clip=tc.clip.unclipped())
    with pytest.raises(ValueError, match="terms: expected at most one of each kind, got"):
        tc.Objective(terms=(tc.term.kl(), tc.term.kl(0.1, "k2")))
    with pytest.raises(ValueError, match="filters: expected filters that read no rewards, got mixed_groups"):
        tc.Supervised(filters=(tc.filters.mixed_groups(),))
    with pytest.raises(ValueError, match="aggregation: expected one that reads no advantages, got balanced"):
        tc.Supervised(aggregation=tc.methods.ba().aggregation)


def test_ints_become_floats():
    soft = tc.clip.soft(1, np.float32(2))
    assert (soft.tau_positive, soft.tau_negative) == (1.0, 2.0) and type(soft.tau_positive) is float
    assert type(soft.tau_negative) is float
    assert tc.aggregation.sequence_sum(np.int64(8)) == tc.aggregation.sequence_sum(8)
    batch, current = naive.random_batch()
    for whole, real in (
        (tc.methods.sapo(tau_positive=1), tc.methods.sapo(tau_positive=1.0)),
        (tc.methods.ctpo(cap=1), tc.methods.ctpo(cap=1.0)),
    ):
        assert whole == real
        assert whole.loss(whole.prepare(batch), current).loss == real.loss(real.prepare(batch), current).loss != 0


def test_ranges_read_as_sentences():
    assert str(Range("number", above=0, at_most=1, scheduled=True)) == "a number above 0 and at most 1 (or a schedule)"
    assert str(Range("whole number", at_least=1, optional=True)) == "a whole number at least 1 or None"
    assert str(Range("option", options=("a", "b"))) == "one of 'a', 'b'"
    assert str(Range("stage", stage=tc.clip.Clip, several=True)) == "a tuple of clip stages"
    assert str(Range("input name")) == "an input name"


def test_declarations_of_settings():
    @dataclasses.dataclass(frozen=True)
    class toy(Stage):
        share: float = number(above=0, below=1)
        mode: str = option("fast", "exact", optional=True)
        count: int = whole_number(3, at_least=2, at_most=5)
        clip: tc.clip.Clip | None = part(tc.clip.Clip, None, optional=True)
        filters: tuple[tc.filters.Filter, ...] = parts(tc.filters.Filter)

    assert toy(0.5) == toy(0.5, "fast", 3, None, ())
    assert toy(0.5, None).mode is None
    for arguments, error in (
        ((), TypeError),
        ((1,), ValueError),
        ((0,), ValueError),
        ((0.5, "slow"), ValueError),
        ((0.5, 1), TypeError),
        ((0.5, "fast", 6), ValueError),
        ((0.5, "fast", 3.0), TypeError),
        ((0.5, "fast", 3, tc.ratio.token()), TypeError),
        ((0.5, "fast", 3, None, [tc.filters.mixed_groups()]), TypeError),
    ):
        with pytest.raises(error):
            toy(*arguments)


def test_only_declared_settings_take_schedules():
    linear = schedule.linear(0.1, 0.2)
    assert tc.term.kl(linear).adjustables == tc.clip.ppo(linear).adjustables == (linear,)
    with pytest.raises(TypeError, match="group_normalized: epsilon: expected a number at least 0, got linear"):
        tc.credit.group_normalized(epsilon=linear)


def test_the_rows_of_all_ranks_are_asked_for():
    batch, _ = naive.random_batch()
    batch = naive.with_inputs(batch, {"entropies"})
    part_of_batch = batch.select(batch.group_index < 2)
    with pytest.raises(ValueError, match=r"batch: expected the rows of all ranks because .* got 8 of 12"):
        tc.methods.hapo().prepare(part_of_batch, batch_num_tokens=70, global_batch_size=12, dp_size=2)
    assert tc.methods.hapo().prepare(batch, dp_size=2).row_weights == pytest.approx(2 / int(batch.lengths.sum()))


def test_rows_of_a_filter_before_credit_are_left_out_of_statistics():
    batch, _ = naive.random_batch()
    mixed = tc.Objective(tempo_credit(), filters=(tc.filters.mixed_groups(),))
    batch = dataclasses.replace(batch, rewards=torch.where(batch.group_index == 0, 1.0, batch.rewards))
    prepared = mixed.prepare(batch)
    assert not prepared.mask.view(12, 7)[batch.group_index == 0].any()
    alone = tc.Objective(tempo_credit()).prepare(batch.select(batch.group_index > 0))
    torch.testing.assert_close(prepared.advantages[batch.group_index > 0], alone.advantages)
    assert alone.advantages.any()
