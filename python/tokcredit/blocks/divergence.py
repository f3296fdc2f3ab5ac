"""Divergences between next-token distributions, computed from logits.

Positions are processed in blocks, so that no second tensor of the size of the logits is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokcredit import ops
from tokcredit.arguments import float_tensor, instance
from tokcredit.blocks import log_probs, scan, segment
from tokcredit.blocks.segment import Ids
from tokcredit.rollouts import Rollouts

_BLOCK = 1 << 22  # elements of the temporaries of a block


def _blocks(rows: int, width: int) -> Iterator[slice]:
    step = max(1, _BLOCK // max(width, 1))
    return (slice(i, i + step) for i in range(0, rows, step))


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    x = logits if logits.dtype == torch.float64 else logits.float()
    return (x / temperature).log_softmax(-1)


def _summed(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return ``sum(p * (log p - log q))`` over the vocabulary, where ``p > 0``."""
    return torch.where(p > 0, p * (log_p - log_q), 0).sum(-1)


def _check(p_logits: Tensor, q_logits: Tensor, temperature: float) -> None:
    float_tensor("p_logits", p_logits)
    float_tensor("q_logits", q_logits)
    if p_logits.dim() == 0 or p_logits.shape != q_logits.shape:
        raise ValueError(
            f"q_logits: expected the shape of p_logits, {list(p_logits.shape)}, got {list(q_logits.shape)}"
        )
    if not (p_logits.is_floating_point() and q_logits.is_floating_point()):
        raise TypeError(f"p_logits, q_logits: expected float dtypes, got {p_logits.dtype}, {q_logits.dtype}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature: expected a positive number, got {temperature}")


class _KL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p_logits: Tensor, q_logits: Tensor, temperature: float) -> Tensor:
        dtype = torch.float64 if torch.float64 in (p_logits.dtype, q_logits.dtype) else torch.float32
        out = p_logits.new_empty(p_logits.shape[0], dtype=dtype)
        for rows in _blocks(*p_logits.shape):
            log_p = _log_softmax(p_logits[rows], temperature)
            out[rows] = _summed(log_p.exp(), log_p, _log_softmax(q_logits[rows], temperature))
        ctx.save_for_backward(p_logits, q_logits, out)
        ctx.temperature = temperature
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        p_logits, q_logits, kl = ctx.saved_tensors
        to_p, to_q = (torch.empty_like(x) for x in (p_logits, q_logits))
        for rows in _blocks(*p_logits.shape):
            log_p = _log_softmax(p_logits[rows], ctx.temperature)
            log_q = _log_softmax(q_logits[rows], ctx.temperature)
            p, g = log_p.exp(), (grad[rows] / ctx.temperature)[:, None]
            if ctx.needs_input_grad[0]:
                slope = p * torch.where(p > 0, log_p - log_q - kl[rows, None], 0)
                to_p[rows] = torch.where(g != 0, g * slope, 0).to(to_p.dtype)
            if ctx.needs_input_grad[1]:
                to_q[rows] = torch.where(g != 0, g * (log_q.exp() - p), 0).to(to_q.dtype)
        return to_p if ctx.needs_input_grad[0] else None, to_q if ctx.needs_input_grad[1] else None, None


