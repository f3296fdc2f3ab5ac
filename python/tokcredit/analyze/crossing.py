"""Responses that two models write together: one model writes, and the other takes over where the two diverge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokcredit.analyze.study import Pair
from tokcredit.blocks import divergence
from tokcredit.train.scoring import left_padded, prefill


class Rule(NamedTuple):
    """A rule for which of the two models chooses a token.

    Attributes:
        primary: Model that writes: 0 for the first of the pair, 1 for the second.
        threshold: The other model chooses where the divergence of the two exceeds this, in nats; inf for never.
        cap: The other model stops choosing after it has changed this many tokens of a response; None for no limit.
    """

    primary: int
    threshold: float = math.inf
    cap: int | None = None


class Crossed(NamedTuple):
    """Responses as rows of length T. Values after the end of a response are undefined.

    Attributes:
        tokens: int64 ``(R, T)``, the end token included.
        lengths: int64 ``[R]``, tokens of each response.
        finished: bool ``[R]``, False where a response was cut at the largest length.
        js: float64 ``(R, T)``, Jensen-Shannon divergence of the two distributions that a token was drawn from, nats.
        swapped: bool ``(R, T)``, True where the other model chose.
        changed: bool ``(R, T)``, True where the other model chose a token that the primary would not have chosen.
        ranks: int64 ``(R, T)``, rank of the primary's likeliest token under the other model, from 0.
    """

    tokens: Tensor
    lengths: Tensor
    finished: Tensor
    js: Tensor
    swapped: Tensor
    changed: Tensor
    ranks: Tensor


@torch.no_grad()
def cross(
    pair: Pair,
    prompt: Sequence[int],
    rules: Sequence[Rule],
    count: int,
    max_tokens: int,
    temperature: float,
    top_p: float,
    generator: torch.Generator,
) -> Crossed:
    """Return responses under each rule, ``count`` of them one after another for each rule.

    Both models read the same prefix, whichever of them wrote it. A token is ``argmax(log p + noise)`` with Gumbel
    noise. Both models use the same noise, and so do the k-th responses of all rules, so that tokens differ only where
    distributions differ.

    Args:
        pair: The two models.
        prompt: Token ids, at least one.
        rules: One or more rules.
        count: Responses under each rule.
        max_tokens: Largest number of tokens of a response, at least 1.
        temperature: Temperature of both models; 0 gives all probability to the likeliest token.
        top_p: Probability mass that each model keeps (nucleus sampling), above 0 and at most 1.
        generator: Source of the noise, on the CPU.
    """
    device, rows = pair.ends.device, len(rules) * count
    primary, threshold, left = (
        torch.tensor(x, dtype=dtype, device=device).repeat_interleave(count)
        for x, dtype in (
            ([r.primary for r in rules], torch.int64),
            ([r.threshold for r in rules], torch.float64),
            ([max_tokens if r.cap is None else r.cap for r in rules], torch.int64),
        )
    )
    ids, real = left_padded([prompt], 0, device)
    caches = [_repeated(prefill(model, ids, real), rows) for model in pair[:2]]
    token = ids[0, -1].expand(rows)
    lengths = torch.zeros(rows, dtype=torch.int64, device=device)
    live = torch.ones(rows, dtype=torch.bool, device=device)
    steps: list[tuple[Tensor, ...]] = []
    while len(steps) < max_tokens and bool(live.any()):
        logits, caches = _advance(pair, token, caches)
        log_p, log_q = (_log_probs(x, temperature, top_p) for x in logits)
        noise = torch.empty(count, pair.vocabulary, dtype=torch.float64)
        noise = -noise.exponential_(generator=generator).log().to(device).repeat(len(rules), 1)
        p_draw, q_draw = ((x + noise).argmax(-1) for x in (log_p, log_q))
        own, other = (torch.where(primary == i, p_draw, q_draw) for i in (0, 1))
        js = divergence.js(log_p, log_q)
        swapped = (js > threshold) & (left > 0)
        changed = swapped & (own != other)
        token = torch.where(swapped, other, own)
        ranks = torch.where(primary == 0, _rank(*logits), _rank(*logits[::-1]))
        steps.append((token, js, swapped, changed, ranks))
        left = left - changed.long()
        lengths += live
        live &= ~torch.isin(token, pair.ends)
    tokens, js, swapped, changed, ranks = (torch.stack(x, 1) for x in zip(*steps, strict=True))
    return Crossed(tokens, lengths, ~live, js, swapped, changed, ranks)


def _repeated(cache: Any, rows: int) -> Any:
    if cache is not None:
        cache.batch_repeat_interleave(rows)
    return cache


def _advance(pair: Pair, token: Tensor, caches: list[Any]) -> tuple[list[Tensor], list[Any]]:
    """Return the logits ``(R, V)`` of both models after one more token."""
    outs = [
        model(token[:, None], past_key_values=cache, use_cache=True)
        for model, cache in zip(pair[:2], caches, strict=True)
    ]
    return [out.logits[:, -1, : pair.vocabulary] for out in outs], [out.past_key_values for out in outs]


def _log_probs(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Return log-probs in float64, in which a divergence is 0 only for equal distributions."""
    logits = logits.double()
    if temperature == 0:
        likeliest = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, -math.inf).scatter(-1, likeliest, 0.0)
    log_probs = (logits / temperature).log_softmax(-1)
    return divergence.nucleus(log_probs, top_p) if top_p < 1 else log_probs


def _rank(logits: Tensor, others: Tensor) -> Tensor:
    """Return how many tokens the second model prefers to the likeliest token of the first."""
    return (others > others.gather(-1, logits.argmax(-1, keepdim=True))).sum(-1)
