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
    """Mean over groups of the token mean of positive rows and that of negative rows, weighted by their share of rows.

    In a group of ``G`` rows, ``k`` of which have a positive and ``n`` a negative outcome advantage::

        group loss = k / G * mean(token losses of positive rows) + n / G * mean(token losses of negative rows)

    Rows with an advantage of 0 count in ``G`` only. Rows without a training token do not count at all.

    References:
        arXiv 2605.04077.
    """

    counts: ClassVar[frozenset[str]] = frozenset({"groups"})
    reads_signs: ClassVar[bool] = True

    @property
    def for_terms(self) -> Aggregation:
        """Mean over all training tokens."""
        return aggregation.token_mean()

    def __call__(self, counts: Counts) -> Tensor:
        groups = counts.group_of_row
        assert groups is not None and counts.signs is not None
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
    """BA: GRPO that averages the tokens of positive and of negative responses separately in each group.

    The two means are added with weights equal to the share of responses on each side. Tokens of one side have equal
    weights, and the side with the longer responses does not outweigh the other::

        loss = mean over groups of k / G * mean(tokens with A > 0) + n / G * mean(tokens with A < 0)

    ``G`` is the number of responses, ``k`` of which have ``A > 0`` and ``n`` have ``A < 0``.

    Args:
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.

    Cost: The same as GRPO.
    References: arXiv 2605.04077.
    Differences from the paper:
        - The paper does not say what rows with ``A = 0`` do. Here they count in ``G`` only.
        - The paper has one advantage per response. Advantages that vary inside a row are split by the row's outcome.
        - The paper does not say how groups are combined. Here they have equal weights.
        - A KL term has the mean over tokens.
    """
    return Objective(clip=clip.ppo(clip_low, clip_high), aggregation=balanced())
