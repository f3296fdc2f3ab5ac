"""On-policy distillation with larger advantages where most of the row's log-ratios to the teacher are still to come."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.blocks import segment
from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts
from tokcredit.stages import aggregation, clip, credit
from tokcredit.stages.base import number, part
from tokcredit.stages.credit import Credit


@dataclass(frozen=True)
class ahead_weighted(Credit):
    """Another credit A times ``1 + gamma * (1 - share)``, so that it counts more at the start of a row.

    ``share`` is the sum of ``|A|`` over the tokens before this one, divided by the sum over the row.

    Args:
        of: The other credit.
        gamma: Additional weight of the first token, at least 0; may be a schedule or a controller.
    """

    of: Credit = part(Credit, credit.distilled)
    gamma: float = number(0.5, at_least=0, scheduled=True)

    def __call__(self, batch: Rollouts) -> Tensor:
        given = self.of(batch)
        spans, size = batch.spans, given.abs()
        before = ops.scan(size, spans, exclusive=True)[0]
        total = segment.sum(size, spans).clamp(min=1e-8)
        share = before / ops.spread(total, spans)
        return torch.where(batch.response_mask, given * (1 + self.gamma * (1 - share)), 0)


def iw_opd(
    gamma: float = 0.5, clip_low: float = 0.2, clip_high: float = 0.2, clip_cap: float | None = 3.0
) -> Objective:
    """IW-OPD: the advantage of OPD times a weight that falls from ``1 + gamma`` towards 1 along the row.

    With ``a[t] = log p_teacher[t] - log p_old[t]`` and ``q`` the importance ratio::

        w[t] = 1 + gamma * (1 - sum over s < t of |a[s]| / sum over the row of |a|)
        A[t] = w[t] * a[t]
        loss = mean over all tokens of PPO's clipped loss of A and q, with a dual clip

    The first token has weight ``1 + gamma``; the weight tends to 1 at the end of the row.

    Args:
        gamma: Additional weight of the first token, at least 0; may be a schedule.
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.
        clip_cap: Dual-clip constant, at least 1, or None for no dual clip.

    Cost: No groups and no rewards; log-probs of the sampled tokens under the teacher.
    References: arXiv 2606.22600.
    Differences from the paper:
        - None known; clip ranges and dual clip are as TRL's index of papers gives them.
    Differences from the released code:
        - TRL's loss is ``-A * log p`` without a ratio. Its gradient is that of the first update after sampling here.
        - TRL computes ``a[t]`` from the log-probs of the engine that sampled, if the engine reports them. This is
          ``credit.distilled(of="rollout_log_probs")`` inside ``ahead_weighted``.
        - TRL raises an error where the teacher's log-prob is missing (NaN). Here the advantages of the row become NaN.
    """
    return Objective(
        ahead_weighted(credit.distilled(), gamma),
        clip=clip.ppo(clip_low, clip_high, clip_cap),
        aggregation=aggregation.token_mean(),
    )
