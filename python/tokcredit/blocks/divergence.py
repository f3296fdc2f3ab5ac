"""Divergences between next-token distributions, computed from logits.

Those between two distributions make no tensor of the size of the logits but the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.arguments import FLOATS, INTEGERS, float_tensor, instance, tensor
from tokcredit.blocks import log_probs, scan, segment
from tokcredit.blocks.segment import Ids
from tokcredit.rollouts import Rollouts

KINDS: tuple[str, ...] = ops.DIVERGENCES
"""What :func:`between` computes."""

OUTSIDES: tuple[str, ...] = ops.OUTSIDES
"""What :class:`Top` does about the tokens that it does not know."""

MOST_TOP: int = ops.MOST_TOP
"""Largest number of tokens that :class:`Top` may know at a position."""

_BLOCK = 1 << 22  # elements of the temporaries of a block


def _blocks(rows: int, width: int) -> Iterator[slice]:
    step = max(1, _BLOCK // max(width, 1))
    return (slice(i, i + step) for i in range(0, rows, step))


def _check_temperature(temperature: float) -> float:
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    return float(temperature)


def _matrices(**logits: Tensor) -> list[Tensor]:
    """Return logits of one shape as ``[N, V]`` of one dtype; narrower ones are copied."""
    (first, of), *others = logits.items()
    for name, x in logits.items():
        if float_tensor(name, x).dim() == 0:
            raise ValueError(f"{name}: expected float (..., V), got a single number")
    for name, x in others:
        if x.shape != of.shape:
            raise ValueError(f"{name}: expected the shape of {first}, {list(of.shape)}, got {list(x.shape)}")
    dtype = reduce(torch.promote_types, (x.dtype for x in logits.values()))
    return [x.to(dtype).reshape(math.prod(x.shape[:-1]), x.shape[-1]) for x in logits.values()]


@dataclass(frozen=True, eq=False)
class Mixture:
    """A teacher that goes beyond one model, away from another: ``logits + weights * (logits - other)``.

    A weight of -0.05 moves 5 % of the way from ``logits`` to ``other``. A logit of -inf in ``logits`` stays -inf.

    Args:
        logits: float ``(..., V)``.
        other: float ``(..., V)``.
        weights: float ``(...)``, without gradient; 0 leaves ``other`` unread.
    """

    logits: Tensor
    other: Tensor
    weights: Tensor


@dataclass(frozen=True, eq=False)
class Top:
    """A teacher of which the log-probs of a few tokens are known, as servers give them.

    What is done about the other tokens::

        bucket         they are one more outcome, with the mass that is left, of the teacher at least 1e-7
        renormalised   they are left out, and both distributions are divided by their sum over the ids
        cut            they add nothing; only forward_kl and reverse_kl, which then may be negative

    ``bucket`` never exceeds the divergence over the vocabulary, and draws the student's mass on the ids to the
    teacher's; ``renormalised`` has no gradient to other tokens; ``cut`` draws the student's whole mass to the ids.

    Args:
        ids: int64 or int32 ``(..., k)``, k from 1 to 1024; -1 is none, and of equal ids the first counts. They may be
            the teacher's most likely or the student's.
        log_probs: float ``(..., k)``, of the teacher over the whole vocabulary, at the temperature that it is to have;
            without gradient.
        outside: ``bucket``, ``renormalised`` or ``cut``.
    """

    ids: Tensor
    log_probs: Tensor
    outside: str = "bucket"


def _top_rows(
    student: Tensor, teacher: Top, kind: str, share: float, temperature: float, mask: Tensor | None
) -> ops.TopRows:
    shape, count = student.shape[:-1], student.shape[:-1].numel()
    ids = tensor("ids", teacher.ids, INTEGERS, (*shape, *teacher.ids.shape[-1:]), student.device)
    if not 1 <= ids.shape[-1] <= MOST_TOP:
        raise ValueError(f"ids: expected 1 to {MOST_TOP} for each position, got {ids.shape[-1]}")
    given = tensor("log_probs", teacher.log_probs, FLOATS, tuple(ids.shape), student.device)
    if teacher.outside not in OUTSIDES:
        raise ValueError(f"outside: expected one of {', '.join(OUTSIDES)}, got {teacher.outside!r}")
    if teacher.outside == "cut" and not kind.endswith("kl"):
        raise ValueError(f"outside: expected bucket or renormalised for {kind}, got 'cut'")
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    return ops.TopRows(
        ids.reshape(count, ids.shape[-1]),
        given.detach().reshape(count, ids.shape[-1]).to(dtype),
        mask,
        KINDS.index(kind),
        share,
        OUTSIDES.index(teacher.outside),
        temperature,
    )


def with_entropies(
    student: Tensor,
    teacher: Tensor | Mixture | Top,
    kind: str,
    share: float | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the divergence of each position, with gradient to the student, and the entropy of the student, without.

    With ``p = softmax(student / temperature)``, q likewise of the teacher, and ``m = share * q + (1 - share) * p``::

        forward_kl     KL(q || p)
        reverse_kl     KL(p || q)
        skew_forward   KL(q || m)
        skew_reverse   KL(p || m)
        js             share * KL(q || m) + (1 - share) * KL(p || m)

    All are in nats; none is multiplied by the square of the temperature. ``forward_kl`` is inf where p excludes a token
    that q does not exclude, ``reverse_kl`` where q excludes one of p, and the gradient is NaN there; the others are
    finite. A position that the mask leaves out, or whose incoming gradient is 0, gets a gradient of 0, whatever its
    logits hold.

    Args:
        student: float ``(..., V)``; bf16 and fp16 are computed in float32. A logit of -inf has probability 0.
        teacher: float ``(..., V)``, a :class:`Mixture`, or a :class:`Top`. Of different dtypes the narrower are copied.
        kind: One of ``KINDS``.
        share: Share of the teacher in m, above 0 and below 1; None for ``forward_kl`` and ``reverse_kl``, which are the
            limits of ``js / share`` at 0 and of ``js / (1 - share)`` at 1. It is the beta of GKD, the alpha of
            DistiLLM's forward skew, and 1 less the alpha of its reverse skew.
        temperature: Positive; divides the logits of both, but not the log-probs of a :class:`Top`.
        mask: bool ``(...)``, the positions to compute; the others are not read and get 0. All if None.
        overwrite: Whether the backward pass may write the gradient over the student's logits. Use it where nothing else
            reads them. A second backward pass then raises an error.

    Returns:
        Two tensors ``(...)``, float32, or float64 for float64 logits.

    Raises:
        TypeError: A dtype is wrong.
        ValueError: Shapes disagree, the vocabularies among them, or a setting is out of range.

    References:
        arXiv 2306.13649 (GKD, ``js``), arXiv 2402.03898 (DistiLLM, ``skew_forward``, ``skew_reverse``).
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if (share is None) != kind.endswith("kl"):
        raise ValueError(f"share: expected {'None' if share is not None else 'a number'} for {kind}, got {share}")
    if share is not None and not 0 < share < 1:
        raise ValueError(f"share: expected more than 0 and less than 1, got {share}")
    temperature, shape = _check_temperature(temperature), float_tensor("student", student).shape[:-1]
    if mask is not None:
        mask = tensor("mask", mask, (torch.bool,), shape, student.device).reshape(-1)
    number, weight = KINDS.index(kind), 0.5 if share is None else float(share)
    if isinstance(teacher, Top):
        (own,) = _matrices(student=student)
        known = _top_rows(student, teacher, kind, weight, temperature, mask)
        values, entropies = ops.divergence_top(own, known, overwrite)
        return values.view(shape), entropies.view(shape)
    other = weights = None
    if isinstance(teacher, Mixture):
        own, given, other = _matrices(student=student, teacher=teacher.logits, other=teacher.other)
        weights = tensor("weights", teacher.weights, FLOATS, shape, student.device).detach().reshape(-1)
        weights = weights.to(torch.float64 if own.dtype == torch.float64 else torch.float32)
        other = other.detach()
    else:
        own, given = _matrices(student=student, teacher=teacher)
    rows = ops.DivergenceRows(given.detach(), other, weights, mask, number, weight, temperature)
    values, entropies = ops.divergence(own, rows, overwrite)
    return values.view(shape), entropies.view(shape)


def between(
    student: Tensor,
    teacher: Tensor | Mixture | Top,
    kind: str,
    share: float | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    overwrite: bool = False,
) -> Tensor:
    """Return the divergence of each position, with gradient to the student; see :func:`with_entropies`.

    Args:
        student: float ``(..., V)``.
        teacher: float ``(..., V)``, a :class:`Mixture`, or a :class:`Top`.
        kind: One of ``KINDS``.
        share: Share of the teacher in the mixture of both, for ``js``, ``skew_forward`` and ``skew_reverse``.
        temperature: Positive; divides the logits of both.
        mask: bool ``(...)``, the positions to compute; all if None.
        overwrite: Whether the backward pass may write the gradient over the student's logits.

    Returns:
        ``(...)``, float32, or float64 for float64 logits.

    Raises:
        TypeError: A dtype is wrong.
        ValueError: As :func:`with_entropies`.
    """
    return with_entropies(student, teacher, kind, share, temperature, mask, overwrite)[0]


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
    temperature = _check_temperature(temperature)
    p, q = _matrices(p_logits=p_logits, q_logits=q_logits)
    return ops.kl(p, q, temperature).view(p_logits.shape[:-1])


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
    temperature = _check_temperature(temperature)
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected more than 0 and at most 1, got {top_p}")
    p, q = _matrices(p_logits=p_logits, q_logits=q_logits)
    if top_p == 1:
        return between(p, q, "js", 0.5, temperature).view(p_logits.shape[:-1])

    def kept(x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        return nucleus((wide / temperature).log_softmax(-1), top_p)

    out = p.new_empty(p.shape[0], dtype=torch.float64 if p.dtype == torch.float64 else torch.float32)
    for rows in _blocks(*p.shape):
        out[rows] = between(kept(p[rows]), kept(q[rows]), "js", 0.5)
    return out.view(p_logits.shape[:-1])


@torch.no_grad()
def disagreement(logits: Tensor, batch: Rollouts, padded: bool = False) -> Tensor:
    """Return how much the rows of a group disagree about the next token at each position, scaled to ``[0, 1]``.

    Rows are aligned by position. With ``lp`` the log-probs of the rows that chose a token at a position::

        m = mean over rows of lp
        d = clamp(m - lp, -11, 11)
        D = mean over rows of sum over v of (exp(d) - d - 1)
        result = (D - min(D)) / (max(D) - min(D) + 1e-8)

    ``min`` and ``max`` are over the positions of the group at which at least two rows chose a token. Other positions
    have 0. The result is without gradient.

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
