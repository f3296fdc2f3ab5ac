"""Sampling with a head that predicts remaining tokens: shorter or longer texts, or texts of a wanted length.

References:
    arXiv 2604.27039.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from tokcredit.blocks.length import check_gamma, tokens


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
        check_gamma(gamma)
        self.gamma, self.prompt, self.total, self.rule = gamma, prompt, total, rule

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """0 for the chosen token of each row, -inf for all others; ``(B, V)``."""
        log_probs, tokens, z = self._ask(input_ids, scores)
        wanted = self.rule(max(self.total - (input_ids.shape[-1] - self.prompt), 0))
        best = nearest(log_probs, z, torch.full(z.shape[:-1], wanted, device=z.device), self.gamma)
        return torch.full_like(scores, -math.inf).scatter(-1, tokens.gather(-1, best[..., None]), 0.0)
