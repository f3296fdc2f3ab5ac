"""Which cached keys a head looks at, by a few of the frequencies of its rotary embedding (FASA).

A *chunk* is two coordinates of query and key that rotary embedding turns together. Queries and keys are those after
rotary embedding, keys repeated for the query heads. Example, once per model and then at every decoding step::

    chunks = frequency.dominant(torch.stack([frequency.agreement(q, k, 256) for q, k in steps]).mean(0))
    kept = frequency.keys(frequency.scores(q, k, chunks), 256)  # the head attends to these keys, positions unchanged

The paper attends to all keys in layer 0 and while it reads the prompt.

References: arXiv 2602.03152.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokcredit.arguments import describe, float_tensor, tensor, whole_number

_LAYOUTS = ("half", "adjacent")


def _chunks(query: Tensor, keys: Tensor, layout: str, rotated: int | None) -> tuple[Tensor, Tensor]:
    """Return query ``[H, C, 2]`` and keys ``[H, t, C, 2]`` by chunk, in float32 at least."""
    if float_tensor("query", query).dim() != 2:
        raise ValueError(f"query: expected [H, d], got {describe(query)}")
    heads, width = query.shape
    if float_tensor("keys", keys).dim() != 3 or keys.shape[0] != heads or keys.shape[2] != width:
        raise ValueError(f"keys: expected [{heads}, t, {width}], got {describe(keys)}")
    if layout not in _LAYOUTS:
        raise ValueError(f"layout: expected {' or '.join(_LAYOUTS)}, got {layout!r}")
    rotated = width if rotated is None else whole_number("rotated", rotated, 2)
    if rotated > width or rotated % 2:
        raise ValueError(f"rotated: expected an even number up to {width}, got {rotated}")
    dtype = torch.promote_types(query.dtype, torch.float32)
    shape = (2, rotated // 2) if layout == "half" else (rotated // 2, 2)
    q, k = (x.detach().to(dtype)[..., :rotated].unflatten(-1, shape) for x in (query, keys))
    return (q.mT, k.mT) if layout == "half" else (q, k)


def agreement(query: Tensor, keys: Tensor, k: int, layout: str = "half", rotated: int | None = None) -> Tensor:
    """Return how far the keys that each chunk prefers agree with those that the head prefers.

    ``agreement[h, i]`` is the share of the k keys with the largest ``q[i] . k[t, i]`` that are among the k keys
    with the largest ``q . k[t]``; k is at most t. Ties go to the lower index. The result is without gradient.

    Args:
        query: float ``[H, d]``, of one decoding step.
        keys: float ``[H, t, d]``.
        k: Number of keys, such as the budget.
        layout: ``"half"`` where coordinates j and j + d / 2 are turned together (Llama, Qwen, Mistral in transformers),
            or ``"adjacent"`` for 2 j and 2 j + 1 (GPT-J). The released code takes ``"adjacent"`` for models of the
            first kind.
        rotated: Number of the leading coordinates that are turned, or None for all.

    Returns:
        float ``[H, C]`` for C chunks.

    Raises:
        TypeError: A tensor is not float.
        ValueError: A shape or the layout is wrong, or k is below 1.
    """
    q, by_chunk = _chunks(query, keys, layout, rotated)
    k = min(whole_number("k", k, 1), keys.shape[1])
    alone = torch.einsum("hcx,htcx->hct", q, by_chunk)
    together = torch.einsum("hd,htd->ht", query.to(q.dtype), keys.to(q.dtype))[:, None]
    both = _largest(alone, k) & _largest(together, k)
    return both.sum(-1).to(q.dtype) / max(k, 1)


def dominant(agreement: Tensor, threshold: float = 0.8, least: int = 16, most: int = 16) -> Tensor:
    """Return which chunks of each head stand for it.

    These are the chunks whose agreement is at least the quantile ``threshold`` of the head; at least ``least`` and at
    most ``most``, the largest first. With the defaults, as in all published runs, it is the 16 largest.

    Args:
        agreement: float ``[H, C]``, mean over decoding steps and samples.
        threshold: Quantile, from 0 to 1.
        least: Smallest number of chunks.
        most: Largest number of chunks.

    Returns:
        bool ``[H, C]``.

    Raises:
        TypeError: ``agreement`` is not float.
        ValueError: Its shape is wrong, the quantile is not between 0 and 1, or ``least`` exceeds ``most``.
    """
    if float_tensor("agreement", agreement).dim() != 2 or agreement.shape[1] == 0:
        raise ValueError(f"agreement: expected [H, C] with at least one chunk, got {describe(agreement)}")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold: expected a number from 0 to 1, got {threshold}")
    if whole_number("least", least) > whole_number("most", most):
        raise ValueError(f"least: expected at most {most}, got {least}")
    x = agreement.to(torch.promote_types(agreement.dtype, torch.float32))
    count = (x >= x.quantile(threshold, dim=1, keepdim=True)).sum(1, keepdim=True).clamp(least, most)
    rank = x.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return rank < count


def scores(query: Tensor, keys: Tensor, chunks: Tensor, layout: str = "half", rotated: int | None = None) -> Tensor:
    """Return the score of each cached key: the sum of ``q[i] . k[t, i]`` over the chosen chunks of the head.

    It is without gradient.

    Args:
        query: float ``[H, d]``, of one decoding step.
        keys: float ``[H, t, d]``.
        chunks: bool ``[H, C]``, from :func:`dominant`.
        layout: As in :func:`agreement`.
        rotated: As in :func:`agreement`.

    Returns:
        float ``[H, t]``; only the order matters.

    Raises:
        TypeError: A tensor has another dtype.
        ValueError: A shape or the layout is wrong.
    """
    q, by_chunk = _chunks(query, keys, layout, rotated)
    tensor("chunks", chunks, (torch.bool,), tuple(q.shape[:2]), query.device)
    return torch.einsum("hcx,htcx->ht", q * chunks[..., None], by_chunk)


def keys(scores: Tensor, budget: int) -> Tensor:
    """Return a mask of the keys with the largest scores of each head; ties go to the lower index, and NaN ranks last.

    Args:
        scores: float ``[H, t]``.
        budget: Number of keys; with t or more, attention is full.

    Returns:
        bool ``[H, t]``.

    Raises:
        TypeError: ``scores`` is not float.
        ValueError: Its shape is wrong, or the budget is below 0.
    """
    if float_tensor("scores", scores).dim() != 2:
        raise ValueError(f"scores: expected [H, t], got {describe(scores)}")
    return _largest(scores.nan_to_num(-torch.inf, torch.inf, -torch.inf), whole_number("budget", budget))


def _largest(x: Tensor, k: int) -> Tensor:
    return x.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1) < k
