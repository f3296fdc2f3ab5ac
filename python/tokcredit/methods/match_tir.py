"""MatchTIR: tool-integrated reasoning with rewards from matched calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

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
    """MatchTIR's dual-level advantage: the rewards of the whole row plus the discounted rewards from the turn on.

    The reward ``r`` of a turn is the sum of ``turn_rewards`` over its tokens::

        R = sum over turns of r[t]
        G[t] = r[t] + discount * G[t + 1]
        A[t] = (R - mean(R)) / (std(R) + epsilon) + (G[t] - mean(G[t])) / (std(G[t]) + epsilon)

    Statistics of ``R`` are over the trajectories of the group, those of ``G[t]`` over those that have a turn ``t``,
    with the sample standard deviation. Over a single one the mean is 0 and the standard deviation 1.

    Args:
        discount: Factor of the rewards of the next turn, from 0 to 1.
        epsilon: Added to the standard deviations, at least 0.
        halve: Whether ``A`` is divided by 2.
        center_alone: Whether the mean over a single row is its own number, so that its advantage is 0.
    """

    discount: float = number(0.9, at_least=0, at_most=1)
    epsilon: float = number(1e-6, at_least=0)
    halve: bool = flag(False)
    center_alone: bool = flag(False)
    reads: ClassVar[frozenset[str]] = frozenset({"turn_rewards"})

    def __call__(self, batch: Rollouts) -> Tensor:
        reward, turn = batch.input("turn_rewards"), batch.turns
        each = segment.sum(reward, turn.spans)
        later = ops.scan(each, turn.of_row(), decay=self.discount, reverse=True)[0]
        most = int(turn.number.max()) + 1 if turn.number.numel() else 0
        scope = batch.group_index.index_select(0, turn.row).mul_(most).add_(turn.number)
        local = self._normalized(later, scope, segment.Ids(scope, most * batch.num_groups))
        whole = self._normalized(segment.sum(reward, batch.spans), batch.group_index, batch.nonempty_groups)
        total = local.add_(whole.index_select(0, turn.row))
        return ops.spread(total / 2 if self.halve else total, turn.spans)

    def _normalized(self, x: Tensor, index: Tensor, by: segment.By) -> Tensor:
        moments = segment.moment_table(x, by)
        normalized = segment.standardize(x, index, moments, "normalized", self.epsilon)
        if self.center_alone:
            normalized = normalized.masked_fill(moments[:, 0].index_select(0, index) < 2, 0)
        return normalized


def match_tir(
    discount: float = 0.9,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    epsilon: float = 1e-6,
    halve: bool = False,
    center_alone: bool = False,
    cap: float | None = None,
) -> Objective:
    """MatchTIR: GRPO for tool use whose turns are rewarded by how well their calls match the expected calls.

    The reward ``r`` of a turn is the mean match of its calls (``tokcredit.rewards.matching``). The ``rewards`` of the
    batch are not read::

        R = sum over turns of r[t]
        G[t] = r[t] + discount * G[t + 1]
        A[t] = (R - mean(R)) / (std(R) + epsilon) + (G[t] - mean(G[t])) / (std(G[t]) + epsilon)

    Statistics are over the responses of the group, for ``G[t]`` over those that have a turn ``t``.

    Args:
        discount: Factor of the rewards of the next turn, from 0 to 1; the paper's gamma.
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.
        epsilon: Added to the standard deviations.
        halve: Whether the advantage is divided by 2, as in the released code.
        center_alone: Whether a turn that only one response of the group has gets 0 instead of its own ``G``.
        cap: Dual-clip constant, at least 1: where ``A < 0`` the loss is at most ``-A * cap``. None for no dual clip.

    Cost: GRPO plus a small assignment problem per response, on the CPU.
    References: arXiv 2601.10712.
    Differences from the paper:
        - There are no KL and no entropy terms. The paper's are ``tokcredit.mix("match_tir", terms=("kl(0.001)",
          "entropy(0.001)"))``.
    Differences from the released code:
        - The advantage is the sum of its two terms; the release divides it by 2, see ``halve``.
        - There is no dual clip; the scripts of the release have ``cap=3.0``.
        - Calls are matched optimally. The function that the release calls Hungarian is greedy, as is
          ``tokcredit.rewards.matching.greedy``.
        - The release finds turns twice, by end-of-turn tokens and by the mask; here they are those of the batch.
    """
    return Objective(turns(discount, epsilon, halve, center_alone), clip=clip.ppo(clip_low, clip_high, cap))
