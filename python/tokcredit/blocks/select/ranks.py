"""Exact ranks: the largest values, quantiles, and the subset of largest variance."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.arguments import FLOATS, INTEGERS, describe, instance, per_token, tensor, whole_number
from tokcredit.blocks import segment
from tokcredit.blocks.segment import Ids
from tokcredit.groups import Groups
from tokcredit.spans import Spans, require_spans


class _Everything(Ids):
    """One scope that holds all rows."""


class Share(NamedTuple):
    """How many elements of a scope are wanted, as a share of all that compete in it.

    Attributes:
        share: From 0 to 1.
        rounding: ``"up"``, ``"down"`` or ``"nearest"``, with halves to even. Up and down ignore a rounding error of
            1e-9, so that 0.7 of 10 is 7.
        least: Smallest number that is wanted.
    """

    share: float
    rounding: str = "up"
    least: int = 1


def everything(spans: Spans) -> Ids:
    """Return one scope that holds all rows.

    Args:
        spans: The rows.
    """
    require_spans("spans", spans)
    return _Everything(torch.zeros_like(spans.begin), 1)


def _scopes(spans: Spans, by: Ids | Groups | None) -> Ids:
    require_spans("spans", spans)
    if by is None:
        return Ids(torch.arange(spans.num_rows, device=spans.device), spans.num_rows)
    if isinstance(by, Groups):
        return Ids(by.index, by.count)
    instance("by", by, Ids)
    tensor("by.ids", by.ids, (torch.int64,), (spans.num_rows,), spans.device)
    if by.mask is not None:
        raise ValueError("by: expected scopes without a mask, got one; give a row that takes no part the id -1")
    return by


def _ids(by: Ids) -> Tensor | None:
    return None if isinstance(by, _Everything) else by.ids


def _quota(name: str, x: int | Tensor | Share, by: Ids) -> tuple[Tensor | None, int, float, int, int]:
    """Return what native operations take: numbers of the scopes or None, scopes, share, rounding, least."""
    if isinstance(x, Share):
        share, rounding, least = x
        if not 0 <= share <= 1:
            raise ValueError(f"{name}: expected a share from 0 to 1, got {share}")
        if rounding not in ops.ROUNDINGS:
            raise ValueError(f"{name}: expected rounding {', '.join(ops.ROUNDINGS)}, got {rounding!r}")
        return None, by.segments, float(share), ops.ROUNDINGS.index(rounding), whole_number(f"{name}: least", least)
    return _per_scope(name, x, by), by.segments, 0.0, 0, 0


def _per_scope(name: str, x: int | Tensor, by: Ids) -> Tensor:
    if isinstance(x, int) and not isinstance(x, bool):
        return by.ids.new_full((by.segments,), x)
    x = torch.as_tensor(x, device=by.ids.device)
    if x.dtype not in INTEGERS:
        raise TypeError(f"{name}: expected integers, got {describe(x)}")
    if x.dim() and tuple(x.shape) != (by.segments,):
        raise ValueError(f"{name}: expected one number or [{by.segments}], got {list(x.shape)}")
    return x.long().expand(by.segments)


def sizes(spans: Spans, by: Ids | Groups | None = None) -> Tensor:
    """Return the number of unmasked tokens of each scope, int64 ``[scopes]``.

    Args:
        spans: The rows.
        by: The scopes; see the module.
    """
    counts = segment.count(require_spans("spans", spans))
    if by is None:
        return counts
    if isinstance(by, _Everything) and by.ids.shape == counts.shape:
        return counts.sum(0, keepdim=True)
    return segment.sum(counts.double(), _scopes(spans, by)).long()


def top_k(score: Tensor, k: int | Tensor | Share, spans: Spans, by: Ids | Groups | None = None) -> Tensor:
    """Return a mask of the k largest scores of each scope, or of all its scores if there are fewer.

    Ties go to the lower index.

    Args:
        score: float ``[N]``.
        k: How many, for all scopes or int64 ``[scopes]``, or a :class:`Share` of each scope.
        spans: The rows.
        by: The scopes; see the module.

    Returns:
        bool ``[N]``.
    """
    by = _scopes(spans, by)
    per_token("score", score, spans.size, spans.device)
    return ops.select(score, *spans.arrays, _ids(by), *_quota("k", k, by), False, ops.num_threads())


def quota(name: str, k: int | Tensor | Share, spans: Spans) -> Tensor:
    """Return how many tokens of each row are wanted, int64 ``[R]``.

    Args:
        name: Argument name for the error.
        k: For all rows, int64 ``[R]``, or a :class:`Share` of each row.
        spans: The rows.
    """
    if not isinstance(k, Share):
        return _per_scope(name, k, _scopes(spans, None))
    same = torch.zeros(spans.size, device=spans.device)
    return sizes(spans.with_mask(top_k(same, k, spans)))


def kth(x: Tensor, rank: int | Tensor, spans: Spans, by: Ids | Groups | None = None) -> Tensor:
    """Return the value of a rank in each scope, counted from 0 at the smallest; NaN if the scope is too small.

    It is without gradient.

    Args:
        x: float ``[N]``.
        rank: For all scopes, or int64 ``[scopes]``.
        spans: The rows.
        by: The scopes; see the module.

    Returns:
        float ``[scopes]``.
    """
    by = _scopes(spans, by)
    per_token("x", x, spans.size, spans.device)
    wanted = _quota("rank", rank, by)
    return ops.select(x, *spans.arrays, _ids(by), *wanted, True, ops.num_threads())


def _place(q: float, spans: Spans, by: Ids) -> Tensor:
    if not 0 <= q <= 1:
        raise ValueError(f"q: expected a number from 0 to 1, got {q}")
    return (sizes(spans, by) - 1).clamp(min=0).double() * q


def quantile(x: Tensor, q: float, spans: Spans, by: Ids | Groups | None = None) -> Tensor:
    """Return the q-quantile of each scope, interpolated linearly between ranks; NaN for an empty scope.

    It is without gradient.

    Args:
        x: float ``[N]``.
        q: From 0 to 1.
        spans: The rows.
        by: The scopes; see the module.

    Returns:
        float ``[scopes]``.
    """
    by = _scopes(spans, by)
    place = _place(q, spans, by)
    below = kth(x, place.floor().long(), spans, by)
    above = kth(x, place.ceil().long(), spans, by)
    return torch.where(below == above, below, below + (above - below) * (place - place.floor()).to(below.dtype))


def quantile_nearest(x: Tensor, q: float, spans: Spans, by: Ids | Groups | None = None) -> Tensor:
    """Return the element of rank ``round(q * (n - 1))`` of each scope, halves to even; NaN for an empty scope.

    It is without gradient.

    Args:
        x: float ``[N]``.
        q: From 0 to 1.
        spans: The rows.
        by: The scopes; see the module.

    Returns:
        float ``[scopes]``.
    """
    by = _scopes(spans, by)
    return kth(x, _place(q, spans, by).round().long(), spans, by)


def maximum_variance(
    x: Tensor, k: int | Tensor | Share, by: Ids | Groups | None = None, *, prefer_largest: bool = False
) -> Tensor:
    """Return a mask of the k rows of each scope whose values have the largest population variance as a set.

    That set is the first i and the last k - i values in descending order for some i. Every i is tried; the smallest
    wins a tie. Variances are a tie where they differ by less than 1e-12 times that of all values.

    Args:
        x: float ``[R]``, one value per row.
        k: How many, for all scopes or int64 ``[scopes]``, or a :class:`Share` of each scope. A scope with fewer rows is
            taken whole.
        by: The scopes, or None for a single one. A row with an id outside of them takes no part.
        prefer_largest: Whether the k largest values win a tie in which they take part.

    Returns:
        bool ``[R]``.

    References:
        arXiv 2504.13818 (the algorithm), arXiv 2509.22115 (over groups).
    """
    tensor("x", x, FLOATS, (x.numel() if isinstance(x, Tensor) else 0,))
    if by is None:
        by = Ids(torch.zeros(x.shape, dtype=torch.int64, device=x.device), 1)
    if isinstance(by, Groups):
        by = Ids(by.index, by.count)
    instance("by", by, Ids)
    tensor("by.ids", by.ids, (torch.int64,), tuple(x.shape), x.device)
    return ops.maximum_variance(x, by.ids, *_quota("k", k, by), prefer_largest)


def within_mean(x: Tensor, budget: float, spans: Spans, least: int = 0) -> Tensor:
    """Return a mask of the smallest numbers of all rows together whose mean is at most a budget.

    In ascending order, ties in the order of the tokens, these are the numbers before the first one with which the mean
    would exceed the budget. NaN is never among them.

    Args:
        x: float ``[N]``.
        budget: Largest mean.
        spans: The rows, with the mask of the tokens that compete.
        least: So many of the smallest numbers are taken whatever their mean.

    Returns:
        bool ``[N]``.
    """
    require_spans("spans", spans)
    per_token("x", x, spans.size, spans.device)
    x = x if x.dtype == torch.float64 else x.float()
    return ops.within_mean(x, *spans.arrays, float(budget), whole_number("least", least))
