"""MatchTIR: tool-integrated reasoning by matching calls."""

from __future__ import annotations


from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.blocks import segment
from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts
from tokcredit.stages import clip
from tokcredit.stages.base import flag, number
from tokcredit.stages.credit import Credit


@dataclass(frozen=True)
class turns(Credit):
    """Rewards of the whole row plus discounted rewards from the turn on, each normalised among the group's rows.

    A turn is a maximal run of tokens the policy chose; ``turn_rewards`` are summed over it. With R the sum over turns
    and ``R[t] = r[t] + discount R[t + 1]``: ``A = (R - mean) / (std + epsilon) + (R[t] - mean) / (std + epsilon)``, the
    second over the rows of the group that have a turn t. Sample standard deviations; among one row mean 0 and std 1,
    or with ``center_alone`` its own mean. ``halve`` divides the sum by 2.
    """

    discount: float = number(0.9, at_least=0, at_most=1)
    epsilon: float = number(1e-6, at_least=0)
    halve: bool = flag(False)
    center_alone: bool = flag(False)
    reads: ClassVar[frozenset[str]] = frozenset({"turn_rewards"})

    def __call__(self, batch: Rollouts) -> Tensor:
        mask, reward = batch.response_mask, batch.input("turn_rewards")
        begins = mask.clone()
        begins[1:] &= ~mask[:-1]
        first = batch.begin[batch.begin < batch.end]
        begins[first] = mask[first]
        turn = segment.pieces(begins, batch.spans)
        each = segment.sum(reward, turn.spans)
        later = ops.scan(each, turn.of_row(), decay=self.discount, reverse=True)[0]
        # The piece before the first turn is empty, and is given to no scope.
        number = torch.arange(each.numel(), device=mask.device) - ops.spread(turn.offsets[:-1], turn.of_row())
        most = int(number.max()) + 1 if number.numel() else 1
        scope = ops.spread(batch.group_index, turn.of_row()) * most + number
        local = self._normalized(later, torch.where(turn.marked, scope, -1))
        whole = self._normalized(segment.sum(reward, batch.spans), torch.where(batch.lengths > 0, batch.group_index, -1))
        total = ops.spread(whole, turn.of_row()) + local
        return ops.spread(total / 2 if self.halve else total, turn.spans)

    def _normalized(self, x: Tensor, scope: Tensor) -> Tensor:
        by = segment.Ids(scope, int(scope.max()) + 1 if scope.numel() else 0)
        if by.segments <= 0:
            return torch.zeros_like(x)
        index = scope.clamp(min=0)
        alone = segment.count(by)[index] < 2
        mean = segment.mean(x, by)[index]
        std = torch.where(alone, 1, segment.var(x, by).sqrt()[index])
        if not self.center_alone:
            mean = torch.where(alone, 0, mean)
        return torch.where(scope >= 0, (x - mean) / (std + self.epsilon), 0)


def match_tir(
    discount: float = 0.9,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    epsilon: float = 1e-6,
    halve: bool = False,
    center_alone: bool = False,
) -> Objective:
    """GRPO for tool use, where each turn is also paid by how well its calls match the calls that were expected.

    A turn's reward is the mean match of its calls (``tokcredit.matching``). ``A`` is the sum of the row's rewards,
    normalised in the group, plus the discounted sum from the turn on, normalised among the rows that have that turn.
    The batch's ``rewards`` are not read.

    Args:
        discount: of a later turn's reward.
        clip_low: the ratio may fall to ``1 - clip_low``.
        clip_high: the ratio may rise to ``1 + clip_high``.
        epsilon: added to the standard deviations.
        halve: divide the advantage by 2, as the released code does.
        center_alone: a turn that only one row of the group has is paid 0, in place of its undivided return.

    Cost: as GRPO; matching is a small assignment problem per row, on the CPU.
    Source: arXiv 2601.10712.
    Departs from the paper: no KL and no entropy term (theirs: 0.001 each). The release matches greedily where it says
    Hungarian: ``matching.greedy`` in place of ``matching.optimal``.
    """
    return Objective(turns(discount, epsilon, halve, center_alone), clip=clip.ppo(clip_low, clip_high))
