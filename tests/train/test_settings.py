import pytest
import tokcredit as tc
from tokcredit.train import ObjectiveSettings


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
        (ObjectiveSettings("grp"), "name: expected one of .*grpo.*, got 'grp'"),
        (ObjectiveSettings("grpo", set=("clip=1",)), "clip: expected one of clip_low.* for grpo"),
        (
            ObjectiveSettings("grpo", credit="temp"),
            "credit: expected a stage or a method, one of .*tempo.*, got 'temp'",
        ),
        (ObjectiveSettings("grpo", clip="ppo(low=-1)"), "clip.ppo: low: expected a number at least 0.*, got -1"),
        (ObjectiveSettings("grpo", scales=("within(",)), "scales: expected NAME or NAME"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises((TypeError, ValueError), match=message):
        settings.build()
