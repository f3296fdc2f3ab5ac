"""The most important share of the words of each row, in their order (FrugalPrompt)."""

from __future__ import annotations

import torch
from torch import Tensor

from tokcredit.arguments import per_token, tensor
from tokcredit.blocks import segment
from tokcredit.blocks.segment import Ids
from tokcredit.blocks.select.ranks import Share, quota, sizes, top_k
from tokcredit.blocks.select.scaling import rows_of, scaled
from tokcredit.spans import Spans, require_spans

_REDUCE = {"sum": segment.sum, "max": segment.maximum, "mean": segment.mean}


def top_share(
    score: Tensor,
    k: int | Tensor | Share,
    spans: Spans,
    words: Tensor | None = None,
    protected: Tensor | None = None,
    segments: Tensor | None = None,
    segment_weights: Tensor | None = None,
    reduce: str = "sum",
) -> Tensor:
    """Return a mask of the tokens of the words with the largest scores in each row; the order of tokens is kept.

    For each row, over its words::

        u = reduce of the scores of the tokens of a word
        u = (u - minimum of the segment) / (maximum - minimum of the segment)        with segments; 0 if all are equal
        u = u * segment weight                                                       with segment weights
        m = k, at least the number of protected words, at most the number of words
        keep the protected words, then those of the largest u until m are kept

    Ties go to the word that comes first. A word whose score is NaN, or with segments not finite,
    ranks last. FrugalPrompt keeps
    ``Share(0.8, "nearest")``, with sentences as segments. The smallest words are those of ``-score``.

    Args:
        score: float ``[N]``, importance of each token, for example from :mod:`tokcredit.attribution`.
        k: How many words of each row: for all rows, int64 ``[R]``, or a :class:`Share` of the words.
        spans: The rows. Masked tokens, for example special ones, are left out before words are counted.
        words: int64 ``[N]``. Tokens of a row with the same number are one word. Those with a negative number are left
            out. None makes each token a word.
        protected: bool ``[N]``, tokens whose words are always kept.
        segments: int64 ``[N]``, at least 0. Words of a row with the same number, for example of a sentence, are scaled
            together; a word is in the segment of its first token.
        segment_weights: float ``[N]``, factor of the scaled scores; a word has that of its first token.
        reduce: ``"sum"``, ``"max"`` or ``"mean"``.

    Returns:
        bool ``[N]``.

    Raises:
        TypeError: A tensor has another dtype.
        ValueError: A shape is wrong, or ``reduce`` is none of the words above.

    References:
        FrugalPrompt: arXiv 2510.16439.
    """
    require_spans("spans", spans)
    size, device = spans.size, spans.device
    per_token("score", score, size, device)
    if reduce not in _REDUCE:
        raise ValueError(f"reduce: expected {', '.join(_REDUCE)}, got {reduce!r}")
    for name, x, dtype in (("words", words, torch.int64), ("protected", protected, torch.bool)):
        if x is not None:
            tensor(name, x, (dtype,), (size,), device)
    if segments is not None:
        tensor("segments", segments, (torch.int64,), (size,), device)
    if segment_weights is not None:
        per_token("segment_weights", segment_weights, size, device)

    row = rows_of(spans).ids
    at = (row >= 0 if words is None else (row >= 0) & (words >= 0)).nonzero()[:, 0]
    word, first = _words(at, row[at], at if words is None else words[at])
    row = row[first]
    u = _REDUCE[reduce](score.detach().double()[at], word)
    if segments is not None:
        u = scaled(u, segment.keys(row, segments[first]))
    if segment_weights is not None:
        u = u * segment_weights.double()[first]
    u = u.nan_to_num(-torch.inf, torch.inf, -torch.inf)
    of_row = Spans.from_cu_seqlens(torch.cat([row.new_zeros(1), row.bincount(minlength=spans.num_rows).cumsum(0)]))
    number = quota("k", k, of_row)
    if protected is not None:
        always = segment.maximum(protected.double()[at], word) > 0
        u = u.masked_fill(always, torch.nan)  # above +inf in ranks
        number = number.maximum(sizes(of_row.with_mask(always)))
    kept = torch.zeros(size, dtype=torch.bool, device=device)
    kept[at] = top_k(u, number, of_row)[word.ids]
    return kept


def _words(at: Tensor, row: Tensor, words: Tensor) -> tuple[Ids, Tensor]:
    """Return the word of each token, numbered by first tokens, and the place of each word's first token."""
    word = segment.keys(row, words)
    first, order = segment.minimum(at.double(), word).long().sort()
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return Ids(place[word.ids], word.segments), first
