"""Greedy choice of important tokens that are unlike each other: contract in ``csrc/ops/diverse.hpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from tokcredit import _C
from tokcredit.ops.call import operation, plain


def _diverse_output(x: Tensor, *arguments: object) -> Tensor:
    return x.new_empty(x.shape[:1], dtype=torch.int64)


@operation(
    "diverse(Tensor x, Tensor score, Tensor begin, Tensor end, Tensor? mask, Tensor number, int steps, float weight, "
    "bool product, int threads) -> Tensor",
    _diverse_output,
)
def diverse(
    x: Tensor,
    score: Tensor,
    begin: Tensor,
    end: Tensor,
    mask: Tensor | None,
    number: Tensor,
    steps: int,
    weight: float,
    product: bool,
    threads: int,
) -> Tensor:
    """Return the step at which each token is chosen, int64 ``[N]``, or -1; see ``csrc/ops/diverse.hpp``."""
    order = _diverse_output(x)
    rows = (begin, end, plain(mask), number.contiguous())
    _C.diverse(x.contiguous(), score.contiguous(), *rows, steps, weight, product, order, threads)
    return order
