import re

import pytest
import tokcredit as tc
from tokcredit.expression import call_with, construct, parse, read, setting
from tokcredit.settings import Range


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
    with pytest.raises(ValueError, match=r"clip: ppo: expected settings among .*, got lo; did you mean low\?"):
        construct("ppo(lo=1)", "clip", choices)


def test_setting():
    assert setting("clip_high=0.3", "set") == ("clip_high", "0.3")
    assert setting("name=a=b", "set") == ("name", "a=b")
    for text in ("clip", "=1", "a b=1"):
        with pytest.raises(ValueError, match=f"set: expected name=value, got '{text}'"):
            setting(text, "set")


def test_a_text_is_read_as_what_the_setting_may_be():
    inner = {"linear": tc.schedule.linear, "given": tc.token_score.given}
    number, flag = Range("number", optional=True, scheduled=True), Range("bool")
    texts = ("none", "1e-3", "-Inf", "2", "true", "linear(0, 1)", "(1, 2)")
    linear = tc.schedule.linear(0, 1)
    assert [read(x, number, "a", inner) for x in texts] == [None, 1e-3, -float("inf"), 2.0, "true", linear, (1, 2)]
    assert [read(x, flag, "a", inner) for x in ("true", "FALSE", "1", "none")] == [True, False, "1", "none"]
    stages = Range("stage", stage=tc.token_score.TokenScore, several=True)
    assert read("given(entropies)", stages, "a", inner) == (tc.token_score.given("entropies"),)
    assert [read(x, Range("text"), "a", inner) for x in ("none", "1", "linear(0, 1)")] == ["none", "1", "linear(0, 1)"]
    with pytest.raises(TypeError, match="a: linear: end: expected a number, got 'x'"):
        read("linear(0, x)", number, "a", inner)


def test_calls_among_the_arguments():
    inner = {"linear": tc.schedule.linear, "given": tc.token_score.given}
    call = parse("top_share(linear(0.2, -3), score=given('entropies'), many=(linear(1, 2), -3))", "filters", inner)
    assert call.positional == (tc.schedule.linear(0.2, -3),)
    assert call.named == {"score": tc.token_score.given("entropies"), "many": (tc.schedule.linear(1, 2), -3)}
    with pytest.raises(ValueError, match="filters: expected one of given, linear, got 'system'"):
        parse("top_share(system('ls'))", "filters", inner)


def test_words_are_read_by_the_argument():
    inner = {"given": tc.token_score.given, "tempo": tc.methods.tempo, "ppo": tc.clip.ppo}
    assert construct("given(entropies)", "a", inner, inner) == tc.token_score.given("entropies")
    assert construct("tempo(scale=False, cap=none)", "a", inner, inner) == tc.methods.tempo(scale=False, cap=None)
    assert construct("tempo(scale=false, cap=None)", "a", inner, inner) == tc.methods.tempo(scale=False, cap=None)
    with pytest.raises(TypeError, match=r"a: ppo: low: expected a number at least 0 \(or a schedule\), got 'true'"):
        construct("ppo(low=true)", "a", inner, inner)
    with pytest.raises(ValueError, match=r"a: ppo: low: expected a number .*, got nan"):
        construct("ppo(low=nan)", "a", inner, inner)
    with pytest.raises(ValueError, match="a: expected NAME"):
        construct("ppo(low=true)", "a", inner)


def test_arguments_are_those_of_the_function():
    for text, message in (
        ("f(1, 2, 3)", "ratio: f: expected at most 2 settings among low, high, got 3"),
        ("f(1, hihg=2)", "ratio: f: expected settings among low, high, got hihg; did you mean high?"),
        ("f(1, z=2)", "ratio: f: expected settings among low, high, got z"),
        ("f(1, low=2)", "ratio: f: expected each setting once, got low twice"),
        ("f()", "ratio: f: expected a value for low, got none"),
        ("g(1)", "ratio: g: expected no settings, got 1"),
        ("g(a=1)", "ratio: g: expected no settings, got a"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            call_with({"f": lambda low, high=2: low, "g": lambda: 0}, parse(text, "ratio"), "ratio")
