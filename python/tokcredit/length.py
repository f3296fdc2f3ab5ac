"""How many tokens are still to come: a bounded value of it, its regression, and its use while sampling.

With l tokens to go the value is ``V = -(1 - gamma^l)`` in ``(-1, 0]``: the discounted return of a reward of
``-(1 - gamma)`` per token. A head predicts ``z`` with ``V = -sigmoid(z)``.

References:
    arXiv 2604.27039.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from tokcredit import ops, scan, segment
from tokcredit.ops import Rows


def _check_gamma(gamma: float) -> None:
    if not 0 < gamma < 1:
        raise ValueError(f"gamma: expected a number between 0 and 1, got {gamma}")


def gamma_for(length: float, resolved: float = 0.99) -> float:
    """The gamma whose value at ``length`` tokens is ``-resolved``; the 99th percentile of lengths is a good one."""
    if not (length > 0 and 0 < resolved < 1):
        raise ValueError(f"length, resolved: expected more than 0, and between 0 and 1, got {length}, {resolved}")
    return (1 - resolved) ** (1 / length)


def remaining(rows: Rows, size: int) -> Tensor:
    """Unmasked tokens from each token on, itself included; float32 ``[size]``, 0 where masked."""
    return ops.scan(torch.ones(size, device=rows.begin.device), rows, reverse=True)[0]


def targets(rows: Rows, size: int, gamma: float, values: Tensor | None = None, trace: float = 1.0) -> Tensor:
    """Value of the state before each token, ``gamma^l - 1`` with l the tokens to go; ``[size]``, 0 where masked.

    Args:
        rows: the spans and the mask; every row must have ended by itself.
        size: tokens of the buffers.
        gamma: between 0 and 1.
        values: float ``[size]``, earlier predictions, for ``trace < 1``: then the target is a mixture of n-step
            returns, ``V + sum (gamma trace)^k delta``.
        trace: lambda; 1 is the exact value.
    """
    _check_gamma(gamma)
    if trace == 1:
        exact = torch.expm1(remaining(rows, size).double() * math.log(gamma))
        return exact.to(torch.float32 if values is None or values.dtype != torch.float64 else torch.float64)
    if values is None:
        raise ValueError(f"values: expected float [{size}] because trace is {trace}, got None")
    return torch.where(_inside(values, rows), values, 0) + advantages(values, rows, gamma, trace)


def advantages(values: Tensor, rows: Rows, gamma: float, trace: float = 1.0, truncated: Tensor | None = None) -> Tensor:
    """How much shorter than predicted each token made the row; ``[N]``.

    Generalized advantages of a reward of ``-(1 - gamma)`` per token. With ``trace=0`` the surprise of each token:
    more than 0.01 in size marks one that changes the expected length. Rows ``truncated``, bool ``[R]``, are taken to go
    on as predicted before their last token, which is then no surprise; without it every row counts as ended.
    """
    _check_gamma(gamma)
    cost, after = torch.full((), gamma - 1, dtype=values.dtype, device=values.device), None
    if truncated is not None:
        last = ops.scan(values, rows, decay=0.0)[1]
        after = torch.where(truncated, (1 + last) / gamma - 1, 0).clamp(max=0)
    return scan.generalized_advantages(cost, values, rows, gamma, trace, after)


def squared(z: Tensor, target: Tensor, rows: Rows, floor: float | None = None) -> Tensor:
    """Mean over tokens of ``(V - target)^2``; 0-d, with its gradient to z.

    ``floor`` divides the error by ``max(|target|, floor)``, the relative loss; ``1 - gamma`` is the value of one token.
    """
    inside = _inside(z, rows)
    error = -torch.where(inside, z, 0).sigmoid() - torch.where(inside, target, 0)
    if floor is not None:
        error = error / target.abs().clamp(min=floor)
    return _token_mean(error**2, rows)


def cross_entropy(z: Tensor, target: Tensor, rows: Rows) -> Tensor:
    """Mean over tokens of the binary cross-entropy between ``sigmoid(z)`` and ``-target``; 0-d."""
    z, share = torch.where(_inside(z, rows), z, 0), -target.to(z.dtype)
    return _token_mean(functional.binary_cross_entropy_with_logits(z, share, reduction="none"), rows)


def _inside(like: Tensor, rows: Rows) -> Tensor:
    return ops.spread(torch.ones_like(rows.begin, dtype=torch.bool), rows, like)


def _token_mean(x: Tensor, rows: Rows) -> Tensor:
    return segment.sum(x, rows).sum() / segment.count(x.detach(), rows).sum().clamp(min=1)


def tokens(z: Tensor, gamma: float) -> Tensor:
    """Tokens to go that a prediction means, ``-softplus(z) / log(gamma)``: the inverse map, exact for long rows too."""
    _check_gamma(gamma)
    return functional.softplus(z) / -math.log(gamma)


def tokens_of_value(value: Tensor, gamma: float) -> Tensor:
    """Tokens to go at a value in ``(-1, 0]``, ``log(1 + V) / log(gamma)``; ill-conditioned near -1, see :func:`tokens`.

    Values are bounded to ``[-1 + 1e-12, 0]``, 1e-6 in float32.
    """
    _check_gamma(gamma)
    edge = 1e-12 if value.dtype == torch.float64 else 1e-6
    value = value if value.dtype == torch.float64 else value.float()
    return value.clamp(-1 + edge, 0).log1p() / math.log(gamma)


def tilt(log_probs: Tensor, z: Tensor, beta: float) -> Tensor:
    """Log-probs of ``p exp(beta v)``, normalised, with ``v = sigmoid(z) = 1 - gamma^l``; ``(..., K)``.

    ``beta < 0`` shortens and ``beta > 0`` lengthens. The paper writes the exponent with V, which is negative, and means
    this.

    Args:
        log_probs: float ``(..., K)`` of the candidates.
        z: the head's output after each candidate; -inf for the end of the text, which has value 0.
        beta: 0 changes nothing.
    """
    return (log_probs + beta * z.sigmoid()).log_softmax(-1)


def tilt_to(log_probs: Tensor, z: Tensor, mean: Tensor) -> Tensor:
    """The tilt under which the expected v of the candidates is ``mean`` ``(...)``; one-hot where that is out of reach.

    Found by bisection. A mean outside the candidates' values takes the candidate of the nearest one.
    """
    v, wide = z.double().sigmoid(), log_probs.double()
    smallest, largest = v.amin(-1), v.amax(-1)
    low, high = torch.full_like(smallest, -1e5), torch.full_like(smallest, 1e5)
    for _ in range(80):
        middle = (low + high) / 2
        reached = ((wide + middle[..., None] * v).softmax(-1) * v).sum(-1)
        low, high = torch.where(reached < mean, middle, low), torch.where(reached < mean, high, middle)
    tilted = (wide + middle[..., None] * v).log_softmax(-1)
    edge = torch.where(mean <= smallest, v.argmin(-1), v.argmax(-1))
    alone = torch.where(functional.one_hot(edge, v.shape[-1]).bool(), 0.0, -math.inf)
    return torch.where(((mean <= smallest) | (mean >= largest))[..., None], alone, tilted).to(log_probs.dtype)


def nearest(log_probs: Tensor, z: Tensor, wanted: Tensor, gamma: float) -> Tensor:
    """The candidate after which the tokens to go are closest to ``wanted`` ``(...)``, the likelier among equals.

    ``wanted = 0`` asks for the shortest and inf for the longest.
    """
    length = tokens(z, gamma)
    apart = torch.where(wanted[..., None].isinf(), -length, (length - wanted[..., None]).abs())
    apart = torch.where(log_probs > -math.inf, apart, math.inf)
    best = apart == apart.amin(-1, keepdim=True)
    return torch.where(best, log_probs, -math.inf).argmax(-1)


def exactly(left: float) -> float:
    """Tokens to go that are wanted where ``left`` are left of the wanted total."""
    return left


def at_most(left: float) -> float:
    """As few as possible."""
    return 0.0


def at_least(left: float) -> float:
    """As many as possible until the total is reached, then as few."""
    return math.inf if left > 0 else 0.0


class _Guide:
    """The likeliest tokens and what the head says after each.

    Args:
        head: ``(input_ids (B, T), candidates (B, K)) -> z (B, K)``, -inf where the candidate ends the text.
        candidates: at most this many tokens.
        top_p: of them, the smallest set that holds this probability.
    """

    def __init__(self, head: Callable[[Tensor, Tensor], Tensor], candidates: int, top_p: float) -> None:
        if candidates < 1 or not 0 < top_p <= 1:
            raise ValueError(f"candidates, top_p: expected at least 1, and in (0, 1], got {candidates}, {top_p}")
        self.head, self.candidates, self.top_p = head, candidates, top_p

    def _ask(self, input_ids: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs of the candidates, -inf outside of ``top_p``; their ids; z after each. All ``(B, K)``."""
        log_probs, tokens = scores.log_softmax(-1).topk(min(self.candidates, scores.shape[-1]), dim=-1)
        probs = log_probs.exp()
        log_probs = torch.where(probs.cumsum(-1) - probs < self.top_p, log_probs, -math.inf)
        return log_probs, tokens, self.head(input_ids, tokens)


