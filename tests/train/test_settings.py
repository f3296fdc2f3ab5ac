import pytest
import tokcredit as tc
from tokcredit.train import ObjectiveSettings, ReplaySettings, SamplingSettings, ToolSettings
from tokcredit.train.settings import is_due


def test_stages_are_mixed_by_method_name_or_expression():
    chosen = ObjectiveSettings(
        method="grpo",
        set=("clip_high=0.3",),
        credit="tempo",
        ratio="cumulative(high=5.0)",
        aggregation="ba",
        filters=("nonzero_advantage", "top_share(linear(0.2, 1.0), score=given('entropies'))"),
        token_weights=("importance(high=2.0)",),
        scales=("divergence_weighted",),
        terms=("kl(0.01, estimator='k1')", "entropy(target_entropy())"),
    )
    grpo, other = tc.methods.grpo(clip_high=0.3), tc.methods
    assert chosen.build() == tc.Objective(
        credit=other.tempo().credit,
        filters=(
            tc.filters.nonzero_advantage(),
            tc.filters.top_share(tc.schedule.linear(0.2, 1.0), tc.token_score.given("entropies")),
        ),
        token_weights=(tc.token_weights.importance(high=2.0),),
        ratio=tc.ratio.cumulative(high=5.0),
        clip=grpo.clip,
        scales=other.divergence_weighted().scales,
        aggregation=other.ba().aggregation,
        terms=(tc.term.kl(0.01, "k1"), tc.term.entropy(tc.schedule.target_entropy())),
    )


def test_a_supervised_method_takes_its_own_kinds():
    assert ObjectiveSettings("tip", token_loss="forward_kl()").build().variables == ("forward_kl",)
    with pytest.raises(TypeError, match=r"ratio: expected one of token_loss, filters, .*, got an unknown kind"):
        ObjectiveSettings("sft", ratio="ctpo").build()


def test_several_stages_can_be_removed():
    assert ObjectiveSettings("dapo", filters=()).build().filters == ()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("grp",), "method: expected one of .*'grpo'.*, got 'grp'"),
        (("grpo", ("clip=1",)), "set: clip: expected one of clip_low.* for grpo"),
        (("grpo", ("clip",)), "set: expected name=value, got 'clip'"),
        (("grpo", (), "temp"), "credit: expected a stage or a method, one of .*tempo.*, got 'temp'"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises((TypeError, ValueError), match=message):
        ObjectiveSettings(*settings).build()


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ({"clip": "ppo(low=-1)"}, r"clip: ppo: low: expected a number at least 0 \(or a schedule\), got -1"),
        ({"clip": "ppo(low=abc)"}, r"clip: ppo: low: expected a number at least 0 \(or a schedule\), got 'abc'"),
        ({"credit": "tempo(scale=maybe)"}, "credit: tempo: scale: expected a bool, got 'maybe'"),
        ({"credit": "whitened(tempo_credit(scale=3))"}, "credit: tempo_credit: scale: expected a bool, got 3"),
        ({"clip": "ppo(linear(0.1, abc))"}, "clip: linear: end: expected a number, got 'abc'"),
        ({"scales": ("within(",)}, "scales: expected NAME or NAME"),
    ],
)
def test_mistakes_in_stages_are_named(kinds, message):
    with pytest.raises((TypeError, ValueError), match=message):
        ObjectiveSettings("grpo", **kinds).build()


def test_settings_of_a_method_are_read_by_their_types():
    settings = ("scale=false", "cap=none", "clip_low=1", "clip_high=linear(0.2, 0.4)", "epsilon=1e-3")
    expected = tc.methods.tempo(
        scale=False, cap=None, clip_low=1.0, clip_high=tc.schedule.linear(0.2, 0.4), epsilon=1e-3
    )
    assert ObjectiveSettings("tempo", settings).build() == expected
    assert expected.credit.scale is False and expected.clip.cap is None
    score = tc.token_score.given("entropies")
    for text in ("given(entropies)", "given('entropies')"):
        assert ObjectiveSettings("tip", (f"rank={text}",)).build() == tc.methods.tip(rank=score)
        raised = (tc.token_weights.raised(score, 2.0),)
        assert ObjectiveSettings("dpo", (f"token_weights=raised({text}, 2)",)).build().token_weights == raised
    assert ObjectiveSettings("pods", ("count=3",)).build().filters[0].count == 3


def test_several_settings_are_separated_by_spaces():
    with pytest.raises(ValueError, match=r"set: expected spaces between .*, got 'clip_low=0.1,cap=3'"):
        ObjectiveSettings("tempo", ("clip_low=0.1,cap=3",)).build()
    both = ObjectiveSettings("tempo", ("clip_low=linear(start=0.1, end=0.2)", "cap=3")).build()
    assert both.clip == tc.clip.ppo(tc.schedule.linear(0.1, 0.2), 0.28, 3.0)


def test_settings_that_do_not_fit_together():
    with pytest.raises(ValueError, match="widths: expected at least one number, got none"):
        SamplingSettings(widths=())
    with pytest.raises(ValueError, match="replayed: expected at most the 1 responses remembered, got 2"):
        ReplaySettings(remembered=1)
    with pytest.raises(ValueError, match=r"matching: sinkhorn: regularization: expected a number above 0, got 0"):
        ToolSettings(matching="sinkhorn(regularization=0)")
    with pytest.raises(ValueError, match=r"matching: expected optimal with penalty, got 'optimal\(s=1\)'"):
        ToolSettings(matching="optimal(s=1)")


def test_zero_steps_between_is_never():
    assert [n for n in range(1, 7) if is_due(n, 3)] == [3, 6]
    assert not any(is_due(n, 0) for n in range(1, 7))
