import dataclasses

import pytest
import tokcredit as tc
from tokcredit.methods.ba import balanced
from tokcredit.train import ObjectiveSettings
from tokcredit.expression import construct, parse, setting


def test_a_call_is_a_name_with_literals():
    assert parse("products", "tasks") == ("products", (), {})
    assert parse(" growing(0.1, high=-2, word='a b', many=[1, None]) ", "clip") == (
        "growing",
        (0.1,),
        {"high": -2, "word": "a b", "many": [1, None]},
    )


@pytest.mark.parametrize(
    "text", ["", "a.b()", "f(x)", "f(__import__('os'))", "1", "f(*[1])", "f(g())", "f(**{'a': 1})", "f(", "a b"]
)
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError, match=r"clip: expected NAME"):
        parse(text, "clip")


def test_construct_checks_name_and_arguments():
    choices = {"ppo": tc.clip.ppo}
    assert construct("ppo(0.1, cap=3.0)", "clip", choices) == tc.clip.ppo(0.1, cap=3.0)
    with pytest.raises(ValueError, match="clip: expected one of ppo, got 'pop'"):
        construct("pop()", "clip", choices)
    with pytest.raises(ValueError, match=r"clip: expected ppo\(low.*'lo': 1"):
        construct("ppo(lo=1)", "clip", choices)


def test_setting():
    assert setting("clip_high=0.3", "set") == ("clip_high", 0.3)
    assert setting("scale=False", "set") == ("scale", False)
    assert setting("name=a=b", "set") == ("name", "a=b")
    with pytest.raises(ValueError, match="set: expected name=value, got 'clip'"):
        setting("clip", "set")


def test_any_stage_can_be_put_in_anothers_place():
    chosen = ObjectiveSettings(
        method="tempo",
        set=("scale=False",),
        ratio="cumulative(high=5.0)",
        clip="growing(0.025, 0.05)",
        aggregation="balanced",
        weights=("importance_truncated(high=2.0)", "with_credit()"),
        kl="k3(beta=0.01)",
    )
    assert chosen.build() == tc.Objective(
        credit=tc.credit.tempo_like(scale=False),
        weights=(tc.token_weights.importance_truncated(2.0), tc.filters.nonzero_advantage()),
        ratio=tc.ratio.cumulative(high=5.0),
        clip=tc.clip.growing(0.025, 0.05),
        aggregation=balanced(),
        terms=(tc.term.kl(0.01, estimator="k3"),),
    )


def test_choices_among_the_arguments():
    chosen = ObjectiveSettings(weights=("top_share(linear(0.2, 1.0), score=given('entropies'), paid=True)",))
    share = tc.schedule.linear(0.2, 1.0)
    assert chosen.build().weights == (tc.filters.top_share(share, tc.token_score.given("entropies"), paid=True),)
    with pytest.raises(ValueError, match=r"weights: expected one of .*linear.*, got 'system'"):
        ObjectiveSettings(weights=("top_share(system('ls'), score=given('entropies'))",)).build()


def test_what_an_objective_prints_can_be_typed():
    for name in tc.methods.names():
        objective = tc.methods.load(name)
        stages = ("credit", "ratio", "clip", "aggregation", "gain", "sampling", "kl")
        typed = {s: repr(x) for s in stages if (x := getattr(objective, s)) is not None}
        built = ObjectiveSettings("grpo", weights=tuple(map(repr, objective.weights)), **typed).build()
        assert dataclasses.replace(built, variable=objective.variable) == objective
