"""Choices written as calls, ``growing(0.025, high=0.05)``: what a stage, a task or a model prints is what one types."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple


class Call(NamedTuple):
    """A name with literal arguments; a bare name has none."""

    name: str
    positional: tuple[Any, ...]
    named: dict[str, Any]


def parse(text: str, argument: str) -> Call:
    """``NAME``, ``NAME(literal, key=literal)``, evaluating nothing but literals.

    Args:
        text: what was typed.
        argument: who asks, for the error.
    """
    problem = ValueError(f"{argument}: expected NAME or NAME(key=literal, ...), got {text!r}")
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        raise problem from None
    if isinstance(node, ast.Name):
        return Call(node.id, (), {})
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise problem
    try:
        positional = tuple(ast.literal_eval(value) for value in node.args)
        named = {str(k.arg): ast.literal_eval(k.value) for k in node.keywords if k.arg is not None}
    except ValueError:
        raise problem from None
    if len(named) != len(node.keywords):
        raise problem
    return Call(node.func.id, positional, named)


def construct(text: str, argument: str, choices: dict[str, Callable[..., Any]]) -> Any:
    """The choice that ``text`` names, called with its arguments.

    Args:
        text: a call.
        argument: who asks, for the error.
        choices: what there is to choose from.

    Raises:
        ValueError: no such choice, or arguments it does not take.
    """
    call = parse(text, argument)
    if call.name not in choices:
        raise ValueError(f"{argument}: expected one of {', '.join(sorted(choices))}, got {call.name!r}")
    choice = choices[call.name]
    try:
        inspect.signature(choice).bind(*call.positional, **call.named)
    except TypeError as error:
        raise ValueError(
            f"{argument}: expected {call.name}{inspect.signature(choice)}, got {text!r}: {error}"
        ) from None
    return choice(*call.positional, **call.named)


def setting(text: str, argument: str) -> tuple[str, Any]:
    """``name=literal`` as a pair; what is no literal is a string."""
    name, separator, value = text.partition("=")
    if not separator or not name.isidentifier():
        raise ValueError(f"{argument}: expected name=value, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
