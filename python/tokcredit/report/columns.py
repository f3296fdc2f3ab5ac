"""Values of a file as arrays, without silent conversions: 6.5 is no token, ``"1"`` no log-prob and 2 no flag."""

from __future__ import annotations

from typing import Any

import numpy as np

_LISTS = {"float": "numbers", "integer": "whole numbers", "bool": "values true or false"}
_ONE = {"float": "a number", "integer": "a whole number", "bool": "true or false"}
_TYPES = {"float": {int, float, type(None)}, "integer": {int, float}, "bool": {bool, int, float}}
_DTYPES = {"float": np.float32, "integer": np.int64, "bool": np.bool_}


def array(name: str, values: Any, kind: str, where: str) -> Any:
    """Return the values of one row as an array ``[n]`` of float32, int64 or bool.

    A null among floats becomes NaN, and finite floats must be in the range of float32. Whole numbers may be written as
    ``6.0``, and flags as 0 and 1.

    Args:
        name: Name of the column, for errors.
        values: A list, or a NumPy array from an Arrow column.
        kind: ``"float"``, ``"integer"`` or ``"bool"``.
        where: Row and file, for errors.

    Raises:
        ValueError: It is no list, or a value is of another kind.
    """
    expected = f"{name}: expected {_LISTS[kind]} in {where}"
    if not isinstance(values, (list, np.ndarray)):
        raise ValueError(f"{expected}, got {_shown(values)}")
    return _checked(values, kind, expected).astype(_DTYPES[kind])


def scalar(name: str, value: Any, kind: str, where: str) -> Any:
    """Return a value as a Python float, integer or bool, by the rules of :func:`array`.

    Args:
        name: Name of the column, for errors.
        value: The value.
        kind: ``"float"``, ``"integer"`` or ``"bool"``.
        where: Row and file, for errors.

    Raises:
        ValueError: The value is of another kind.
    """
    found = _checked([value], kind, f"{name}: expected {_ONE[kind]} in {where}")[0].item()
    return {"float": float, "integer": int, "bool": bool}[kind](found)


def _checked(values: Any, kind: str, expected: str) -> Any:
    """Return values as an array ``[n]`` of any dtype that holds them."""
    if isinstance(values, np.ndarray) and values.dtype == object:
        values = values.tolist()
    x = _plain(values, kind, expected) if isinstance(values, list) else values
    if not (fits := _fits(x, kind)).all():
        raise ValueError(f"{expected}, got {_shown(x[~fits][0].item())}")
    return x


def _plain(values: list[Any], kind: str, expected: str) -> Any:
    """Return a list of Python values as an array of int64, float64 or bool."""
    if not (types := set(map(type, values))) <= _TYPES[kind]:
        wrong = next(x for x in values if type(x) not in _TYPES[kind])
        raise ValueError(f"{expected}, got {_shown(wrong)}")
    dtype: Any = np.float64 if types & {float, type(None)} else np.bool_ if types == {bool} else np.int64
    try:
        return np.asarray(values, dtype=dtype)
    except OverflowError:
        raise ValueError(f"{expected}, got {_shown(max(values, key=abs))}") from None


def _fits(x: Any, kind: str) -> Any:
    """Return which elements of an array are values of this kind, bool ``[n]``."""
    if kind == "bool" and x.dtype.kind == "b":
        return np.ones(x.shape, dtype=bool)
    if x.ndim != 1 or x.dtype.kind not in "iuf":
        return np.zeros(x.shape, dtype=bool)
    if kind == "bool":
        return (x == 0) | (x == 1)
    if kind == "float":
        return ~np.isfinite(x) | (np.abs(x) <= np.finfo(np.float32).max)
    return (x == np.floor(x)) & (np.abs(x) < 2.0**63)


def _shown(value: Any) -> str:
    text = repr(value.tolist() if isinstance(value, np.ndarray) else value)
    return text if len(text) <= 60 else f"{text[:60]}…"
