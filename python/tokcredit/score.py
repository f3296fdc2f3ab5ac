"""Numbers that rank or scale the tokens of a batch, from evidence about each. A score maps a batch to float ``[N]``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from tokcredit import ops, segment, select
from tokcredit.choice import Choice
from tokcredit.rollouts import Rollouts


class Score(Protocol):
    """A number per token, ``[N]``; what it says where the mask is False means nothing."""

    @property
    def needs(self) -> frozenset[str]: ...

    def __call__(self, batch: Rollouts) -> Tensor: ...


@dataclass(frozen=True)
class given(Choice):
    """The evidence of this name as it is."""

    name: str

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.name})

    def __call__(self, batch: Rollouts) -> Tensor:
        return batch.evidence(self.name)


@dataclass(frozen=True)
class scaled(Choice):
    """Another score, moved and scaled to ``[0, 1]`` in each row; 0 in a row where all are equal.

    ``quantile`` first lowers what exceeds that quantile of the whole batch.
    """

    of: Score
    quantile: float | None = None

    @property
    def spans_groups(self) -> bool:
        return self.quantile is not None or super().spans_groups

    def __call__(self, batch: Rollouts) -> Tensor:
        x, rows = self.of(batch), batch.rows
        x = x if x.dtype == torch.float64 else x.float()
        if self.quantile is not None:
            x = torch.minimum(x, select.quantile(x, self.quantile, rows, select.everything(rows)).to(x.dtype))
        low = segment.minimum(x, rows)
        width = ops.spread(segment.maximum(x, rows) - low, rows, batch.tokens)
        return torch.where(width > 0, (x - ops.spread(low, rows, batch.tokens)) / width, 0)


@dataclass(frozen=True)
class either(Choice):
    """``a + b - a b``: high where one of the two is; of scores in ``[0, 1]``."""

    first: Score
    second: Score

    def __call__(self, batch: Rollouts) -> Tensor:
        a, b = self.first(batch), self.second(batch)
        return a + b - a * b


@dataclass(frozen=True)
class but_not(Choice):
    """``a (1 - b)``: high where the first is and the second, in ``[0, 1]``, is not."""

    first: Score
    second: Score

    def __call__(self, batch: Rollouts) -> Tensor:
        return self.first(batch) * (1 - self.second(batch))


@dataclass(frozen=True)
class entropy_deviation(Choice):
    """How far the log-entropy is from a quantile of the batch, in ``[-1, 1]``; 0 at the quantile.

    With ``x = log(max(H, 1e-8))``, Q its ``pivot``-quantile (nearest rank) and s the root mean square of ``x - Q``
    (at least 1e-4): ``h = (x - Q) / s``, divided by its maximum (at least 1e-8) where positive, and by minus its
    minimum (at least 1e-8) elsewhere. ``literal_sign`` divides by the minimum itself, so that nothing is negative.
    """

    pivot: float = 0.8
    literal_sign: bool = False
    reads: ClassVar[frozenset[str]] = frozenset({"entropies"})
    whole_batch: ClassVar[bool] = True

    def __call__(self, batch: Rollouts) -> Tensor:
        x, pivot, _, low, high = self._measured(batch)
        x.sub_(pivot)
        h = x.clamp(min=0).div_(high).add_(x.clamp_(max=0).div_(low if self.literal_sign else -low))
        return h.masked_fill_(~batch.response_mask, 0)

    def statistics(self, batch: Rollouts) -> tuple[float, float, float, float]:
        """Q, s, and the smallest and largest h: what it takes to give other tokens the same score."""
        _, pivot, spread, low, high = self._measured(batch)
        return tuple(torch.stack([pivot, spread, low / spread, high / spread]).tolist())

    def _measured(self, batch: Rollouts) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x, Q, s, and the smallest and largest ``x - Q``, both away from 0."""
        rows, entropies = batch.rows, batch.evidence("entropies")
        x = (entropies if entropies.dtype == torch.float64 else entropies.float()).clamp(min=1e-8).log_()
        pivot = select.quantile_nearest(x, self.pivot, rows, select.everything(rows))[0]
        square = segment.sum((x - pivot).square_(), rows).sum() / batch.lengths.sum().clamp(min=1)
        spread = square.clamp(min=1e-8).sqrt()
        none = x.new_zeros(1)
        low = torch.cat([none, segment.minimum(x, rows) - pivot]).amin()
        high = torch.cat([none, segment.maximum(x, rows) - pivot]).amax()
        return x, pivot, spread, torch.minimum(low, -1e-8 * spread), torch.maximum(high, 1e-8 * spread)
