"""Every setting of every stage, method and command is typed and has a range, and says so when it is refused.

Nothing is listed here: the settings are found in signatures and fields, and wrong values are made from declarations.
"""

import dataclasses
import inspect
import re
import typing

import pytest
import tokcredit as tc
import wrong
from tokcredit import cli, expression, mixing
from tokcredit.settings import Declared, Range, RefusedError, rules, shown
from tokcredit.train import ObjectiveSettings

STAGES = {name: cls for name, cls in mixing.inner().items() if cls.__module__.startswith("tokcredit")}
METHODS = [(name, x) for name in tc.methods.names() for x in inspect.signature(getattr(tc.methods, name)).parameters]


def refused(make, *form, error=(TypeError, ValueError)):
    """The error of one line that refuses a setting, whose words begin with the form."""
    with pytest.raises(error) as caught:
        make()
    message = str(caught.value)
    assert message.startswith(": ".join(form)), message
    assert re.search(r": expected .+, got .+", message) and "\n" not in message, message
    return message


def each_refused(rule, make, *form):
    """Try all wrong values of a setting and return the errors."""
    by_type = [refused(lambda v=value: make(v), *form, error=TypeError) for value in wrong.types(rule)]
    return by_type + [refused(lambda v=value: make(v), *form, error=ValueError) for value in wrong.outside(rule)]


@pytest.mark.parametrize("name", STAGES)
def test_settings_of_stages(name):
    cls = STAGES[name]
    known = rules(cls)
    assert set(known) == set(inspect.signature(cls).parameters), "every setting is declared"
    for setting, rule in known.items():
        for message in each_refused(rule, lambda v, s=setting: wrong.made(cls, **{s: v})):
            assert re.match(rf"(\w+\.)?{name}: {setting}: ", message)
        for text in wrong.texts(rule):
            call = expression.Call(name, (), {setting: expression.Word(text)})
            message = refused(lambda c=call: typed(cls, c), "clip", name, setting)
            assert f"got {text}" in message or repr(text) in message


@pytest.mark.parametrize("name", STAGES.keys() - {"Objective", "Preference", "Supervised"})
def test_settings_inside_the_range_are_taken(name):
    cls = STAGES[name]
    for setting, rule in rules(cls).items():
        for value in wrong.inside(rule):
            found = getattr(wrong.made(cls, **{setting: value}), setting)
            assert found == value and (rule.kind != "number" or not isinstance(found, int))
        if rule.kind == "number" and rule._inside(1):
            assert type(getattr(wrong.made(cls, **{setting: 1}), setting)) is float


def typed(cls, call):
    """The stage that a text gives, with valid settings where there is no default."""
    return expression.call_with(STAGES, call._replace(named=wrong.required(cls) | call.named), "clip")


@pytest.mark.parametrize(("method", "setting"), METHODS)
def test_settings_of_methods(method, setting):
    annotated = rules(getattr(tc.methods, method))[setting]
    with pytest.raises(RefusedError) as caught:
        tc.methods.load(method, **{setting: object()})
    rule = caught.value.rule
    assert rule.kind == annotated.kind, "the range is that of the stage that takes the setting"
    each_refused(rule, lambda v: tc.methods.load(method, **{setting: v}), method, setting)
    for text in wrong.texts(rule):
        message = refused(lambda t=text: ObjectiveSettings(method, (f"{setting}={t}",)).build(), "set", method, setting)
        known = "a registered name" if rule.kind == "input name" else str(rule)
        assert f": expected {known}, got " in message.replace("finite number", "number")
        refused(lambda t=text: tc.mix(f"{method}({setting}={t!r})"), "base", method, setting)


def test_the_setting_at_fault_is_named_beside_others():
    message = refused(lambda: tc.methods.grpo(clip_low=0.1, clip_high=-0.1), "grpo", "clip_high")
    assert message == "grpo: clip_high: expected a number at least 0 (or a schedule), got -0.1"
    message = refused(lambda: tc.methods.pods(0, epsilon=0), "pods", "count")
    assert message == "pods: count: expected a whole number at least 1, got 0"


