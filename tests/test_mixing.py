"""Any stage of one method in another, by name, by text or as it is."""

import dataclasses

import pytest
import tokcredit as tc
from tokcredit.methods.ba import balanced
from tokcredit.methods.tempo import tempo_credit


def test_stages_of_other_methods_by_name():
    mixed = tc.mix("grpo", credit="tempo", ratio="ctpo", clip="ctpo", aggregation="ba", terms="kl(0.01)")
    assert mixed == dataclasses.replace(
        tc.methods.grpo(),
        credit=tc.methods.tempo().credit,
        ratio=tc.methods.ctpo().ratio,
        clip=tc.methods.ctpo().clip,
        aggregation=tc.methods.ba().aggregation,
        terms=(tc.term.kl(0.01),),
    )
    assert mixed != tc.methods.grpo()


def test_a_replacement_is_a_name_a_text_or_a_stage():
    expected = dataclasses.replace(tc.methods.grpo(), clip=tc.clip.growing(0.025, 0.05))
    assert tc.mix("grpo", clip="growing(0.025, 0.05)") == expected
    assert tc.mix("grpo", clip=tc.clip.growing(0.025, 0.05)) == expected
    assert tc.mix(tc.methods.grpo(), clip=tc.clip.growing(0.025, 0.05)) == expected
    assert tc.mix("ctpo(clip_low=0.025, clip_high=0.05)", clip="dapo").clip == tc.methods.dapo().clip
    assert tc.mix("grpo(clip_high=0.3)").clip.high == 0.3
    assert tc.mix("grpo", credit="tempo(scale=False)").credit == tempo_credit(scale=False)


def test_a_stage_that_only_one_method_has():
    assert isinstance(tc.mix("grpo", aggregation="balanced()").aggregation, balanced)


def test_kinds_with_several_stages():
    one = (tc.term.kl(0.01),)
    assert tc.mix("grpo", terms="kl(0.01)").terms == tc.mix("grpo", terms=one).terms == one
    assert tc.mix("grpo", terms=["kl(0.01)"]).terms == tc.mix("grpo", terms=tc.term.kl(0.01)).terms == one
    two = tc.mix("grpo", filters=("mixed_groups", "nonzero_advantage()")).filters
    assert two == (tc.filters.mixed_groups(), tc.filters.nonzero_advantage())
    assert tc.mix("grpo", filters="tip").filters == tc.methods.tip().filters != ()
    assert tc.mix("hapo", scales=()).scales == ()


def test_schedules_among_the_settings():
    share = tc.schedule.linear(0.2, 1.0)
    text = "top_share(linear(0.2, 1.0), score=given('entropies'), times_advantage=True)"
    expected = tc.filters.top_share(share, tc.token_score.given("entropies"), times_advantage=True)
    assert tc.mix("grpo", filters=text).filters == (expected,)


def test_other_objectives_mix_too():
    assert tc.mix("sft", aggregation="sequence_mean").aggregation == tc.aggregation.sequence_mean()
    assert tc.mix("dpo", link="logistic(beta=0.5)").link == tc.link.logistic(0.5)
    weighted = tc.mix("dpo", token_weights="raised(given('entropies'), 0.5)")
    assert weighted.token_weights == (tc.token_weights.raised(tc.token_score.given("entropies"), 0.5),)


@pytest.mark.parametrize(
    ("stages", "error", "message"),
    [
        ({"gain": "hapo"}, TypeError, "gain: expected one of credit, filters, .*, got an unknown kind of stage"),
        ({"clip": "pop"}, ValueError, "clip: expected a stage or a method, one of .*ppo.*, got 'pop'"),
        ({"clip": "sft"}, ValueError, "clip: expected a method with such a stage, got sft, which has none"),
        ({"clip": "ppo(lo=1)"}, ValueError, r"clip: ppo: expected settings among .*, got lo; did you mean low\?"),
        (
            {"clip": "growing(-0.1, 0.1)"},
            ValueError,
            r"growing: low: expected a number at least 0 \(or a schedule\), got -0\.1",
        ),
        ({"clip": tc.ratio.token()}, TypeError, "Objective: clip: expected a clip stage, got token"),
        ({"filters": ("growing()",)}, ValueError, "filters: expected a stage or a method, one of .*, got 'growing'"),
        ({"terms": ("kl(0.1)", "kl(0.2)")}, ValueError, "terms: expected at most one of each kind"),
        ({"filters": "top_share(system('ls'), given('entropies'))"}, ValueError, "filters: expected one of .*linear.*"),
    ],
)
def test_errors_name_both_sides(stages, error, message):
    with pytest.raises(error, match=message):
        tc.mix("grpo", **stages)


def test_the_base_is_a_method_or_an_objective():
    with pytest.raises(ValueError, match=r"base: expected one of .*grpo.*, got 'gpro'"):
        tc.mix("gpro")
    with pytest.raises(TypeError, match="base: expected a method or an objective, got int"):
        tc.mix(3)
    with pytest.raises(ValueError, match="clip: expected a stage with bounds because of outside_center"):
        tc.mix("hapo", clip="sapo")


@pytest.mark.parametrize("name", tc.methods.names())
def test_what_an_objective_prints_can_be_typed(name):
    objective = tc.methods.load(name)
    typed = {}
    for field in dataclasses.fields(objective):
        value = getattr(objective, field.name)
        if isinstance(value, tuple):
            typed[field.name] = tuple(map(repr, value))
        elif isinstance(value, tc.stages.base.Stage):
            typed[field.name] = repr(value)
    others = {k: getattr(objective, k) for k in ("reference", "normalization") if hasattr(objective, k)}
    assert tc.mix(type(objective)(**others), **typed) == objective


def test_the_command_line_mixes_the_same():
    pytest.importorskip("tyro")
    from tokcredit.train import ObjectiveSettings

    settings = ObjectiveSettings(
        method="tempo",
        set=("scale=False",),
        ratio="cumulative(high=5.0)",
        clip="growing(0.025, 0.05)",
        aggregation="ba",
        token_weights=("importance(high=2.0)",),
        filters=("nonzero_advantage()",),
        terms=("kl(0.01)",),
    )
    assert settings.build() == tc.Objective(
        credit=tempo_credit(scale=False),
        filters=(tc.filters.nonzero_advantage(),),
        token_weights=(tc.token_weights.importance(high=2.0),),
        ratio=tc.ratio.cumulative(high=5.0),
        clip=tc.clip.growing(0.025, 0.05),
        aggregation=balanced(),
        terms=(tc.term.kl(0.01, estimator="k3"),),
    )
