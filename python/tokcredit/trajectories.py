"""Which rows of a batch are parts of one trajectory, and how rows become trajectories and trajectories rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokcredit.selection import Section, Selection
from tokcredit.spans import Spans


class Joined(NamedTuple):
    """Trajectories as rows: what :class:`~tokcredit.selection.Selection` is for some rows of a batch.

    Where the rows of each trajectory follow one another, trajectories lie in the buffers of the batch, and padding
    between their rows is masked. Otherwise tokens are moved.

    Attributes:
        rows: int64 ``[J]``, first row of each trajectory.
        last: int64 ``[J]``, last row of each trajectory.
        tokens: int64, positions of the tokens of the trajectories in the batch, or None where they are not moved.
        spans: The trajectories.
        parts: Rows of the batch in the buffers of the trajectories.
        order: int64 ``[R]``, the row of the batch that each of these is.
    """

    rows: Tensor
    last: Tensor
    tokens: Tensor | None
    spans: Spans
    parts: Spans
    order: Tensor

    def of_rows(self, x: Tensor) -> Tensor:
        """Return the numbers of the first rows.

        Args:
            x: ``[R, ...]``.
        """
        return x.index_select(0, self.rows)

    def of_tokens(self, x: Tensor) -> Tensor:
        """Return the tokens of a per-token tensor in the order of the trajectories.

        Args:
            x: ``[N, ...]``.
        """
        return x if self.tokens is None else x.index_select(0, self.tokens)


class Divided(NamedTuple):
    """Rows as parts of trajectories: the inverse of :class:`Joined`.

    Attributes:
        rows: int64 ``[R]``, trajectory of each row.
        tokens: As in :class:`Joined`.
        size: Number of tokens N of the batch.
        spans: The rows.
    """

    rows: Tensor
    tokens: Tensor | None
    size: int
    spans: Spans

    def of_rows(self, x: Tensor) -> Tensor:
        """Return each row's own trajectory's number.

        Args:
            x: ``[J, ...]``.
        """
        return x.index_select(0, self.rows)

    def of_tokens(self, x: Tensor) -> Tensor:
        """Return the tokens of a per-token tensor where they lie in the batch, 0 on padding.

        Args:
            x: In the buffers of the trajectories.
        """
        return x if self.tokens is None else x.new_zeros(self.size, *x.shape[1:]).index_copy_(0, self.tokens, x)


Part = Selection | Section | Joined | Divided
"""What gives the rows and the tokens of one batch in the layout of another."""


@dataclass(frozen=True, eq=False)
class Trajectories:
    """Trajectories of which at least one has several rows. The arrays lie on the host.

    Attributes:
        number: int64 ``[R]``, trajectory of each row, numbered by its first row in the batch that the user made.
        place: int64 ``[R]``, ascending along trajectories, and from trajectory to trajectory.
        rows: int64, number of rows of each trajectory in that batch.
        spans: The rows, without mask.
        sizes: int64 ``[R]``, tokens of each row.
    """

    number: NDArray[np.int64]
    place: NDArray[np.int64]
    rows: NDArray[np.int64]
    spans: Spans
    sizes: NDArray[np.int64]

    @classmethod
    def of(cls, ids: Tensor, spans: Spans) -> Trajectories | None:
        """Return the trajectories of rows with these ids, or None where each row is one. On CUDA this waits.

        Args:
            ids: Integers ``[R]``.
            spans: The rows, without mask.
        """
        _, first, number, rows = np.unique(
            ids.cpu().numpy(), return_index=True, return_inverse=True, return_counts=True
        )
        if len(rows) == len(number):
            return None
        by_first_row = np.argsort(first)
        number = np.argsort(by_first_row)[number.reshape(-1)]
        place = np.argsort(np.argsort(number, kind="stable"))
        return cls(number, place, rows[by_first_row], spans, spans.lengths.cpu().numpy())

    def take(self, chosen: Selection | Section) -> Trajectories:
        """Return the trajectories, or parts of them, that some rows make up.

        Args:
            chosen: The rows.
        """
        rows = chosen.numbers
        return Trajectories(self.number[rows], self.place[rows], self.rows, chosen.spans, chosen.sizes)

    def require_whole(self, rows: NDArray[np.int64]) -> None:
        """Check that rows make up whole trajectories.

        Args:
            rows: int64 ``[M]``.

        Raises:
            ValueError: A trajectory is cut, or a row is there twice.
        """
        once = np.unique(rows)
        if len(once) < len(rows):
            raise ValueError("rows: expected each row of a trajectory once, got one twice")
        numbers, found = np.unique(self.number[once], return_counts=True)
        missing = found < self.rows[numbers]
        if missing.any():
            t = int(np.argmax(missing))
            raise ValueError(
                f"rows: expected all {int(self.rows[numbers[t]])} rows of a trajectory because the loss of a token "
                f"depends on other tokens of its trajectory, got {int(found[t])}"
            )

    @cached_property
    def _order(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows along trajectories, and where in that order each trajectory begins."""
        order = np.argsort(self.place, kind="stable")
        return order, np.flatnonzero(np.diff(self.number[order], prepend=-1))

    @cached_property
    def joined(self) -> Joined:
        """The trajectories as rows. Nothing waits for the device."""
        order, begins = self._order
        ends = np.append(begins, len(order))[1:] - 1

        def on_device(x: NDArray[np.int64]) -> Tensor:
            return torch.from_numpy(x).to(self.spans.device, non_blocking=True)

        parts, tokens = self.spans, None
        if not bool((order == np.arange(len(order))).all()):
            moved = Selection.of(order, self.spans, self.sizes, None)
            parts, tokens = moved.spans, moved.tokens
        begin, end = (x.index_select(0, on_device(at)) for x, at in ((parts.begin, begins), (parts.end, ends)))
        spans = Spans.trusted(begin, end, parts.size)
        return Joined(on_device(order[begins]), on_device(order[ends]), tokens, spans, parts, on_device(order))

    @cached_property
    def dense(self) -> NDArray[np.int64]:
        """Trajectory of each row among those of :attr:`joined`, int64 ``[R]``."""
        order, begins = self._order
        dense = np.empty_like(order)
        dense[order] = np.repeat(np.arange(len(begins)), np.diff(np.append(begins, len(order))))
        return dense

    @cached_property
    def divided(self) -> Divided:
        """The rows as parts of the trajectories that :attr:`joined` holds. Nothing waits for the device."""
        rows = torch.from_numpy(self.dense).to(self.spans.device, non_blocking=True)
        return Divided(rows, self.joined.tokens, self.spans.size, self.spans)


