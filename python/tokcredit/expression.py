"""Calls written as text, ``growing(0.025, high=0.05)``: what a stage, a task or a model prints can be typed."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tokcredit.settings import Range, RefusedError, nearest, rules


class Word(str):
    """A name without quotes among the arguments of a call, such as ``abc`` in ``ppo(low=abc)``.

    What it stands for is up to the argument: ``true`` is a bool for one and a text for another.
    """


class Call(NamedTuple):
    """A name with arguments, which are literals or what inner calls made.

    Attributes:
        name: Name of what is called.
        positional: Arguments by position; empty for a bare name.
        named: Arguments by name.
    """

    name: str
    positional: tuple[Any, ...]
    named: dict[str, Any]


def parse(text: str, argument: str, inner: Mapping[str, Callable[..., Any]] | None = None) -> Call:
    """Return the call that a text describes: ``NAME`` or ``NAME(value, key=value)``.

    A value is a literal, ``inf``, a tuple of values, or a call of one of ``inner``. With ``inner`` it is also a
    :class:`Word`.

    Args:
        text: What was typed.
        argument: Name of the option or argument, for the error.
        inner: What may be called inside the arguments.

    Raises:
        ValueError: The text has another form.
    """
    node = _parsed(text)
    call = _call(node, argument, inner or {}) if node else None
    if call is None:
        raise ValueError(f"{argument}: expected NAME or NAME(key=value, ...), got {text!r}")
    return call


def _parsed(text: str) -> ast.expr | None:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _call(node: ast.expr, argument: str, inner: Mapping[str, Callable[..., Any]]) -> Call | None:
    if isinstance(node, ast.Name):
        return Call(node.id, (), {})
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        return None
    try:
        positional = tuple(_value(x, argument, inner) for x in node.args)
        named = {str(k.arg): _value(k.value, argument, inner) for k in node.keywords if k.arg}
    except _NotValueError:
        return None
    return Call(node.func.id, positional, named) if len(named) == len(node.keywords) else None


class _NotValueError(Exception):
    pass


def _value(node: ast.expr, argument: str, inner: Mapping[str, Callable[..., Any]]) -> Any:
    if isinstance(node, ast.Name) and node.id in ("inf", "nan"):
        return float(node.id)
    if isinstance(node, ast.Name) and inner:
        return Word(node.id)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _value(node.operand, argument, inner)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return -value
        raise _NotValueError
    if isinstance(node, ast.Call):
        call = _call(node, argument, inner)
        if call is None or not inner:
            raise _NotValueError
        return call_with(inner, call, argument)
    if isinstance(node, ast.Tuple):
        return tuple(_value(x, argument, inner) for x in node.elts)
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise _NotValueError from None


def call_with(known: Mapping[str, Callable[..., Any]], call: Call, argument: str) -> Any:
    """Return what a call of one of some functions or classes gives.

    Args:
        known: What may be called, by name.
        call: The call.
        argument: Name of the option or argument, for the error.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: There is no such name, it does not take these arguments, or one is out of range.
    """
    if call.name not in known:
        hint = nearest(call.name, known)
        raise ValueError(f"{argument}: expected one of {', '.join(sorted(known))}, got {call.name!r}{hint}")
    function = known[call.name]
    try:
        given = inspect.signature(function).bind(*call.positional, **call.named)
    except TypeError as error:
        raise ValueError(f"{argument}: {call.name}: {_misfit(call, inspect.signature(function), error)}") from None
    for name, rule in rules(function).items():
        if name in given.arguments:
            value = _read(rule, given.arguments[name])
            given.arguments[name] = rule.checked(f"{argument}: {call.name}: {name}", value)
    try:
        return function(*given.args, **given.kwargs)
    except RefusedError as error:
        raise error.of(f"{argument}: {error.name}") from None


def _misfit(call: Call, signature: inspect.Signature, error: TypeError) -> str:
    """Return in a sentence why a call does not fit a signature."""
    names = list(signature.parameters)
    settings = f"settings among {', '.join(names)}" if names else "no settings"
    for name in call.named:
        if name not in names:
            return f"expected {settings}, got {name}{nearest(name, names)}"
    if len(call.positional) > len(names):
        return f"expected {f'at most {len(names)} ' if names else ''}{settings}, got {len(call.positional)}"
    if twice := [name for name in names[: len(call.positional)] if name in call.named]:
        return f"expected each setting once, got {twice[0]} twice"
    given = (*names[: len(call.positional)], *call.named)
    required = [p.name for p in signature.parameters.values() if p.default is p.empty]
    if missing := [name for name in required if name not in given]:
        return f"expected a value for {', '.join(missing)}, got none"
    return f"expected {settings}, got {error}"


def _read(rule: Range, value: Any) -> Any:
    """Return a value whose words are read as what a setting may be."""
    if isinstance(value, tuple):
        return tuple(_read(rule, x) for x in value)
    return rule.read(value) if isinstance(value, Word) else value


def construct(
    text: str,
    argument: str,
    known: Mapping[str, Callable[..., Any]],
    inner: Mapping[str, Callable[..., Any]] | None = None,
) -> Any:
    """Return what the call in a text gives.

    Args:
        text: A call.
        argument: Name of the option or argument, for the error.
        known: What may be called, by name.
        inner: What may be called inside the arguments.

    Raises:
        ValueError: The text is no call, there is no such name, or it does not take these arguments.
    """
    return call_with(known, parse(text, argument, inner), argument)


def setting(text: str, argument: str) -> tuple[str, str]:
    """Return the name and the text of the value of ``name=value``.

    Args:
        text: What was typed.
        argument: Name of the option, for the error.

    Raises:
        ValueError: The text has another form.
    """
    name, separator, value = text.partition("=")
    if not separator or not name.strip().isidentifier():
        raise ValueError(f"{argument}: expected name=value, got {text!r}")
    if re.fullmatch(r"[^()]*,\s*\w+=[^()]*", value):
        raise ValueError(f"{argument}: expected spaces between several name=value, got {text!r}")
    return name.strip(), value


def read(text: str, rule: Range, argument: str, inner: Mapping[str, Callable[..., Any]]) -> Any:
    """Return the value of a setting that a text stands for, or the text itself if it stands for none.

    Args:
        text: What was typed: a number, a word, or a call of one of ``inner``.
        rule: What the setting may be.
        argument: Name of the option or argument, for the error.
        inner: What may be called.

    Raises:
        TypeError: An argument of a call has the wrong type.
        ValueError: There is no such name, it does not take these arguments, or one is out of range.
    """
    found = rule.read(text)
    if not isinstance(found, str) or rule.kind in ("text", "option", "input name"):
        return found
    node = _parsed(text)
    if not isinstance(node, ast.Call | ast.Tuple):
        return text
    try:
        found = _value(node, argument, inner)
    except _NotValueError:
        return text
    return (found,) if rule.several and not isinstance(found, tuple) else found
