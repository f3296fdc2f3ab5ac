"""Balanced Aggregation."""

from __future__ import annotations


from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokcredit.blocks import segment
from tokcredit.objective import Objective
from tokcredit.stages import aggregation, clip
from tokcredit.stages.aggregation import Aggregation, Counts


@dataclass(frozen=True)
class balanced(Aggregation):
    """Mean over groups of positive and negative rows averaged apart, then mixed by their share of the rows.

    ``k/G mean(tokens of rows with A > 0) + n/G mean(tokens of rows with A < 0)``: tokens are equal on either side, and
    neither side outweighs the other by being longer. Rows with A = 0 count in G only.
    """

    counts: ClassVar[frozenset[str]] = frozenset({"groups"})
    reads_signs: ClassVar[bool] = True

    @property
    def for_terms(self) -> Aggregation:
        """Mean over all training tokens."""
        return aggregation.token_mean()

    def __call__(self, counts: Counts) -> Tensor:
        groups = counts.group_of_row
        assert groups is not None and counts.signs is not None and counts.groups is not None
        signs = counts.signs[:, 0]
        trained = counts.lengths > 0
        side = groups.index * 2 + (signs > 0)
        sides = segment.Ids(side, 2 * groups.count)
        signed = (trained & (signs != 0)).double()
        rows = segment.sum(signed, sides)[side]
        tokens = segment.sum(signed * counts.lengths, sides)[side]
        size = groups.per_row(segment.sum(trained.double(), groups))
        share = rows / (size.clamp(min=1) * tokens.clamp(min=1))
        return (signed * share * counts.dp_size / counts.groups.clamp(min=1))[:, None]


def ba(clip_low: float = 0.2, clip_high: float = 0.28) -> Objective:
    """GRPO that averages tokens of positive and of negative rows apart, then mixes them by their share of the group.

    Tokens are equal inside a side, and the longer side does not outweigh the other.

    Args:
        clip_low: the ratio may fall to ``1 - clip_low``.
        clip_high: the ratio may rise to ``1 + clip_high``.

    Cost: as GRPO.
    Source: arXiv 2605.04077.
    Departs from the paper: what it leaves open is read so: rows with A = 0 count in the group's size only;
    advantages that vary inside a row are split by the row's outcome; groups weigh equally; a KL term keeps the token
    mean.
    """
    return Objective(clip=clip.ppo(clip_low, clip_high), aggregation=balanced())
