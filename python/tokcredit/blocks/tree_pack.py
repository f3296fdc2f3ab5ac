"""Plans to compute rows that share prefixes: each distinct token once, in bins of bounded size.

A *full row* is the context of a row, from ``prompt_tokens``, followed by the row. A *place* is a token that a forward
pass reads; a *prediction* is a place together with the token that it predicts. Where rows branch, one place has several
predictions. The last token of a row that nothing continues is predicted and has no place, and tokens after the last
wanted one are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokcredit import ops
from tokcredit.arguments import INTEGERS, describe, instance, tensor, whole_number
from tokcredit.rollouts import Rollouts

_UNBOUNDED = 2**62
_SUM = ops.REDUCTIONS.index("sum")


class _ToRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.index, ctx.size = index, x.numel()
        inside = index >= 0
        return torch.where(inside, x[index.clamp(min=0)], 0) if x.numel() else x.new_zeros(index.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Unlike index_add on CUDA, this adds in a fixed order.
        wide = grad if grad.dtype == torch.float64 else grad.float()
        sums = ops.segment_ids(wide.contiguous(), ctx.index, None, ctx.size, _SUM, 0.0)
        return sums.to(grad.dtype), None


def _to_rows(x: Tensor, index: Tensor, predictions: int) -> Tensor:
    if not isinstance(x, Tensor) or x.shape != (predictions,):
        raise ValueError(f"x: expected [{predictions}], got {describe(x)}")
    out: Tensor = _ToRows.apply(x, index)
    return out


@dataclass(frozen=True, eq=False)
class TreePart:
    """One bin of a plan: a micro-batch of whole rows that is computed in one forward pass.

    Place j is place i or an ancestor of it if and only if ``j <= i < end[j]``.

    Attributes:
        rows: int64, numbers of the rows in the batch, on the host; ``batch.select(part.rows)`` is the micro-batch.
        tokens: int32 or int64 ``[M]``, token ids, depth first.
        position_ids: int64 ``[M]``, position of each place in its full row.
        parent: int64 ``[M]``, place of the previous token, -1 at a first token.
        end: int64 ``[M]``, one past the last place below each place.
        source: int64 ``[Q]``, place that makes the prediction.
        target: int64 ``[Q]``, token id that is predicted.
        index: int64, prediction of each token of the micro-batch, -1 where it is not wanted.
    """

    rows: NDArray[np.int64]
    tokens: Tensor
    position_ids: Tensor
    parent: Tensor
    end: Tensor
    source: Tensor
    target: Tensor
    index: Tensor

    def to_rows(self, x: Tensor) -> Tensor:
        """Return numbers of predictions at the tokens of the rows, with gradient; 0 where no token is wanted.

        The gradient of a prediction is the sum over the rows that share it, in a fixed order.

        Args:
            x: float ``[Q]``.

        Raises:
            ValueError: The shape is wrong.
        """
        return _to_rows(x, self.index, self.source.numel())


@dataclass(frozen=True, eq=False)
class TreePack:
    """A plan: the distinct tokens of a batch in bins, and the predictions of its wanted tokens. Made by :func:`pack`.

    Arrays lie on the host; parts lie on the device of the batch.

    Attributes:
        batch: The batch.
        ranks: Number of ranks that share the bins.
        arrays: The arrays of ``csrc/ops/tree_pack.hpp``.
    """

    batch: Rollouts
    ranks: int
    arrays: ops.TreePackArrays

    @property
    def num_bins(self) -> int:
        """Number of bins."""
        return self.arrays.bin_places.numel() - 1

    @property
    def num_places(self) -> int:
        """Number of tokens that are forwarded, over all bins."""
        return self.arrays.tokens.numel()

    @property
    def num_predictions(self) -> int:
        """Number of predictions, over all bins."""
        return self.arrays.source.numel()

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the packed full rows, each row counted."""
        return int(self.arrays.row_length.sum())

    @property
    def num_wanted(self) -> int:
        """Number of wanted tokens, each row counted."""
        return int((self.arrays.index >= 0).sum())

    @cached_property
    def position_ids(self) -> Tensor:
        """Position of each place in its full row; int64 ``[M]``."""
        a = self.arrays
        return torch.arange(self.num_places) + self._of_segments(a.segment_depth - a.segment_begin[:-1])

    @cached_property
    def parent(self) -> Tensor:
        """Place of the token before each place, -1 at a first token; int64 ``[M]``."""
        return torch.arange(-1, self.num_places - 1).index_copy(
            0, self.arrays.segment_begin[:-1], self.arrays.segment_parent
        )

    @cached_property
    def end(self) -> Tensor:
        """One past the last place below each place; int64 ``[M]``."""
        return self._of_segments(self.arrays.segment_end)

    @cached_property
    def index(self) -> Tensor:
        """Prediction of each token, -1 where it is not wanted; int64 ``[N]``, on the device of the batch."""
        return self.arrays.index.to(self.batch.device).long()

    @property
    def target(self) -> Tensor:
        """Token id of each prediction; int64 ``[Q]``, on the device of the batch."""
        return self.arrays.target.to(self.batch.device)

    def to_rows(self, x: Tensor) -> Tensor:
        """Return numbers of predictions at the tokens of the batch, as :meth:`TreePart.to_rows` does for a bin.

        Args:
            x: float ``[Q]``, the predictions of one bin after another.

        Raises:
            ValueError: The shape is wrong.
        """
        return _to_rows(x, self.index, self.num_predictions)

    def _of_segments(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.arrays.segment_begin.diff(), output_size=self.num_places)

    def part(self, number: int) -> TreePart:
        """Return a bin.

        Args:
            number: Number of the bin.
        """
        a, device = self.arrays, self.batch.device
        edges = (a.bin_places, a.bin_predictions, a.bin_rows)
        places, predictions, rows = (slice(*x[number : number + 2].tolist()) for x in edges)
        chosen = a.row_order[rows].numpy()
        index = self.batch.selection(chosen).of_tokens(self.index)
        first = places.start
        return TreePart(
            chosen,
            a.tokens[places].to(device),
            self.position_ids[places].to(device),
            (self.parent[places] - first).clamp(min=-1).to(device),
            (self.end[places] - first).to(device),
            (a.source[predictions].long() - first).to(device),
            a.target[predictions].to(device),
            torch.where(index >= 0, index - predictions.start, -1),
        )

    @property
    def empty_part(self) -> TreePart:
        """A part of one place, without rows and predictions."""
        nothing = torch.zeros(0, dtype=torch.int64, device=self.batch.device)
        one = torch.zeros(1, dtype=torch.int64, device=self.batch.device)
        rows = np.zeros(0, dtype=np.int64)
        return TreePart(rows, one.to(self.arrays.tokens.dtype), one, one - 1, one + 1, nothing, nothing, nothing)

    def __iter__(self) -> Iterator[TreePart]:
        """Iterate over the bins."""
        return map(self.part, range(self.num_bins))

    def groups(self) -> list[tuple[int, int, int, int]]:
        """Return what the rows of each group share, bin by bin.

        Returns:
            For each group its id, the number of packed rows, their tokens, and the distinct ones of these.
        """
        a, ids = self.arrays, self.batch.group_ids.tolist()
        lengths, shared, bins = a.row_length.tolist(), a.row_shared.numpy(), a.row_bin.tolist()
        last: dict[tuple[int, int], int] = {}
        found: dict[int, list[int]] = {}
        for k, row in enumerate(a.row_order.tolist()):
            group = ids[row]
            before = last.get((group, bins[row]))
            common = 0 if before is None else int(shared[before + 1 : k + 1].min())
            last[group, bins[row]] = k
            counts = found.setdefault(group, [0, 0, 0])
            for i, count in enumerate((1, lengths[row], lengths[row] - common)):
                counts[i] += count
        return [(group, rows, tokens, own) for group, (rows, tokens, own) in sorted(found.items())]

    def __str__(self) -> str:
        a = self.arrays
        lines = [
            f"{a.row_order.numel()} of {self.batch.num_rows} rows in {self.num_bins} bins: {self.num_tokens} tokens, "
            f"{self.num_places} forwarded ({self.num_tokens / max(self.num_places, 1):.2f} times fewer), "
            f"{self.num_predictions} predictions of {self.num_wanted} tokens"
        ]
        sizes = [x.diff().tolist() for x in (a.bin_rows, a.bin_places, a.bin_predictions)]
        for number, (rows, places, predictions) in enumerate(zip(*sizes, strict=True)):
            lines.append(f"  bin {number}: {rows} rows, {places} places, {predictions} predictions")
        for group, rows, tokens, distinct in self.groups():
            lines.append(f"  group {group}: {rows} rows, {tokens} tokens, {distinct} distinct")
        return "\n".join(lines)

    def for_rank(self, rank: int) -> list[TreePart]:
        """Return the bins of a rank; every rank has as many.

        Bins that are computed at the same time have about the same number of places. If there are fewer rows than
        bins are needed, the last ones have one place and no rows, so that collectives still run.

        Args:
            rank: From 0 to ``ranks - 1``.

        Raises:
            ValueError: There is no such rank.
        """
        if not 0 <= rank < self.ranks:
            raise ValueError(f"rank: expected a number from 0 to {self.ranks - 1}, got {rank}")
        order = self.arrays.bin_places.diff().argsort(descending=True, stable=True).tolist()
        rounds = range(rank, -(-len(order) // self.ranks) * self.ranks, self.ranks)
        return [self.part(order[at]) if at < len(order) else self.empty_part for at in rounds]


def _contexts(batch: Rollouts) -> tuple[Tensor, Tensor, Tensor]:
    """Return contexts ``(R, P)`` and, as spans of the flat tensor, where those of the rows are."""
    rows = batch.num_rows
    if not batch.has_input("prompt_tokens"):
        empty = torch.zeros(rows, dtype=torch.int64)
        return torch.zeros(rows, 0, dtype=batch.tokens.dtype), empty, empty
    prompts = batch.input("prompt_tokens").cpu().contiguous()
    width = prompts.shape[1]
    real = prompts != -1
    end = torch.arange(1, rows + 1) * width
    # The padding is on the left; a row of padding has no context.
    length = torch.where(real.any(1), width - real.byte().argmax(1), 0) if width else torch.zeros_like(end)
    return prompts, end - length, end


def _tags(tags: Any, batch: Rollouts, contexts: Tensor) -> tuple[Tensor | None, Tensor | None]:
    if tags is None:
        return None, None
    if not isinstance(tags, tuple) or len(tags) != 2:
        raise TypeError(f"tags: expected a pair of tensors (of contexts, of rows), got {type(tags).__name__}")
    before = tensor("tags[0]", tags[0], INTEGERS, tuple(contexts.shape), batch.device)
    own = tensor("tags[1]", tags[1], INTEGERS, batch.shape or (batch.num_tokens,), batch.device)
    return own.reshape(-1).cpu().long().contiguous(), before.reshape(-1).cpu().long().contiguous()


def pack(
    batch: Rollouts,
    budget: int | None = None,
    *,
    wanted: Tensor | None = None,
    tags: tuple[Tensor, Tensor] | None = None,
    together: Tensor | None = None,
    predictions: int | None = None,
    bin_cost: int = 256,
    ranks: int = 1,
) -> TreePack:
    """Return a plan that forwards each distinct token of the batch once, in bins.

    Rows share their tokens up to the first that differs, whatever group they are of. Rows of a bin form one forest in
    depth-first order. Bins are cut so that the number of places plus ``bin_cost`` per bin is smallest; tokens that rows
    of two bins share are forwarded in both. A row is never cut. The same batch gives the same plan, whatever the number
    of threads.

    Args:
        batch: The rollouts, with the input ``prompt_tokens``; without it rows have no context.
        budget: Most places of a bin, or None for one bin.
        wanted: bool in the layout of the batch, tokens whose log-prob is needed; None takes the ``response_mask``.
        tags: Integers like ``prompt_tokens`` and integers in the layout of the batch, or None. Tokens are the same only
            if their tags are equal too: for images, replayed routes of experts, or adapters.
        together: Integers ``[R]``; rows with one id go into one bin, for example the two of a preference pair.
        predictions: Most predictions of a bin, which bounds the memory of the output layer, or None.
        bin_cost: What one more bin costs, in places.
        ranks: Number of ranks that share the bins; see :meth:`TreePack.for_rank`.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape is wrong, a row or the rows of one id exceed a limit, or a first token without a context is
            wanted.
    """
    instance("batch", batch, Rollouts)
    budget = _UNBOUNDED if budget is None else whole_number("budget", budget, 1)
    predictions = _UNBOUNDED if predictions is None else whole_number("predictions", predictions, 1)
    bin_cost, ranks = whole_number("bin_cost", bin_cost), whole_number("ranks", ranks, 1)
    mask = batch.response_mask
    if wanted is not None:
        mask = tensor("wanted", wanted, (torch.bool,), batch.shape or (batch.num_tokens,), batch.device).reshape(-1)
    contexts, begin, end = _contexts(batch)
    tags_of_rows, tags_of_contexts = _tags(tags, batch, contexts)
    if together is not None:
        together = tensor("together", together, INTEGERS, (batch.num_rows,), batch.device).cpu().long().contiguous()
    tokens = batch.tokens.cpu().contiguous()
    if contexts.dtype != tokens.dtype:
        contexts, tokens = contexts.long(), tokens.long()
    arrays = ops.tree_pack(
        tokens,
        _on_host(batch, mask),
        contexts.reshape(-1),
        begin,
        end,
        tags_of_rows,
        tags_of_contexts,
        batch.group_index.cpu().contiguous(),
        batch.num_groups,
        together,
        min(budget, _UNBOUNDED),
        min(predictions, _UNBOUNDED),
        min(bin_cost, 2**40),
        ranks,
    )
    return TreePack(batch, ranks, arrays)


def _on_host(batch: Rollouts, mask: Tensor) -> Any:
    spans = batch.all_spans
    return type(spans).trusted(spans.begin.cpu(), spans.end.cpu(), spans.size, mask.cpu().contiguous())
