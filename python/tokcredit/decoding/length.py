"""Logits processors that use a head of remaining tokens: shorter or longer texts, or texts of a wanted length.

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
    """Return the log-probs of ``p * exp(beta * v)``, normalized, with ``v = sigmoid(z) = 1 - gamma^l``.

    A negative ``beta`` makes texts shorter, a positive one longer. The paper writes the exponent with the value ``V``,
    which is ``-v``, and means this.

    Args:
        log_probs: float ``(..., K)``, of the candidates.
        z: float ``(..., K)``, output of the head after each candidate; -inf for the end of the text, where v is 0.
        beta: Strength; 0 changes nothing.

    Returns:
        float ``(..., K)``.
    """
    return (log_probs + beta * z.sigmoid()).log_softmax(-1)


def tilt_to(log_probs: Tensor, z: Tensor, mean: Tensor) -> Tensor:
    """Return the log-probs of :func:`tilt` with the ``beta`` for which the expected ``v`` is a given mean.

    ``beta`` is found by bisection. For a mean outside the range of the candidates, the candidate with the nearest v has
    probability 1.

    Args:
        log_probs: float ``(..., K)``, of the candidates.
        z: float ``(..., K)``, output of the head after each candidate.
        mean: float ``(...)``, wanted expectation of ``v = 1 - gamma^l``, from 0 to 1.

    Returns:
        float ``(..., K)``.
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
    """Return the candidate after which the number of remaining tokens is closest to a wanted number.

    Of equally close candidates the most likely one is taken.

    Args:
        log_probs: float ``(..., K)``, of the candidates; one with -inf is never taken.
        z: float ``(..., K)``, output of the head after each candidate.
        wanted: float ``(...)``, tokens; 0 asks for the shortest text and inf for the longest.
        gamma: That of the head.

    Returns:
        int64 ``(...)``, number of the candidate.
    """
    length = tokens(z, gamma)
    apart = torch.where(wanted[..., None].isinf(), -length, (length - wanted[..., None]).abs())
    apart = torch.where(log_probs > -math.inf, apart, math.inf)
    best = apart == apart.amin(-1, keepdim=True)
    return torch.where(best, log_probs, -math.inf).argmax(-1)


def exactly(left: float) -> float:
    """Return the remaining tokens that are wanted for a text of exactly the wanted length: those that are left.

    Args:
        left: Tokens left of the wanted length.
    """
    return left


def at_most(left: float) -> float:
    """Return the remaining tokens that are wanted for a short text: 0.

    Args:
        left: Tokens left of the wanted length.
    """
    return 0.0


def at_least(left: float) -> float:
    """Return the remaining tokens that are wanted for a long text: inf until the wanted length is reached, then 0.

    Args:
        left: Tokens left of the wanted length.
    """
    return math.inf if left > 0 else 0.0


class _Guide:
    """Base of the processors: the most likely tokens and the output of the head after each."""

    def __init__(self, head: Callable[[Tensor, Tensor], Tensor], candidates: int, top_p: float) -> None:
        if candidates < 1 or not 0 < top_p <= 1:
            raise ValueError(f"candidates, top_p: expected at least 1, and in (0, 1], got {candidates}, {top_p}")
        self.head, self.candidates, self.top_p = head, candidates, top_p

    def _ask(self, input_ids: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-probs of the candidates, -inf outside of ``top_p``, their ids, and z after each, ``(B, K)``."""
        log_probs, tokens = scores.log_softmax(-1).topk(min(self.candidates, scores.shape[-1]), dim=-1)
        probs = log_probs.exp()
        log_probs = torch.where(probs.cumsum(-1) - probs < self.top_p, log_probs, -math.inf)
        return log_probs, tokens, self.head(input_ids, tokens)


class LengthTilt(_Guide):
    """A logits processor that makes texts shorter or longer: :func:`tilt` on the most likely tokens.

    Args:
        head: Function of ``input_ids (B, T)`` and ``candidates (B, K)`` that returns z ``(B, K)``, -inf where the
            candidate ends the text.
        beta: Strength; below 0 texts become shorter.
        candidates: Largest number of tokens that are considered, at least 1.
        top_p: Of these, the smallest set with this probability is kept; above 0 and at most 1.

    Raises:
        ValueError: A setting is out of range.
    """

    def __init__(
        self, head: Callable[[Tensor, Tensor], Tensor], beta: float, candidates: int = 15, top_p: float = 0.999
    ) -> None:
        super().__init__(head, candidates, top_p)
        self.beta = beta

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the tilted log-probs of the candidates, and -inf for all other tokens, ``(B, V)``.

        Args:
            input_ids: int64 ``(B, T)``, the text so far.
            scores: float ``(B, V)``, logits.
        """
        log_probs, tokens, z = self._ask(input_ids, scores)
        tilted = tilt(log_probs, z, self.beta).to(scores.dtype)
        return torch.full_like(scores, -math.inf).scatter(-1, tokens, tilted)


class LengthLimit(_Guide):
    """A logits processor that keeps only the likely token after which the text gets closest to a wanted length.

    Args:
        head: Function of ``input_ids (B, T)`` and ``candidates (B, K)`` that returns z ``(B, K)``, -inf where the
            candidate ends the text.
        gamma: That of the head.
        prompt: Tokens of ``input_ids`` that belong to the prompt.
        total: Wanted number of generated tokens.
        rule: :func:`exactly`, :func:`at_most` or :func:`at_least`.
        candidates: Largest number of tokens that are considered, at least 1.
        top_p: Of these, the smallest set with this probability is kept; above 0 and at most 1.

    Raises:
        ValueError: A setting is out of range.
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
        """Return 0 for the chosen token of each row and -inf for all others, ``(B, V)``.

        Args:
            input_ids: int64 ``(B, T)``, prompt and text so far.
            scores: float ``(B, V)``, logits.
        """
        log_probs, tokens, z = self._ask(input_ids, scores)
        wanted = self.rule(max(self.total - (input_ids.shape[-1] - self.prompt), 0))
        best = nearest(log_probs, z, torch.full(z.shape[:-1], wanted, device=z.device), self.gamma)
        return torch.full_like(scores, -math.inf).scatter(-1, tokens.gather(-1, best[..., None]), 0.0)
