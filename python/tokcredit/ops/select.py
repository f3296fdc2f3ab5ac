"""Exact ranks and subsets: contract in ``csrc/ops/select.hpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from tokcredit import _C
from tokcredit.ops.call import accumulated, operation, plain, result

ROUNDINGS: tuple[str, ...] = _C.ROUNDINGS


def _select_output(
    x: Tensor,
    begin: Tensor,
    end: Tensor,
    mask: Tensor | None,
    scope: Tensor | None,
    wanted: Tensor | None,
    scopes: int,
    share: float,
    rounding: int,
    least: int,
    ranks: bool,
    threads: int,
) -> Tensor:
    if ranks:
        return result(x, (scopes,), accumulated(x.dtype))
    return result(x, x.shape, torch.bool)


@operation(
    "select(Tensor x, Tensor begin, Tensor end, Tensor? mask, Tensor? scope, Tensor? wanted, int scopes, float share, "
    "int rounding, int least, bool ranks, int threads) -> Tensor",
    _select_output,
)
def select(
    x: Tensor,
    begin: Tensor,
    end: Tensor,
    mask: Tensor | None,
    scope: Tensor | None,
    wanted: Tensor | None,
    scopes: int,
    share: float,
    rounding: int,
    least: int,
    ranks: bool,
    threads: int,
) -> Tensor:
    """Return the wanted ranks, or which tokens are above them; see ``csrc/ops/select.hpp``."""
    y = _select_output(x, begin, end, mask, scope, wanted, scopes, share, rounding, least, ranks, threads)
    if begin.numel() == 0 or scopes == 0:
        return y.fill_(float("nan")) if ranks else y.fill_(False)
    quota = (plain(wanted), scopes, share, rounding, least)
    _C.select(x.contiguous(), begin, end, plain(mask), plain(scope), *quota, ranks, y, threads)
    return y


def _maximum_variance_output(x: Tensor, *arguments: object) -> Tensor:
    return result(x, x.shape, torch.bool)


@operation(
    "maximum_variance(Tensor x, Tensor scope, Tensor? wanted, int scopes, float share, int rounding, int least, "
    "bool largest) -> Tensor",
    _maximum_variance_output,
)
def maximum_variance(
    x: Tensor,
    scope: Tensor,
    wanted: Tensor | None,
    scopes: int,
    share: float,
    rounding: int,
    least: int,
    largest: bool,
) -> Tensor:
    """Return the subset of each scope with the largest variance, bool; see ``csrc/ops/select.hpp``."""
    chosen = _maximum_variance_output(x)
    quota = (plain(wanted), scopes, share, rounding, least)
    _C.maximum_variance(x.double().contiguous(), scope.contiguous(), *quota, largest, chosen)
    return chosen


def _within_mean_output(x: Tensor, *arguments: object) -> Tensor:
    return result(x, x.shape, torch.bool)


@operation(
    "within_mean(Tensor x, Tensor begin, Tensor end, Tensor? mask, float budget, int least) -> Tensor",
    _within_mean_output,
)
def within_mean(x: Tensor, begin: Tensor, end: Tensor, mask: Tensor | None, budget: float, least: int) -> Tensor:
    """Return the smallest tokens whose mean is at most a budget, bool ``[N]``; see ``csrc/ops/select.hpp``."""
    chosen = _within_mean_output(x)
    _C.within_mean(x.contiguous(), begin, end, plain(mask), budget, least, chosen)
    return chosen
