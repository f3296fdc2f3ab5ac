"""Keys of contexts, a hash of the tokens that the policy had seen, and rows cut where contexts are the same."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.arguments import INTEGERS, instance, tensor
from tokcredit.rollouts import Rollouts
from tokcredit.spans import Spans, require_spans


def _signed(x: int) -> int:
    """Return the int64 with the bits of a whole number below 2^64."""
    return x - (1 << 64) if x >> 63 else x


_FACTOR = _signed(0xD6E8FEB86659FD93)
_INVERSE = _signed(pow(0xD6E8FEB86659FD93, -1, 1 << 64))


def _mixed(x: Tensor) -> Tensor:
    """Return int64 whose bits all depend on all bits of ``x``: the last step of splitmix64, one to one."""
    z = x.long() + _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> shift & (1 << 64 - shift) - 1)) * _signed(factor)
    return z ^ (z >> 31 & (1 << 33) - 1)


def _after(tokens: Tensor, spans: Spans, start: Tensor) -> Tensor:
    """Return the key of the context up to and including each token, ``[N]``; not defined outside of rows.

    ``h[t] = factor * h[t - 1] + mixed(tokens[t])`` modulo 2^64, from sums over the whole buffer with weights
    ``factor^-t``.
    """
    powers, inverses = (tokens.new_full(tokens.shape, x, dtype=torch.int64).cumprod(0) for x in (_FACTOR, _INVERSE))
    sums = (_mixed(tokens) * inverses).cumsum(0)
    known, at = spans.begin > 0, (spans.begin - 1).clamp(min=0)
    at = at.clamp(max=max(spans.size - 1, 0))
    first = start
    if spans.size:
        first = start * torch.where(known, inverses[at], 1) - torch.where(known, sums[at], 0)
    return powers * (sums + ops.spread(first, spans))


def context_keys(tokens: Tensor, spans: Spans, start: Tensor | None = None) -> Tensor:
    """Return the key of each context, a hash of all its tokens in order; for the input ``context_keys`` of a batch.

    ``h[0] = start; h[t + 1] = H(h[t], tokens[t])``. Equal contexts have equal keys, also if they are hashed in parts::

        key = context_keys(prompt, spans)
        context_keys(observation, spans, start=context_keys(action, spans, start=key))  # of the next call

    Args:
        tokens: int32 or int64 ``[N]``, the contexts one after another: all that the policy saw before its reply.
        spans: One row for each context. Their mask is not read.
        start: int64 ``[R]``, the keys of the contexts before these tokens, or None for no tokens before.

    Returns:
        int64 ``[R]``. Two different contexts have the same key with a probability of about 2^-64.
    """
    require_spans("spans", spans)
    instance("tokens", tokens, Tensor)
    tensor("tokens", tokens, INTEGERS, (spans.size,), spans.device)
    bare = Spans.trusted(spans.begin, spans.end, spans.size)
    if start is None:
        start = torch.zeros_like(spans.begin)
    instance("start", start, Tensor)
    tensor("start", start, (torch.int64,), (spans.num_rows,), spans.device)
    if spans.size == 0:
        return start.clone()
    last = _after(tokens, bare, start).index_select(0, (spans.end - 1).clamp(min=0))
    return torch.where(spans.end > spans.begin, last, start)


class Pieces(NamedTuple):
    """Rows cut at all contexts that a row of the same group begins with. Equal contexts are in one tree.

    Attributes:
        spans: The pieces, in the order of the rows, without mask.
        row: int64 ``[M]``, row of each piece.
        tree: int64 ``[M]``, number of the context that each piece begins with.
        group: int64 ``[K]``, group of each of these contexts.
        after: int64 ``[M]``, number of the context that the piece ends with, -1 if no piece begins with it.
    """

    spans: Spans
    row: Tensor
    tree: Tensor
    group: Tensor
    after: Tensor


def pieces(batch: Rollouts) -> Pieces | None:
    """Return the pieces of rows with ``context_keys``, or None where each is a row and has the context of its group.

    On CUDA this waits for the device.

    Args:
        batch: The rollouts, each row a trajectory.
    """
    parts, keys = batch.contexts
    row = torch.searchsorted(batch.end, parts.begin, right=True)
    there = (parts.end > parts.begin) & (row < batch.num_rows)
    there &= batch.begin[row.clamp(max=max(batch.num_rows - 1, 0))] <= parts.begin
    begin, end, keys, row = (x[there] for x in (parts.begin, parts.end, keys, row))
    spans, salt = Spans.trusted(begin, end, parts.size), _mixed(batch.group_index)[row]
    # Groups have contexts of their own.
    first, reached = keys + salt, _after(batch.tokens, spans, keys) + ops.spread(salt, spans)
    names = first.unique()
    inside = ops.spread(torch.ones_like(begin, dtype=torch.bool), spans)
    place = torch.searchsorted(names, reached).clamp(max=max(len(names) - 1, 0))
    cut = (inside & (names[place] == reached)).nonzero()[:, 0] if len(names) else begin
    part = torch.cat([torch.arange(len(begin), device=begin.device), torch.searchsorted(end, cut, right=True)])
    starts, tree = torch.cat([begin, cut + 1]), torch.cat([torch.searchsorted(names, first), place[cut]])
    order = (part * (parts.size + 1) + starts).argsort()
    part, starts, tree = part[order], starts[order], tree[order]
    goes_on = torch.zeros_like(part, dtype=torch.bool)
    goes_on[:-1] = part[1:] == part[:-1]
    ends = torch.where(goes_on, starts.roll(-1), end[part])
    row, after = row[part], torch.where(goes_on, tree.roll(-1), -1)
    # A row that ends where a context begins is there without tokens, unless it has others there.
    pair, filled = tree * batch.num_rows + row, ends > starts
    kept = (filled | ~torch.isin(pair, pair[filled])).nonzero()[:, 0]
    starts, ends, row, tree, after = (x[kept] for x in (starts, ends, row, tree, after))
    group = torch.zeros_like(names).index_copy_(0, tree, batch.group_index[row])
    if len(row) == int(batch.all_spans.lengths.count_nonzero()) and len(names) == len(group.unique()):
        return None
    return Pieces(Spans.trusted(starts, ends, parts.size), row, tree, group, after)
