"""Checks of tensor arguments. Every error names the argument, what was expected and what was given."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor

INTEGERS = (torch.int32, torch.int64)
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def describe(x: Any) -> str:
    """Return the dtype and shape of a tensor, or the type of anything else.

    Args:
        x: Anything.
    """
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def _either(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(d).removeprefix("torch.") for d in dtypes)


def tensor(
    name: str,
    x: Any,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
    device: torch.device | None = None,
    hint: str = "",
) -> Tensor:
    """Return ``x`` after checking that it is a tensor of one of the dtypes, of this shape, on this device.

    Args:
        name: Argument name for the error.
        x: What the caller passed.
        dtypes: Allowed dtypes.
        shape: Required shape.
        device: Required device, or None for any.
        hint: What to do about a wrong dtype, appended to that error.

    Raises:
        TypeError: ``x`` is not a tensor or has another dtype.
        ValueError: Its shape or device is wrong.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected torch.Tensor, {_either(dtypes)} {list(shape)}, got {type(x).__name__}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name}: expected {_either(dtypes)} {list(shape)}, got {describe(x)}{hint}")
    if x.shape != shape:
        raise ValueError(f"{name}: expected {_either(dtypes)} {list(shape)}, got {describe(x)}")
    if device is not None and x.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {x.device}")
    if x.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {x.layout}")
    return x


def instance(name: str, x: Any, kind: type, hint: str = "") -> Any:
    """Return ``x`` after checking that it is an instance of a class.

    Args:
        name: Argument name for the error.
        x: What the caller passed.
        kind: The class.
        hint: What to do about it, appended to the error.

    Raises:
        TypeError: It is something else.
    """
    if not isinstance(x, kind):
        module = "torch" if kind is Tensor else "tokcredit"
        raise TypeError(f"{name}: expected {module}.{kind.__name__}, got {type(x).__name__}{hint}")
    return x


def float_tensor(name: str, x: Any) -> Tensor:
    """Return ``x`` after checking that it is a dense float tensor.

    Args:
        name: Argument name for the error.
        x: What the caller passed.

    Raises:
        TypeError: It is not.
    """
    if not isinstance(x, Tensor) or x.dtype not in FLOATS or x.layout != torch.strided:
        raise TypeError(f"{name}: expected a float tensor, got {describe(x)}")
    return x


def constant(name: str, x: Tensor) -> Tensor:
    """Return ``x`` after checking that it requires no gradient, which it would silently not get.

    Args:
        name: Argument name for the error.
        x: The tensor.

    Raises:
        ValueError: It requires gradient.
    """
    if x.requires_grad:
        raise ValueError(f"{name}: expected a tensor without gradient, got one that requires it")
    return x


def per_token(name: str, x: Any, size: int, device: torch.device) -> Tensor:
    """Return ``x`` after checking that it is a float tensor ``[size]`` on the device.

    Args:
        name: Argument name for the error.
        x: What the caller passed.
        size: Number of tokens N.
        device: Required device.

    Raises:
        TypeError: ``x`` is not a float tensor.
        ValueError: Its shape or device is wrong.
    """
    return tensor(name, x, FLOATS, (size,), device)


def whole_number(name: str, x: Any, at_least: int = 0) -> int:
    """Return ``x`` as an int after checking that it is a whole number of at least ``at_least``.

    Args:
        name: Argument name for the error.
        x: An int, a NumPy integer or a 0-d integer tensor.
        at_least: Smallest allowed value.

    Raises:
        TypeError: ``x`` is not a whole number.
        ValueError: It is too small.
    """
    try:
        number = operator.index(x)
    except TypeError:
        raise TypeError(f"{name}: expected a whole number, got {x!r}") from None
    if isinstance(x, bool):
        raise TypeError(f"{name}: expected a whole number, got {x!r}")
    if number < at_least:
        raise ValueError(f"{name}: expected at least {at_least}, got {number}")
    return number


def row_numbers(rows: Any, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return row numbers on the host, from row numbers or from a mask over rows.

    Args:
        rows: Integers ``[M]`` or bool ``[count]``: a tensor, an array or a sequence. A CUDA tensor is copied to the
            host.
        count: Number of rows R.

    Raises:
        TypeError: ``rows`` holds neither integers nor bool.
        ValueError: The shape is wrong, or a number is not in ``[0, count)``.
    """
    numbers = rows.detach().cpu().numpy() if isinstance(rows, Tensor) else np.asarray(rows)
    if numbers.size == 0 and numbers.dtype != np.bool_:
        numbers = numbers.astype(np.int64)
    if numbers.dtype == np.bool_:
        if numbers.shape != (count,):
            raise ValueError(f"rows: expected integers [M] or bool [{count}], got bool {list(numbers.shape)}")
        return np.flatnonzero(numbers)
    if not np.issubdtype(numbers.dtype, np.integer):
        raise TypeError(f"rows: expected integers [M] or bool [{count}], got {numbers.dtype}")
    if numbers.ndim != 1:
        raise ValueError(f"rows: expected integers [M] or bool [{count}], got shape {list(numbers.shape)}")
    if numbers.size and (numbers.min() < 0 or numbers.max() >= count):
        wrong = numbers[(numbers < 0) | (numbers >= count)][0]
        raise ValueError(f"rows: expected numbers from 0 to {count - 1}, got {wrong}")
    return numbers.astype(np.int64, copy=False)
