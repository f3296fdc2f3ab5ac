"""Gradients that are added up in ``weight.main_grad``, as Megatron keeps them, in place of ``weight.grad``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.arguments import tensor


def main_grad(weight: Tensor) -> Tensor | None:
    """Return the tensor in which the gradients of a weight are added up, or None where it has none.

    Args:
        weight: A parameter.

    Raises:
        TypeError: Its dtype is neither that of the weight nor float32.
        ValueError: Its shape is not that of the weight.
    """
    found = getattr(weight, "main_grad", None)
    if found is None:
        return None
    dtypes = tuple(dict.fromkeys((weight.dtype, ops.accumulated(weight.dtype))))
    return tensor("main_grad", found, dtypes, tuple(weight.shape), weight.device)


def replaced(weight: Any) -> Tensor | None:
    """Return what the backward pass gives autograd for a weight whose gradient was added to its ``main_grad``.

    With the attribute ``grad_added_to_main_grad`` it is set to True and zeros are returned, because Megatron's hooks
    wait for a gradient, which they then leave out. Without it this is None.

    Args:
        weight: The parameter.
    """
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    return torch.zeros_like(weight, requires_grad=False)


def added(weight: Tensor, gradient: Tensor | None) -> Tensor | None:
    """Add a gradient to ``main_grad`` where the weight has one; return what the backward pass gives autograd.

    Args:
        weight: The parameter.
        gradient: In the shape of the weight, or None where none is wanted.
    """
    total = main_grad(weight)
    if total is None or gradient is None:
        return gradient
    total.add_(gradient)
    return replaced(weight)
