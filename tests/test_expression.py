import pytest
import tokcredit as tc
from tokcredit.expression import call_with, construct, parse, setting


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


def test_words_of_settings():
    texts = ("a=true", "a=None", "a=inf", "a=-Inf", "a=1e-3", "a=(1, 2)", "a='x'")
    assert [setting(x, "set")[1] for x in texts] == [True, None, float("inf"), -float("inf"), 1e-3, (1, 2), "x"]


def test_calls_among_the_arguments():
    inner = {"linear": tc.schedule.linear, "given": tc.token_score.given}
    call = parse("top_share(linear(0.2, inf), score=given('entropies'), many=(linear(1, 2), -3))", "filters", inner)
    assert call.positional == (tc.schedule.linear(0.2, float("inf")),)
    assert call.named == {"score": tc.token_score.given("entropies"), "many": (tc.schedule.linear(1, 2), -3)}
    with pytest.raises(ValueError, match="filters: expected one of given, linear, got 'system'"):
        parse("top_share(system('ls'))", "filters", inner)


def test_arguments_are_those_of_the_function():
    with pytest.raises(ValueError, match=r"ratio: expected f\(a, b=2\), got \(1, 2, 3\), \{\}: too many"):
        call_with({"f": lambda a, b=2: a}, parse("f(1, 2, 3)", "ratio"), "ratio")
