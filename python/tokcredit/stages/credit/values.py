"""Credit from the values of states along a row: by how much each stretch of tokens changed the value."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.blocks import segment
from tokcredit.rollouts import Rollouts
from tokcredit.stages.base import input_name
from tokcredit.stages.credit.group import Credit
from tokcredit.stages.filters import improbable_tokens


def improbable_cuts(batch: Rollouts, below: float = 0.9, interval: int = 5) -> Tensor:
    """Return the tokens before which SPO values a state: every ``interval``-th improbable token, from the first on.

    Args:
        batch: The rollouts, with ``old_log_probs``.
        below: A token is improbable if the old policy gave it a probability of less than this.
        interval: At least 1.

    Returns:
        bool ``[N]``.

    Raises:
        ValueError: ``interval`` is below 1, or ``old_log_probs`` are missing.

    References:
        arXiv 2505.23564.
    """
    if interval < 1:
        raise ValueError(f"interval: expected at least 1, got {interval}")
    low = batch.response_mask & improbable_tokens(batch, below)
    rank = ops.scan(low.double(), batch.spans, exclusive=True)[0].long()
    return low & (rank % interval == 0)


def as_float(x: Tensor) -> Tensor:
    """Return half precision as float32, and float32 and float64 as they are.

    Args:
        x: A float tensor.
    """
    return x if x.dtype == torch.float64 else x.float()


@dataclass(frozen=True)
class value_changes(Credit):
    """The change in value over each stretch of tokens; the value at the end of a row is its reward.

    A stretch begins at every token before which the state has a value (the input is not NaN). Its tokens have the value
    at the next such token minus the value at its beginning. Tokens before the first stretch have 0.

    Args:
        name: Input with the values.
    """

    name: str = input_name("state_values")

    @property
    def required_inputs(self) -> frozenset[str]:
        """The named input."""
        return frozenset({self.name})

    def __call__(self, batch: Rollouts) -> Tensor:
        value = batch.input(self.name)
        stretch = segment.pieces(batch.response_mask & ~value.isnan(), batch.spans)
        before = as_float(stretch.take(value))
        after = before.roll(-1).index_copy_(0, stretch.offsets[1:] - 1, batch.rewards.to(before.dtype))
        change = torch.where(stretch.marked, after - before, 0)
        return ops.spread(change, stretch.spans)


__all__ = ["improbable_cuts", "value_changes"]