def kl(p_logits: Tensor, q_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the KL divergence of each position in nats, with its gradient to both logits.

    With ``p = softmax(p_logits / temperature)`` and ``q`` likewise::

        KL(p || q) = sum over v of p[v] * log(p[v] / q[v])

    With p the student and q the teacher this is the reverse KL of distillation. It is inf where q excludes a token that
    p does not exclude. A position whose incoming gradient is 0 gets a gradient of 0, whatever its logits hold.

    Args:
        p_logits: float ``(..., V)``; bf16 and fp16 are computed in float32. A logit of -inf has probability 0.
        q_logits: float ``(..., V)``.
        temperature: Positive; divides both.

    Returns:
        ``(...)``, float32, or float64 if one of the two is.

    Raises:
        TypeError: A dtype is wrong.
        ValueError: The shapes differ, or the temperature is not positive.
    """
    _check(p_logits, q_logits, temperature)
    width = p_logits.shape[-1]
    out = _KL.apply(p_logits.reshape(-1, width), q_logits.reshape(-1, width), float(temperature))
    return out.view(p_logits.shape[:-1])


def nucleus(log_p: Tensor, top_p: float) -> Tensor:
    """Return the log-probs of the smallest set of most likely tokens whose probabilities add up to ``top_p``.

    They are normalized over this set. Other tokens have -inf. Of equally likely tokens the earlier ones are kept.

    Args:
        log_p: float ``(..., V)``, normalized log-probs.
        top_p: Above 0 and at most 1.

    Returns:
        float ``(..., V)``.

    Raises:
        TypeError: The dtype is wrong.
        ValueError: ``top_p`` is out of range, or there is no vocabulary axis.
    """
    if float_tensor("log_p", log_p).dim() == 0:
        raise ValueError("log_p: expected float (..., V), got a single number")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected more than 0 and at most 1, got {top_p}")
    ranked, order = log_p.sort(dim=-1, descending=True, stable=True)
    before = ranked.exp().cumsum(-1) - ranked.exp()
    kept = torch.where(before < top_p, ranked, -math.inf)
    return torch.empty_like(log_p).scatter_(-1, order, kept.log_softmax(-1))


@torch.no_grad()
def js(p_logits: Tensor, q_logits: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """Return the Jensen-Shannon divergence of each position in nats, from 0 to ln 2, without gradient.

    With ``m = (p + q) / 2`` it is ``KL(p || m) / 2 + KL(q || m) / 2``. It is finite also where one distribution
    excludes tokens of the other, so it compares distributions that are truncated to their ``top_p``.

    Args:
        p_logits: float ``(..., V)``.
        q_logits: float ``(..., V)``.
        temperature: Positive; divides both.
        top_p: Probability that each distribution keeps before it is normalized again, above 0 and at most 1.

    Returns:
        ``(...)``, float32, or float64 if one of the two is.

    Raises:
        TypeError: A dtype is wrong.
        ValueError: The shapes differ, or a setting is out of range.

    References:
        arXiv 2603.22446.
    """
    _check(p_logits, q_logits, temperature)
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected more than 0 and at most 1, got {top_p}")
    width, outs = p_logits.shape[-1], []
    flat_p, flat_q = p_logits.reshape(-1, width), q_logits.reshape(-1, width)
    for rows in _blocks(*flat_p.shape):
        log_p, log_q = _log_softmax(flat_p[rows], temperature), _log_softmax(flat_q[rows], temperature)
        if top_p < 1:
            log_p, log_q = nucleus(log_p, top_p), nucleus(log_q, top_p)
        p, q = log_p.exp(), log_q.exp()
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        outs.append((_summed(p, log_p, log_m) + _summed(q, log_q, log_m)) / 2)
    return torch.cat(outs).view(p_logits.shape[:-1]) if outs else p_logits.new_zeros(p_logits.shape[:-1])


@torch.no_grad()
def disagreement(logits: Tensor, batch: Rollouts, padded: bool = False) -> Tensor:
    """Return how much the rows of a group disagree about the next token at each position, scaled to ``[0, 1]``.

    Rows are aligned by position. With ``lp`` the log-probs of the rows that chose a token at a position::

        m = mean over rows of lp
        d = clamp(m - lp, -11, 11)
        D = mean over rows of sum over v of (exp(d) - d - 1)
        result = (D - min(D)) / (max(D) - min(D) + 1e-8)

    ``min`` and ``max`` are over the positions of the group at which at least two rows chose a token. Other positions
    have 0.

    Args:
        logits: float ``[N, V]`` or ``(B, T, V)``, each position's logits for the token at that position.
        batch: The rollouts, with whole groups.
        padded: Whether all rows of the group take part at every position, with the uniform distribution where a row
            has ended or is masked, and with ``min`` and ``max`` over all positions up to the longest row (T of a padded
            batch).

    Returns:
        float ``[N]``, 0 where masked.

    Raises:
        ValueError: The shape of the logits is wrong.

    References:
        arXiv 2505.24718.
    """
    instance("batch", batch, Rollouts)
    if float_tensor("logits", logits).dim() < 2:
        raise ValueError(f"logits: expected [{batch.num_tokens}, V], got {list(logits.shape)}")
    vocabulary, everything = logits.shape[-1], batch.all_spans
    if logits.numel() != batch.num_tokens * vocabulary:
        raise ValueError(f"logits: expected [{batch.num_tokens}, V], got {list(logits.shape)}")
    logits, mask = logits.reshape(batch.num_tokens, vocabulary), batch.response_mask
    if batch.num_rows == 0 or batch.num_tokens == 0:
        return logits.new_zeros(batch.num_tokens)
    longest = batch.width
    group = ops.spread(batch.group_index, everything)
    place = group * longest + scan.positions(everything, torch.float64).long() - 1
    places = Ids(torch.where(mask, place, -1), batch.num_groups * longest)
    normaliser = log_probs.normalizers(logits, batch)
    live = segment.count(places).to(normaliser.dtype)
    rows = batch.groups.sizes.repeat_interleave(longest)
    absent = (rows - live) if padded else torch.zeros_like(live)

    def term(d: Tensor) -> Tensor:
        d = d.clamp(-11, 11)
        return d.expm1() - d

    total = torch.zeros_like(normaliser)
    missing = torch.zeros_like(live)
    for columns in _blocks(vocabulary, batch.num_tokens):
        lp = logits[:, columns] - normaliser[:, None]
        width = lp.shape[1]
        ids = torch.where(mask[:, None], place[:, None] * width + torch.arange(width, device=lp.device), -1)
        mean = segment.sum(lp.reshape(-1), Ids(ids.reshape(-1), places.segments * width)).view(-1, width)
        mean = (mean - absent[:, None] * math.log(vocabulary)) / (live + absent).clamp(min=1)[:, None]
        total += term(mean[place.clamp(min=0)] - lp).sum(1)
        if padded:
            missing += term(mean + math.log(vocabulary)).sum(1)
    spread = (segment.sum(total, places) + absent * missing) / (live + absent).clamp(min=1)
    compared = torch.ones_like(live, dtype=torch.bool) if padded else live >= 2
    groups = Ids(torch.arange(places.segments, device=live.device) // longest, batch.num_groups, compared)
    low, high = (f(spread, groups).repeat_interleave(longest) for f in (segment.minimum, segment.maximum))
    scaled = torch.where(compared, (spread - low) / (high - low + 1e-8), 0)
    return torch.where(mask, scaled[place.clamp(min=0)], 0)