class LengthTilt(_Guide):
    """A logits processor that tilts the likeliest tokens by the length expected after each; see :func:`tilt`.

    Args:
        head: ``(input_ids (B, T), candidates (B, K)) -> z (B, K)``, -inf where the candidate ends the text.
        beta: below 0 shortens.
        candidates: at most this many tokens.
        top_p: of them, the smallest set that holds this probability.
    """

    def __init__(
        self, head: Callable[[Tensor, Tensor], Tensor], beta: float, candidates: int = 15, top_p: float = 0.999
    ) -> None:
        super().__init__(head, candidates, top_p)
        self.beta = beta

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Tilted log-probs of the candidates, -inf for all other tokens; ``(B, V)``."""
        log_probs, tokens, z = self._ask(input_ids, scores)
        tilted = tilt(log_probs, z, self.beta).to(scores.dtype)
        return torch.full_like(scores, -math.inf).scatter(-1, tokens, tilted)


class LengthLimit(_Guide):
    """A logits processor that leaves the one likely token after which the text gets closest to a wanted length.

    Args:
        head: ``(input_ids (B, T), candidates (B, K)) -> z (B, K)``, -inf where the candidate ends the text.
        gamma: that of the head.
        prompt: tokens of ``input_ids`` that were not generated.
        total: tokens to generate.
        rule: :func:`exactly`, :func:`at_most` or :func:`at_least`.
        candidates: at most this many tokens.
        top_p: of them, the smallest set that holds this probability.
    """

    def __init__(
        self,
        head: Callable[[Tensor, Tensor], Tensor],
        gamma: float,
        prompt: int,
        total: int,
        rule: Callable[[float], float] = exactly,
        candidates: int = 15,
        top_p: float = 0.999,
    ) -> None:
        super().__init__(head, candidates, top_p)
        _check_gamma(gamma)
        self.gamma, self.prompt, self.total, self.rule = gamma, prompt, total, rule

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """0 for the chosen token of each row, -inf for all others; ``(B, V)``."""
        log_probs, tokens, z = self._ask(input_ids, scores)
        wanted = self.rule(max(self.total - (input_ids.shape[-1] - self.prompt), 0))
        best = nearest(log_probs, z, torch.full(z.shape[:-1], wanted, device=z.device), self.gamma)
        return torch.full_like(scores, -math.inf).scatter(-1, tokens.gather(-1, best[..., None]), 0.0)
