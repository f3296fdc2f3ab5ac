"""TEMPO: tree-estimated mean prefix value for policy optimization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

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
    """TEMPO's advantage: the group-normalized reward plus the change of the prefix value that the token caused.

    ``V(s)`` is the mean reward of the rows of the group that begin with the prefix ``s``::

        A[i, t] = (r[i] - mean(r) + V(s[t + 1]) - V(s[t])) / (std(r) + epsilon)

    Masked tokens belong to the prefixes and have no advantage. The end of a row counts as a symbol of its own. A group
    of one has mean 0 and standard deviation 1. Trajectories of several rows need ``context_keys``, by which a prefix is
    all that the policy had seen.

    Args:
        scale: Whether to divide by the sample standard deviation of the group.
        epsilon: Added to the standard deviation, at least 0.
        count_empty: Whether rows without a token that the policy chose count in the group and in prefix values.

    References:
        arXiv 2509.18314.
    """

    scale: bool = flag(True)
    epsilon: float = number(1e-6, at_least=0)
    count_empty: bool = flag(False)
    compares_prefixes: ClassVar[bool] = True

    def __call__(self, batch: Rollouts) -> Tensor:
        groups, rewards, trees = counted(batch, self.count_empty), batch.rewards, tree.build(batch)
        moments = segment.moment_table(rewards, groups)
        standard = "normalized" if self.scale else "centred"
        row = segment.standardize(rewards, groups.index, moments, standard, self.epsilon)
        # The mean of the group is in both values and cancels.
        rows = None if self.count_empty else batch.nonempty
        advantages = trees.expand(row=row, head=values.monte_carlo_change(trees, row, rows))
        return advantages if trees.pieces is None else advantages + values.monte_carlo_ends(trees, row, rows)


def tempo(
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    cap: float | None = 3.0,
    scale: bool = True,
    epsilon: float = 1e-6,
) -> Objective:
    """TEMPO: GRPO plus a temporal-difference correction at the tokens where the responses of a group branch.

    The responses of a group form a prefix tree. The value ``V(s)`` of a prefix is the mean reward of the responses that
    begin with it. For token ``t`` of response ``i``::

        A[i, t] = (r[i] - mean(r) + V(s[t + 1]) - V(s[t])) / (std(r) + epsilon)

    ``V(s[t + 1]) - V(s[t])`` is nonzero only where responses branch, so other tokens keep GRPO's advantage. There is
    neither a critic nor an extra rollout.

    Args:
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.
        cap: Dual-clip constant, at least 1: where ``A < 0`` the loss is at most ``-A * cap``. None for no dual clip.
        scale: Whether to divide by the standard deviation of the group.
        epsilon: Added to the standard deviation.

    Cost: GRPO plus one prefix tree per group, built once per batch from token ids.
    References: arXiv 2509.18314.
    Differences from the paper:
        - The dual clip is that of the released script.
    Differences from the released code:
        - The end of a response is a symbol of its own; the release compares padding ids.
        - A group of one has GRPO's advantage; the release gives NaN.
        - A response goes on after masked tokens, which belong to its prefix and have no advantage. The release stops at
          the first masked token.
        - Rows without a token that the policy chose count neither in the group nor in prefix values.
    """
    return Objective(
        tempo_credit(scale, epsilon),
        clip=clip.ppo(clip_low, clip_high, cap),
        aggregation=aggregation.token_mean(),
    )
