"""Values that a declared setting must refuse, made from the declaration."""

import dataclasses
import inspect
import math

import tokcredit as tc
from tokcredit import mixing
from tokcredit.settings import rules


def numbers(rule):
    """Numbers just outside of a range."""
    least = [] if rule.at_least is None else [rule.at_least - 1, -math.inf]
    above = [] if rule.above is None else [rule.above, rule.above - 1]
    most = [] if rule.at_most is None else [rule.at_most + 1]
    below = [] if rule.below is None else [rule.below, rule.below + 1]
    whole = rule.kind == "whole number"
    undefined = [] if whole else [math.nan] if rule.infinite else [math.nan, math.inf, -math.inf]
    limits = (*least, *above, *most, *below)
    return [int(x) if whole else x for x in limits if not (whole and math.isinf(x))] + undefined


def values(rule):
    """Python values of other types, and of the right type out of range."""
    others = {
        "number": ["abc", True, [1.0], 1j],
        "whole number": ["1", True, 1.5],
        "bool": ["true", 1],
        "text": [3, b"x"],
        "path": [3, b"x"],
        "option": ["no such word", 3],
        "input name": ["no_such_input", 3],
        "stage": ["abc", 3, object()],
    }[rule.kind]
    others += numbers(rule) if "number" in rule.kind else []
    others += [] if rule.optional else [None]
    others += [] if rule.scheduled else [tc.schedule.linear(0, 1)]
    return [3, "abc", [], *((x,) for x in others)] if rule.several else others


def texts(rule):
    """Texts that stand for no value of a setting, as typed on the command line. Any text is a text and a path."""
    if rule.kind in ("number", "whole number"):
        fractions = ["1.5"] if rule.kind == "whole number" else []
        return ["abc", "true", "1+1", *fractions, *(f"{x:.15g}" for x in numbers(rule))]
    return {"text": [], "path": [], "bool": ["abc", "1"]}.get(rule.kind, ["no_such_word"])


def inside(rule):
    """A value that the rule allows."""
    if rule.several:
        return ()
    if rule.kind == "stage":
        return next(made(x) for x in mixing.known(rule.stage).values() if x.__module__.startswith("tokcredit"))
    if "number" in rule.kind:
        tried = (0, 1, 0.5, -1, 2) if rule.kind == "number" else (0, 1, 2)
        return next(x for x in tried if rule._inside(x))
    return {"bool": True, "option": (rule.options or ("",))[0], "input name": "entropies"}[rule.kind]


def made(cls, **given):
    """An instance with some settings and valid ones where there is no default."""
    return cls(**required(cls) | given)


def required(cls):
    """Valid values of the settings without a default."""
    parameters = inspect.signature(cls).parameters.values()
    return {p.name: inside(rules(cls)[p.name]) for p in parameters if p.default is p.empty}


def declared(cls):
    """Names and rules of the settings of a class, settings inside settings included."""
    for f in dataclasses.fields(cls):
        rule = rules(cls).get(f.name)
        if rule is not None and rule.kind == "stage" and dataclasses.is_dataclass(rule.stage):
            yield from declared(rule.stage)
        else:
            yield cls, f.name, rule


def has_limits(rule):
    """Whether a number is bounded on at least one side."""
    return any(x is not None for x in (rule.at_least, rule.above, rule.at_most, rule.below))
