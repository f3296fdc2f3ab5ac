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


def check_tokens(model: Any, ids: Tensor) -> None:
    """Raise an error if a model that tells its vocabulary has no such tokens: on CUDA it would end the process.

    Args:
        model: A torch module.
        ids: Integers.

    Raises:
        ValueError: An id is outside of the vocabulary.
    """
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    size = getattr(embedding, "num_embeddings", None)
    if size is not None and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
        raise ValueError(f"ids: expected tokens in [0, {size}), got {int(ids.min())} to {int(ids.max())}")


def sequence(model: Any, ids: Any) -> Tensor:
    """Return token ids as int64, after checking that they are one sequence that is not empty.

    Args:
        model: Model that reads them.
        ids: What the caller passed.

    Raises:
        TypeError: They are not integers.
        ValueError: They are not ``[n]`` with n at least 1, or an id is outside of the vocabulary.
    """
    if not isinstance(ids, Tensor) or ids.dtype not in INTEGERS:
        raise TypeError(f"ids: expected integers [n], got {describe(ids)}")
    if ids.dim() != 1 or ids.numel() == 0:
        raise ValueError(f"ids: expected [n] with at least one token, got {list(ids.shape)}")
    check_tokens(model, ids)
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
