"""Choices written as calls, ``growing(0.025, high=0.05)``: what a stage, a task or a model prints is what one types."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Call(NamedTuple):
    """A name with arguments: literals, and what calls among them made; a bare name has none."""

    name: str
    positional: tuple[Any, ...]
    named: dict[str, Any]


def parse(text: str, argument: str, parts: Mapping[str, Callable[..., Any]] | None = None) -> Call:
    """``NAME`` or ``NAME(value, key=value)``; a value is a literal, ``inf``, or a call of one of ``parts``.

    Args:
        text: what was typed.
        argument: who asks, for the error.
        parts: what may stand among the arguments.
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        node = None
    call = _call(node, argument, parts or {}) if node else None
    if call is None:
        raise ValueError(f"{argument}: expected NAME or NAME(key=value, ...), got {text!r}")
    return call


def _call(node: ast.expr, argument: str, parts: Mapping[str, Callable[..., Any]]) -> Call | None:
    if isinstance(node, ast.Name):
        return Call(node.id, (), {})
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        return None
    try:
        positional = tuple(_value(x, argument, parts) for x in node.args)
        named = {str(k.arg): _value(k.value, argument, parts) for k in node.keywords if k.arg}
    except _NotValueError:
        return None
    return Call(node.func.id, positional, named) if len(named) == len(node.keywords) else None


class _NotValueError(Exception):
    pass


def _value(node: ast.expr, argument: str, parts: Mapping[str, Callable[..., Any]]) -> Any:
    if isinstance(node, ast.Name) and node.id == "inf":
        return float("inf")
    if isinstance(node, ast.Call):
        call = _call(node, argument, parts)
        if call is None or not parts:
            raise _NotValueError
        return _construct(call, argument, parts)
    if isinstance(node, ast.Tuple):
        return tuple(_value(x, argument, parts) for x in node.elts)
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise _NotValueError from None


def _construct(call: Call, argument: str, choices: Mapping[str, Callable[..., Any]]) -> Any:
    if call.name not in choices:
        raise ValueError(f"{argument}: expected one of {', '.join(sorted(choices))}, got {call.name!r}")
    choice = choices[call.name]
    try:
        inspect.signature(choice).bind(*call.positional, **call.named)
    except TypeError as error:
        expected = f"{call.name}{inspect.signature(choice)}"
        raise ValueError(f"{argument}: expected {expected}, got {call.positional}, {call.named}: {error}") from None
    return choice(*call.positional, **call.named)


def construct(
    text: str,
    argument: str,
    choices: Mapping[str, Callable[..., Any]],
    parts: Mapping[str, Callable[..., Any]] | None = None,
) -> Any:
    """The choice that ``text`` names, called with its arguments.

    Args:
        text: a call.
        argument: who asks, for the error.
        choices: what there is to choose from.
        parts: what may stand among the arguments.

    Raises:
        ValueError: no such choice, or arguments it does not take.
    """
    return _construct(parse(text, argument, parts), argument, choices)


def setting(text: str, argument: str) -> tuple[str, Any]:
    """``name=literal`` as a pair; what is no literal is a string."""
    name, separator, value = text.partition("=")
    if not separator or not name.isidentifier():
        raise ValueError(f"{argument}: expected name=value, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
