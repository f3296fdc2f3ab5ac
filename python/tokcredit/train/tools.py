"""A calculator that a model calls in its responses, and the syntax of its calls.

``<tool>add(12,34)</tool>`` is answered with ``<result>46</result>``. Text that is no valid call gets an error as its
result. Nothing that a model writes is run as a program.
"""

from __future__ import annotations

import functools
import operator
import random
import re
from collections.abc import Callable, Sequence
from fractions import Fraction

from tokcredit.expression import parse
from tokcredit.rewards import matching
from tokcredit.rewards.matching import Call, Similarities
from tokcredit.settings import rules

STOP = "</tool>"
"""Text that ends a turn with a call."""

INTRODUCTION = (
    "Use a calculator: write <tool>add(2,3)</tool> and its result follows as <result>5</result>. There are add, sub, "
    "mul and div, each of two numbers. End with <answer>5</answer>."
)
"""Instruction for models with a chat template."""

_OPERATIONS: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
}
WORDS = (*(f"<{slash}{tag}>" for tag in ("tool", "result", "answer") for slash in ("", "/")), *_OPERATIONS)
"""Words of the syntax: tags and names of the operations."""

_SIGNS = {"add": "+", "sub": "-", "mul": "*"}
_PARAMETERS = ("a", "b")
_CALL = re.compile(r"\s*([A-Za-z_]\w*)\s*\((.*)\)\s*", re.S)
_ARGUMENT = re.compile(r"\s*(?:([A-Za-z_]\w*)\s*=)?\s*(-?[0-9]{1,15}(?:\.[0-9]{1,15})?)\s*")
_RULES = {rule.__name__: rule for rule in (matching.optimal, matching.greedy, matching.sinkhorn)}


def calls(text: str) -> list[Call]:
    """Return the calls of a turn, in order, one for each end tag.

    Arguments are numbers, by name or by position (``a``, then ``b``). A call that is not valid has the arguments None,
    and an empty name if the name cannot be read.

    Args:
        text: Text of the turn.
    """
    return [_call(piece.rpartition("<tool>")) for piece in text.split(STOP)[:-1]]


def _call(parts: tuple[str, str, str]) -> Call:
    _, tag, body = parts
    whole = _CALL.fullmatch(body) if tag else None
    if whole is None:
        return Call("", None)
    name, inside = whole.groups()
    arguments: dict[str, Fraction] = {}
    for place, part in enumerate(inside.split(",") if inside.strip() else ()):
        argument = _ARGUMENT.fullmatch(part)
        key = argument and (argument[1] or (_PARAMETERS[place] if place < len(_PARAMETERS) else None))
        if not argument or not key or key in arguments:
            return Call(name, None)
        arguments[key] = Fraction(argument[2])
    return Call(name, arguments)


def result(call: Call) -> str:
    """Return the result of a call: a number, to six digits if it is not whole, or ``error: ...``.

    Args:
        call: The call.
    """
    if call.name not in _OPERATIONS:
        return "error: no such tool"
    if call.arguments is None or set(call.arguments) != set(_PARAMETERS):
        return "error: expected two numbers"
    try:
        value = _OPERATIONS[call.name](*(call.arguments[name] for name in _PARAMETERS))
    except ZeroDivisionError:
        return "error: division by zero"
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.6g}"


def written(call: Call) -> str:
    """Return a call as text, which :func:`calls` reads.

    Args:
        call: The call.
    """
    return f"<tool>{call.name}({','.join(map(str, (call.arguments or {}).values()))}){STOP}"


def results(answered: Sequence[Call]) -> str:
    """Return the text of the results that follow a turn.

    Args:
        answered: Calls of the turn.
    """
    return "".join(f"<result>{result(call)}</result>" for call in answered)


def chain(generator: random.Random, operations: int, digits: int) -> tuple[str, list[Call], str]:
    """Return a random question such as ``(7+5)*3=``, the calls that solve it from left to right, and its answer.

    No intermediate result is negative.

    Args:
        generator: Source of randomness.
        operations: Number of operations.
        digits: Digits of each number.
    """

    def number() -> Fraction:
        return Fraction(generator.randrange(10 ** (digits - 1), 10**digits))

    value = number()
    text, expected = str(value), list[Call]()
    for i in range(operations):
        name, other = generator.choice(list(_SIGNS)), number()
        if name == "sub" and value < other:
            name = "add"
        text = f"{f'({text})' if i else text}{_SIGNS[name]}{other}"
        expected.append(Call(name, {"a": value, "b": other}))
        value = _OPERATIONS[name](value, other)
    return f"{text}=", expected, str(value)


def conversation(generator: random.Random, noise: float) -> str:
    """Return a question of two operations with calls, results and answer. After a wrong call the rest is consistent.

    Args:
        generator: Source of randomness.
        noise: Probability that a call is random.
    """
    text, expected, _ = chain(generator, 2, 1)
    value = (expected[0].arguments or {})["a"]
    for name, arguments in expected:
        other = (arguments or {})["b"]
        if generator.random() < noise:
            name, other = generator.choice(list(_SIGNS)), Fraction(generator.randrange(1, 10))
        call = Call(name, {"a": value, "b": other})
        text += written(call) + results([call])
        value = Fraction(result(call))
    return f"{text}<answer>{value}</answer>"


def rule(text: str) -> Callable[[Similarities], Similarities]:
    """Return the rule that matches calls with the expected ones.

    Args:
        text: ``optimal``, ``greedy`` or ``sinkhorn``, with settings, for example ``optimal(penalty=0.5)``.

    Raises:
        TypeError: A setting has the wrong type.
        ValueError: There is no such rule, it does not take these settings, or one is out of range.
    """
    call = parse(text, "matching")
    if call.name not in _RULES or call.positional:
        raise ValueError(f"matching: expected {', '.join(_RULES)}, with settings by name, got {text!r}")
    known = rules(_RULES[call.name])
    for name, value in call.named.items():
        if name not in known:
            raise ValueError(f"matching: expected {call.name} with {', '.join(known)}, got {text!r}")
        known[name].checked(f"matching: {call.name}: {name}", value)
    return functools.partial(_RULES[call.name], **call.named)
