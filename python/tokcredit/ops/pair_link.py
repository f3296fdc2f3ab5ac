"""The loss of preference pairs from the scores of rows: contract in ``csrc/ops/pair_link.hpp``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokcredit import _C
from tokcredit.ops.call import operation, plain, result
from tokcredit.ops.policy_loss import Combine

LINK_FUNCTIONS: tuple[str, ...] = _C.LINK_FUNCTIONS
PAIR_COLUMNS: tuple[str, ...] = _C.PAIR_COLUMNS


class LinkTerm(NamedTuple):
    """``weight * f(chosen * score of the chosen row + rejected * score of the rejected row + shift)``.

    Attributes:
        function: One of ``LINK_FUNCTIONS``.
        weight: Factor of the value.
        chosen: Factor of the chosen row's score.
        rejected: Factor of the rejected row's score.
        shift: Added to both.
        parameter: Parameter of the function, for one that has one.
    """

    function: str
    weight: float
    chosen: float
    rejected: float
    shift: float = 0.0
    parameter: float = 0.0


def _pair_link_outputs(
    scores: Tensor, divisors: Tensor | None, pairs: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    count = scores.shape[0] // 2 if pairs is None else pairs.shape[0]
    table = result(scores, (count, len(PAIR_COLUMNS)), torch.float64)
    return result(scores, ()), result(scores, scores.shape), table


@operation(
    "pair_link(Tensor scores, Tensor? divisors, Tensor? pairs, Tensor? weights, int[] functions, float[] numbers, "
    "float scale) -> (Tensor total, Tensor slopes, Tensor table)",
    _pair_link_outputs,
)
def _pair_link(
    scores: Tensor,
    divisors: Tensor | None,
    pairs: Tensor | None,
    weights: Tensor | None,
    functions: list[int],
    numbers: list[float],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    total, slopes, table = _pair_link_outputs(scores, divisors, pairs)
    of_pairs = (plain(divisors), plain(pairs), plain(weights), functions, numbers, scale)
    _C.pair_link(scores.contiguous(), *of_pairs, total, slopes, table)
    return total, slopes, table


def pair_link(
    scores: Tensor,
    terms: tuple[LinkTerm, ...],
    pairs: Tensor | None = None,
    divisors: Tensor | None = None,
    weights: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weighted loss of all pairs 0-d, its derivative to each score, and the table of the pairs.

    Definition: ``csrc/ops/pair_link.hpp``. None of them has a gradient.

    Args:
        scores: float32 or float64 ``[J]``.
        terms: The terms of the link, at most four.
        pairs: int64 ``[P, 2]``, the chosen and the rejected row of each pair, all of them different; None for rows
            ``2 p`` and ``2 p + 1``.
        divisors: int64 ``[J]``, what each score is divided by, 0 counting as 1, or None.
        weights: float64 ``[P]``, weights of the pairs, or None.
        scale: Factor of the loss.
    """
    functions = [LINK_FUNCTIONS.index(x.function) for x in terms]
    numbers = [number for x in terms for number in x[1:]]
    return _pair_link(scores, divisors, pairs, weights, functions, numbers, scale)


class _Slopes(torch.autograd.Function):
    """The derivatives of the losses to both scores, with their own derivatives."""

    @staticmethod
    def forward(ctx: Any, chosen: Tensor, rejected: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        ctx.table = table
        return table[:, 3], table[:, 4]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_chosen: Tensor, of_rejected: Tensor) -> tuple[Tensor, Tensor, None]:
        chosen_twice, mixed, rejected_twice = ctx.table[:, 5:].unbind(1)
        return of_chosen * chosen_twice + of_rejected * mixed, of_chosen * mixed + of_rejected * rejected_twice, None


class _PairLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chosen: Tensor, rejected: Tensor, terms: tuple[LinkTerm, ...]) -> Tensor:
        ctx.save_for_backward(chosen, rejected)
        ctx.table = pair_link(torch.stack([chosen, rejected], 1).view(-1), terms)[2]
        return ctx.table[:, 0].to(chosen.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        chosen, rejected = ctx.saved_tensors
        of_chosen, of_rejected = _Slopes.apply(chosen, rejected, ctx.table)
        return (grad * of_chosen).to(chosen.dtype), (grad * of_rejected).to(rejected.dtype), None


class _Combined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, combine: Combine) -> tuple[Tensor, Tensor]:
        loss, ctx.slopes, further = combine(values)
        ctx.mark_non_differentiable(further)
        return loss, further

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None]:
        return ctx.slopes * grad, None


def combined(values: Tensor, combine: Combine) -> tuple[Tensor, Tensor]:
    """Return a function of numbers, 0-d, with its gradient to them, and its further numbers without one.

    Args:
        values: float ``[R]``.
        combine: The function.
    """
    made: tuple[Tensor, Tensor] = _Combined.apply(values, combine)
    return made


def pair_losses(chosen: Tensor, rejected: Tensor, terms: tuple[LinkTerm, ...]) -> Tensor:
    """Return the loss of each pair, ``[P]``, with two derivatives to both scores.

    Args:
        chosen: float32 or float64 ``[P]``, scores of the chosen rows.
        rejected: ``[P]``, scores of the rejected rows, of the same dtype.
        terms: The terms of the link, at most four.
    """
    losses: Tensor = _PairLosses.apply(chosen, rejected, terms)
    return losses
