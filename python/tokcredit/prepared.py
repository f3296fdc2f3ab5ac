"""What the prepared batches of :class:`~tokcredit.Objective` and :class:`~tokcredit.Supervised` share."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any, TypeVar

from torch import Tensor

from tokcredit import ops
from tokcredit.protocol import Denominators
from tokcredit.rollouts import Rollouts
from tokcredit.spans import Spans
from tokcredit.stages.credit.group import chosen_tokens, product
from tokcredit.stages.filters import Filter
from tokcredit.stages.token_weights import TokenWeight
from tokcredit.trajectories import Divided, Joined, Part

T = TypeVar("T", bound="PreparedTokens")


def filtered(filters: Iterable[Filter], batch: Rollouts, advantages: Tensor) -> Rollouts:
    """Return the batch in the mask of the tokens that all filters choose. Each filter sees what those before it chose.

    Args:
        filters: The filters, in order.
        batch: The rollouts.
        advantages: float ``[R, 1]`` or ``[N]``.
    """
    for stage in filters:
        batch = batch.filtered(chosen_tokens(stage(batch, advantages), batch.spans))
    return batch


def multiplied(token_weights: Iterable[TokenWeight], batch: Rollouts, advantages: Tensor) -> Tensor | None:
    """Return the product of token weights, ``[R, 1]`` or ``[N]``, or None without any.

    Args:
        token_weights: The stages.
        batch: The rollouts, with the mask of the tokens that train.
        advantages: float ``[R, 1]`` or ``[N]``.
    """
    multiplier = None
    for stage in token_weights:
        weight = stage(batch, advantages)
        multiplier = weight if multiplier is None else product(multiplier, weight, batch.spans)
    return multiplier


def training_tokens(chosen: Part, lengths: Tensor, spans: Spans) -> Tensor:
    """Return the training tokens of each row of a part, int64 ``[M]``.

    Args:
        chosen: The part.
        lengths: int64 ``[R]``, training tokens of each row of the whole.
        spans: Rows of the part, with the mask of the tokens that train.
    """
    return ops.count(spans) if isinstance(chosen, Joined | Divided) else chosen.of_rows(lengths)


class PreparedTokens:
    """A prepared batch whose rows are weighted by an aggregation.

    Attributes:
        batch: The rollouts.
        spans: The rows, with the mask of the tokens that train.
    """

    batch: Rollouts
    spans: Spans

    @property
    def couples_tokens(self) -> bool:
        """Whether the loss of a token depends on other tokens of its trajectory, which must then be whole."""
        return False

    @property
    def joined(self: T) -> T:
        """The same with trajectories as rows, from which the loss is computed where it couples tokens."""
        return self if self.batch.trajectories is None else self._joined

    @cached_property
    def _joined(self: T) -> T:
        assert self.batch.trajectories is not None
        chosen = self.batch.trajectories.joined
        return self._part(chosen, self.batch.take(chosen))

    def divided(self: T, batch: Rollouts) -> T:
        """Return the same for the rows of a batch whose trajectories are the rows of this one.

        Args:
            batch: The batch of the rows.
        """
        if batch.trajectories is None:
            return self
        made = self._part(batch.trajectories.divided, batch)
        made.__dict__["_joined"] = self
        return made

    @property
    def mask(self) -> Tensor:
        """The tokens that train; bool ``[N]``."""
        assert self.spans.mask is not None
        return self.spans.mask

    def select(self: T, rows: Any) -> T:
        """Return these rows as a micro-batch. Losses of micro-batches of all rows add up to the loss of the batch.

        Nothing on the device is checked again or sorted, and nothing waits for it unless ``rows`` itself lies there.

        Args:
            rows: Integers ``[M]`` or bool ``[R]``: a tensor, an array or a sequence; best on the host.

        Raises:
            TypeError: ``rows`` holds neither integers nor bool.
            ValueError: A row number is out of range, or a trajectory is cut whose tokens the loss couples.
        """
        chosen = self.batch.selection(rows)
        made = self._part(chosen, self.batch.take(chosen))
        if self.batch.trajectories is not None and self.couples_tokens:
            self.batch.trajectories.require_whole(chosen.numbers)
            _ = made.joined  # here, and not while the loss is captured in a graph
        return made

    def section(self: T, first: int, last: int) -> T:
        """Return some tokens as a batch whose rows may be cut, for an objective that is separable over tokens.

        Args:
            first: First token.
            last: One past the last token.
        """
        chosen = self.batch.section(first, last)
        return self._part(chosen, self.batch.take(chosen))

    def by_token(self: T) -> T:
        """Return the same in a form that may be cut inside of rows."""
        return self

    def _part(self: T, chosen: Part, batch: Rollouts) -> T:
        raise NotImplementedError

    def _with(self: T, denominators: Denominators) -> T:
        raise NotImplementedError

    def with_denominators(
        self: T,
        *,
        batch_num_tokens: int | None = None,
        global_batch_size: int | None = None,
        global_num_groups: int | None = None,
        dp_size: int = 1,
    ) -> T:
        """Return the same with row weights for other denominators; those left out are counted from these rows.

        Args:
            batch_num_tokens: Training tokens over all ranks.
            global_batch_size: Trajectories with a training token over all ranks; those without one do not count.
            global_num_groups: Groups with such a trajectory over all ranks.
            dp_size: Number of ranks whose gradients the host averages.

        Raises:
            TypeError: A number is not a whole number.
            ValueError: A number is missing or too small.
        """
        counts = Denominators(batch_num_tokens, global_batch_size, global_num_groups, dp_size)
        return self.joined._with(counts).divided(self.batch)

    def minibatch(self: T, rows: Any, **denominators: int) -> T:
        """Return these rows as a batch of their own, for one optimizer step.

        Advantages stay; denominators count these rows only.

        Args:
            rows: Integers ``[M]`` or bool ``[R]``; see :meth:`select`.
            denominators: As in :meth:`with_denominators`.
        """
        return self.select(rows).with_denominators(**denominators)
