"""Values that a declared setting must take or refuse, made from the declaration."""

import inspect
import math

import tokcredit as tc
import torch
from tokcredit import mixing
from tokcredit.settings import rules


def types(rule):
    """Values of other types."""
    others = {
        "number": ["abc", "1", True, [1.0], 1j, torch.tensor([1.0, 2.0])],
        "whole number": ["1", True, 1.5, math.inf, [1], torch.tensor([1, 2])],
        "numbers by name": [3, "a", {"a": "x"}, {1: 1.0}, {"a": True}],
        "bool": [1, 0.0, "true", torch.tensor(True)],
        "text": [3, True, b"x"],
        "path": [3, True, b"x"],
        "option": [1, True, ("ratio",)],
        "input name": [1, True, ("entropies",)],
        "stage": ["grpo", 1, object(), dict, *([] if rule.several else [()])],
    }[rule.kind]
    others += [] if rule.scheduled else [tc.schedule.linear(0.0, 1.0)]
    others += [] if rule.optional else [None]
    if rule.several:
        return [3, "abc", *([[]] if rule.kind == "stage" else []), *((x,) for x in others)]
    return others


def outside(rule):
    """Values of the right type that are out of range: those next to the limits, and numbers that are not finite."""
    words = {"option": ["no such option", ""], "input name": ["no_such_input"], "text": ["a\ud800"]}
    values = words.get(rule.kind, [{"a": math.nan}] if rule.kind == "numbers by name" else [])
    if rule.kind in ("number", "whole number"):
        whole = rule.kind == "whole number"

        def beside(x, way):
            return x + way if whole else math.nextafter(x, way * math.inf)

        values = [] if whole else [math.nan, *([] if rule.infinite else [math.inf, -math.inf])]
        if rule.at_least is not None:
            values += [beside(rule.at_least, -1), -(10**9) if whole else -math.inf]
        if rule.at_most is not None:
            values += [beside(rule.at_most, 1), 10**12 if whole else math.inf]
        values += [x for x in (rule.above, rule.below) if x is not None]
    return [(x,) for x in values] if rule.several else values


def texts(rule):
    """Texts that stand for no value of a setting, as typed on the command line. Any text is a text and a path."""
    if rule.kind in ("number", "whole number"):
        numbers = [x[0] if rule.several else x for x in outside(rule)]
        return ["abc", "true", "1+1", *(["1.5"] if rule.kind == "whole number" else []), *map(repr, numbers)]
    return {"text": [], "path": [], "numbers by name": [], "bool": ["abc", "1"]}.get(rule.kind, ["no_such_word"])


def inside(rule):
    """Values that the rule allows, at least one."""
    values = {"bool": [True, False], "option": [*rule.options], "input name": ["entropies"], "text": ["a"]}.get(
        rule.kind
    )
    if rule.kind == "stage":
        known = (x for x in mixing.known(rule.stage).values() if x.__module__.startswith("tokcredit."))
        values = [made(next(known))]
    elif values is None:
        limits = [x for x in (rule.at_least, rule.at_most) if x is not None]
        tried = (1, 2, 0, -1) if rule.kind == "whole number" else (0.5, 1.0, 0.25, 0.0, 2.0, -1.0)
        values = [x for x in (*tried, *limits) if rule._inside(x)]
    values = [(x,) for x in values] if rule.several else values
    values += [None] if rule.optional else []
    return values + ([tc.schedule.linear(0.25, 0.5)] if rule.scheduled else [])


# Bounds of each other, with room for every value that is tried.
WIDE = {"accuracy_within": {"low": -10.0, "high": 10.0}}


def made(cls, **given):
    """An instance with some settings and valid ones where there is no default."""
    return cls(**required(cls) | WIDE.get(cls.__name__, {}) | given)


def required(cls):
    """Valid values of the settings without a default."""
    parameters = inspect.signature(cls).parameters.values()
    return {p.name: inside(rules(cls)[p.name])[0] for p in parameters if p.default is p.empty}