def classes(annotation):
    """Classes of settings inside an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, Declared):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from classes(argument)


def options():
    """For each command with settings: its words on the command line, and its settings with their rules."""
    for name, command in cli._COMMANDS.items():
        for annotation in typing.get_type_hints(command, include_extras=True).values():
            chosen = list(classes(annotation))
            for cls in chosen:
                words = [name, *([cls.__name__.lower()] if len(chosen) > 1 else ())]
                yield from ((words, cls, owner, setting, rule) for owner, setting, rule in declared(cls))


def declared(cls):
    """Names and rules of the settings of a class, those of settings among them included."""
    for f in dataclasses.fields(cls):
        rule = rules(cls).get(f.name)
        if rule is not None and rule.kind == "stage":
            yield from declared(rule.stage)
        else:
            yield cls, f.name, rule


OPTIONS = list(options())


@pytest.mark.parametrize(
    ("words", "cls", "owner", "setting", "rule"), OPTIONS, ids=[f"{' '.join(x[0])} {x[3]}" for x in OPTIONS]
)
def test_settings_of_commands(words, cls, owner, setting, rule, tmp_path, monkeypatch, capsys):
    """Nothing is loaded, and no folder is made."""
    assert rule is not None, "every setting is typed"
    limits = (rule.at_least, rule.above, rule.at_most, rule.below)
    is_number = rule.kind in ("number", "whole number")
    assert not is_number or any(x is not None for x in limits), "every number has a range"
    monkeypatch.chdir(tmp_path)
    for function in ("train.run", "train.compare", "train.study", "analyze.run", "report.run"):
        monkeypatch.setattr(f"tokcredit.{function}", None)
    required = [p.name for p in inspect.signature(cls).parameters.values() if p.default is p.empty and p.name != "path"]
    paths = ["nowhere"] if "path" in rules(cls) else []
    for text in wrong.texts(rule) if rule.kind != "bool" else ():
        option = f"--{setting.replace('_', '-')}"
        with pytest.raises(SystemExit) as stopped:
            cli.main([*words, *paths, *(f"--{name}=a" for name in required), option, text])
        expected = f"tokcredit: {option}: expected {rule}, got "
        message = str(stopped.value).replace("finite number", "number")
        assert message.startswith(expected) and "\n" not in message, message
    others = {p.name: "a" for p in inspect.signature(owner).parameters.values() if p.default is p.empty}
    each_refused(rule, lambda v: owner(**(others | {setting: v})), setting)
    assert not list(tmp_path.iterdir()) and capsys.readouterr() == ("", "")


def test_options_are_named_as_they_were_typed(monkeypatch):
    for option in ("--max-grad-norm", "--max_grad_norm"):
        for typed_words in ([option, "-1"], [f"{option}=-1"]):
            with pytest.raises(SystemExit) as stopped:
                cli.main(["train", *typed_words])
            assert str(stopped.value) == f"tokcredit: {option}: expected a number above 0, got -1"


def test_ranges_are_part_of_the_help(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    shown_words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "scaled down to this norm; inf leaves them as they are. Expected: a number above 0." in shown_words


def test_annotations_are_declarations():
    @dataclasses.dataclass(frozen=True)
    class chosen(Declared):
        count: int
        share: float = 0.5
        word: typing.Literal["a", "b"] = "a"
        names: tuple[str, ...] = ()
        of: tc.clip.Clip | None = None
        weights: dict[str, float] | None = None

    made = chosen(True + 1, 1)
    assert made == chosen(2, 1.0) and type(made.share) is float
    assert chosen(2, names=["a"]).names == ("a",)
    assert chosen(2, weights={"a": 1}).weights == {"a": 1.0}
    each_refused(rules(chosen)["weights"], lambda v: chosen(2, weights=v), "weights")
    for arguments, message in (
        ((1.5,), "count: expected a whole number, got 1.5"),
        ((1, "x"), "share: expected a number (or a schedule), got 'x'"),
        ((1, 0.5, "c"), "word: expected one of 'a', 'b', got 'c'"),
        ((1, 0.5, "a", "abc"), "names: expected texts, got 'abc'"),
        ((1, 0.5, "a", (), None, {"a": "x"}), "weights: expected numbers by name or None, got {'a': 'x'}"),
        ((1, 0.5, "a", (), tc.ratio.token()), "of: expected a clip stage or None, got token"),
    ):
        with pytest.raises(RefusedError, match=re.escape(message)):
            chosen(*arguments)


def test_what_was_given_is_shown_as_it_was_typed():
    given = (-1.0, -1, 0.5, float("inf"), "abc", (1.0,))
    assert [shown(x) for x in given] == ["-1", "-1", "0.5", "inf", "'abc'", "(1.0,)"]
    with pytest.raises(ValueError, match="x: expected a finite number at least 0, got inf"):
        Range("number", at_least=0).checked("x", float("inf"))
