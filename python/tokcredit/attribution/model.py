"""What all attributions do with a model and a sequence of token ids."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from tokcredit.arguments import INTEGERS, describe, whole_number


@contextmanager
def evaluated(model: Any) -> Iterator[None]:
    """Hold a model in evaluation mode, without dropout, and restore its mode afterwards.

    Args:
        model: A torch module.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def sequence(ids: Any) -> Tensor:
    """Return token ids as int64, after checking that they are one sequence that is not empty.

    Args:
        ids: What the caller passed.

    Raises:
        TypeError: They are not integers.
        ValueError: They are not ``[n]`` with n at least 1.
    """
    if not isinstance(ids, Tensor) or ids.dtype not in INTEGERS:
        raise TypeError(f"ids: expected integers [n], got {describe(ids)}")
    if ids.dim() != 1 or ids.numel() == 0:
        raise ValueError(f"ids: expected [n] with at least one token, got {list(ids.shape)}")
    return ids.long()


def next_logits(model: Any, **inputs: Tensor) -> Tensor:
    """Return the logits after the last token of each row, or those of the classes of a classifier, ``[B, V]``.

    Args:
        model: A model of transformers.
        inputs: ``input_ids`` or ``inputs_embeds``.
    """
    logits: Tensor = model(**inputs).logits
    return logits[:, -1] if logits.dim() == 3 else logits


def output(target: Any, logits: Tensor) -> int:
    """Return the number of an output, after checking that there is one.

    Args:
        target: What the caller passed.
        logits: ``[B, V]``.

    Raises:
        TypeError: It is not a whole number.
        ValueError: There is no such output.
    """
    number = whole_number("target", target)
    if number >= logits.shape[-1]:
        raise ValueError(f"target: expected a number below {logits.shape[-1]}, got {number}")
    return number
