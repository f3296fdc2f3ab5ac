"""Tree-estimated mean prefix value for policy optimization."""

from __future__ import annotations


from dataclasses import dataclass

from torch import Tensor

from tokcredit.blocks import segment, tree, values
from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts
from tokcredit.stages import aggregation, clip
from tokcredit.stages.base import flag, number
from tokcredit.stages.credit import Credit
from tokcredit.stages.credit.group import counted


@dataclass(frozen=True)
class tempo_credit(Credit):
    """Group-normalized reward, plus at each branch token the change of the tree's value that the token caused.

    ``A[t] = (r - mean + V(after t) - V(before t)) / (std + epsilon)``, V of a prefix being the mean reward of the
    group's rollouts that run through it. The difference is 0 wherever no other rollout parts.
    """

    scale: bool = flag(True)
    epsilon: float = number(1e-6, at_least=0)
    count_empty: bool = flag(False)

    def __call__(self, batch: Rollouts) -> Tensor:
        groups = counted(batch, self.count_empty)
        statistics = segment.moments(batch.rewards, groups)
        alone = statistics.size < 2
        trees = tree.build(batch)
        counts = None if self.count_empty else batch.lengths > 0
        change = values.temporal_difference(trees, values.monte_carlo(trees, batch.rewards.double(), counts))
        centred = batch.rewards - groups.per_row(statistics.mean.masked_fill(alone, 0))
        if self.scale:
            scale = statistics.var.sqrt().masked_fill(alone, 1).add_(self.epsilon)
            centred, change = centred / groups.per_row(scale), change / scale[trees.group]
        dtype = batch.rewards.dtype
        return trees.expand(row=centred.to(dtype), head=change.to(dtype))


def tempo(
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    cap: float | None = 3.0,
    scale: bool = True,
    epsilon: float = 1e-6,
) -> Objective:
    """GRPO plus, at tokens where rollouts of a group part, the change in mean reward that the token caused.

    ``A[t] = (r - mean + V(prefix with t) - V(prefix before t)) / (std + epsilon)``, V(prefix) being the mean reward
    of the group's rollouts that begin with it. No critic and no extra rollouts; elsewhere the advantage is GRPO's.

    Args:
        clip_low: the ratio may fall to ``1 - clip_low``.
        clip_high: the ratio may rise to ``1 + clip_high``.
        cap: where A < 0 the loss is at most ``-A cap``.
        scale: divide both terms by the group's standard deviation.
        epsilon: added to it.

    Cost: as GRPO, plus the prefix trees of the groups, built once per batch on token ids.
    Source: arXiv 2509.18314.
    Departs from the released code: the end of a row is a symbol of its own, not the padding id; a group of one is
    paid as in GRPO (the release gives NaN); tool tokens are compared but not paid (the release stops at the first).
    """
    return Objective(
        tempo_credit(scale, epsilon),
        clip=clip.ppo(clip_low, clip_high, cap),
        aggregation=aggregation.token_mean(),
    )
