"""A batch with credit, selection and weights: what an objective decides once, and every micro-batch reads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokcredit import aggregation, clip, ops, segment
from tokcredit.arguments import row_indices
from tokcredit.ops import Rows
from tokcredit.rollouts import Rollouts

if TYPE_CHECKING:
    from tokcredit.objective import Objective


def per_token(x: Tensor, batch: Rollouts) -> Tensor:
    """A stage's result, ``[R, 1]`` or ``[N]``, as ``[N]``."""
    return x if x.dim() == 1 else ops.spread(x[:, 0], batch.rows, batch.tokens)


def product(a: Tensor, b: Tensor, batch: Rollouts) -> Tensor:
    """Of two results, each 0-d, ``[R, 1]`` or ``[N]``."""
    if a.dim() == b.dim() or a.dim() == 0 or b.dim() == 0:
        return a * b
    return per_token(a, batch) * per_token(b, batch)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A batch with everything that does not depend on the current policy.

    Attributes:
        objective: what to evaluate.
        batch: the rollouts.
        credits: advantages as the credit stage gave them, ``[R, 1]`` or ``[N]``.
        mask: bool ``[N]``, the tokens that train.
        multiplier: ``[R, 1]``, ``[N]`` or None.
        signs: ``[R, 1]``, whether the row did better (1) or worse (-1) than its group.
        window: bounds of the ratio.
        signal: ``[N]`` or None, for the gain.
        row_weights: ``[R, 1]`` or 0-d, from the aggregation; ``penalty_weights`` for the KL term.
    """

    objective: Objective
    batch: Rollouts
    credits: Tensor
    mask: Tensor
    multiplier: Tensor | None
    signs: Tensor
    window: clip.Window
    signal: Tensor | None
    row_weights: Tensor = None  # type: ignore[assignment]
    penalty_weights: Tensor = None  # type: ignore[assignment]

    @property
    def rows(self) -> Rows:
        """Spans, and the mask of the tokens that train."""
        return Rows(self.batch.begin, self.batch.end, self.mask)

    @property
    def advantages(self) -> Tensor:
        """What each token is paid, in the layout of the batch; 0 where the policy did not choose."""
        return self.batch.shaped(per_token(self.credits, self.batch))

    @property
    def has_credit(self) -> Tensor:
        """Rows that can move the policy; bool ``[R]``. The others need neither forward nor backward."""
        trains = segment.count(self.batch.tokens, self.rows) > 0
        if self.objective.kl is not None and self.objective.kl.beta:
            return trains
        paid = self.credits
        if self.multiplier is not None:
            paid = product(paid, self.multiplier, self.batch)
        paid = paid != 0
        paid = paid[:, 0] if paid.dim() == 2 else segment.maximum(paid.float(), self.rows) > 0
        return trains & paid & (self.row_weights != 0).expand(len(trains), 1)[:, 0]

    def aggregated(
        self,
        batch_num_tokens: int | None = None,
        global_batch_size: int | None = None,
        dp_size: int = 1,
        global_num_groups: int | None = None,
    ) -> Prepared:
        """The same with row weights for these denominators, counted here where there is one rank."""
        if dp_size < 1:
            raise ValueError(f"dp_size: expected at least 1, got {dp_size}")
        given = {"batch_num_tokens": batch_num_tokens, "global_batch_size": global_batch_size}
        if isinstance(self.objective.aggregation, aggregation.balanced):
            given["global_num_groups"] = global_num_groups
        if isinstance(self.objective.aggregation, aggregation.sequence_sum):
            given["length"] = self.objective.aggregation.length
        for name, value in given.items():
            if dp_size > 1 and value is None and not self.objective.spans_groups:
                raise ValueError(f"{name}: expected the number of all ranks because dp_size is {dp_size}, got None")
        batch = self.batch
        lengths = segment.count(batch.tokens, self.rows).long()
        trained = lengths > 0
        present = segment.sum(trained.double(), segment.Ids(batch.group_index, batch.num_groups)) > 0

        def count(number: int | None, counted: Tensor) -> Tensor:
            return counted if number is None else torch.full_like(counted, number)

        counts = aggregation.Counts(
            tokens=count(batch_num_tokens, lengths.sum()),
            rows=count(global_batch_size, trained.sum()),
            groups=count(global_num_groups, present.sum()),
            dp_size=dp_size,
            width=batch.shape[1] if batch.shape else int((batch.end - batch.begin).max()) if batch.num_rows else 0,
            lengths=lengths,
            signs=self.signs[:, 0],
            group_index=batch.group_index,
            num_groups=batch.num_groups,
        )
        return replace(
            self,
            row_weights=self.objective.aggregation(counts),
            penalty_weights=self.objective.aggregation.penalty(counts),
        )

    def minibatch(
        self,
        rows: Tensor,
        batch_num_tokens: int | None = None,
        global_batch_size: int | None = None,
        dp_size: int = 1,
        global_num_groups: int | None = None,
    ) -> Prepared:
        """These rows as an optimizer step of their own: the same credit, denominators over these rows only."""
        return self.select(rows).aggregated(batch_num_tokens, global_batch_size, dp_size, global_num_groups)

    def select(self, rows: Tensor) -> Prepared:
        """These rows as a micro-batch: the losses of a partition of the rows add up to the whole."""
        rows = row_indices(rows, self.batch.num_rows, self.mask.device)
        take, _, _ = self.batch.token_positions(rows)

        def pick(x: Tensor) -> Tensor:
            return x if x.dim() == 0 else x.index_select(0, take if x.dim() == 1 else rows)

        return replace(
            self,
            batch=self.batch.select(rows),
            credits=pick(self.credits),
            mask=self.mask.index_select(0, take),
            multiplier=None if self.multiplier is None else pick(self.multiplier),
            signs=self.signs[rows],
            window=self.window.at(take),
            signal=None if self.signal is None else self.signal.index_select(0, take),
            row_weights=pick(self.row_weights),
            penalty_weights=pick(self.penalty_weights),
        )