def check_agreement(trajectories: Trajectories, name: str, x: Tensor, of_trajectory: str = "equal") -> None:
    """Check that the rows of each trajectory agree in what belongs to the trajectory.

    Args:
        trajectories: The trajectories.
        name: Argument name for the error.
        x: ``[R, ...]``.
        of_trajectory: As in :class:`tokcredit.inputs.Input`.

    Raises:
        ValueError: Two rows of a trajectory differ.
    """
    if of_trajectory == "first":
        return
    source = trajectories.joined.last if of_trajectory == "last" else trajectories.joined.rows
    expected = x.index_select(0, source).index_select(0, trajectories.divided.rows)
    differs = (x != expected) & (x != 0) if of_trajectory == "last" else x != expected
    if bool(differs.any()):
        r = int(differs.nonzero()[0, 0])
        raise ValueError(
            f"{name}: expected the same in all rows of a trajectory, got {x[r].tolist()} in row {r} beside "
            f"{expected[r].tolist()}"
        )


def check_duplicates(outcome: Tensor, total: Tensor, counts: Tensor) -> None:
    """Check that outcomes do not repeat what rewards of tokens sum to.

    Args:
        outcome: float ``[J]``, outcome of each trajectory.
        total: float ``[J]``, outcome plus the rewards of its tokens.
        counts: bool ``[J]``, trajectories with a token that the policy chose. The others have no reward of a token.

    Raises:
        ValueError: Outcomes are not all 0, and equal the sums in every trajectory.
    """
    outcome, total = outcome[counts], total[counts]
    if bool((outcome != 0).any()) and torch.allclose((total - outcome).double(), outcome.double(), rtol=1e-6, atol=0):
        raise ValueError(
            "rewards: expected outcomes beside token_rewards, got the sums of token_rewards; pass one of the two"
        )
