"""M2PO: second-moment trust policy optimization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.blocks import select
from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts
from tokcredit.stages import aggregation, clip, ratio
from tokcredit.stages.base import InputName, flag, input_name, number
from tokcredit.stages.token_weights import TokenWeight
from tokcredit.stages.within import log_ratio


@dataclass(frozen=True)
class second_moment(TokenWeight):
    """0 at the tokens with the largest squared log-ratio, so that the mean square of the others is within a budget.

    Only tokens whose log-ratio has the sign of their advantage compete, and only they are dropped::

        x = log p_old - log p_behaviour;   v = sorted x^2 of the tokens with A * x > 0
        dropped: v[k], v[k + 1], ...  with k the smallest number for which mean(v[0], ..., v[k]) > budget

    Args:
        budget: Largest mean square of the log-ratios that remain, above 0.
        every_token: Whether all tokens compete, whatever their advantage; at least one is kept. AReaL has this rule,
            with a mean square below the budget, and leaves dropped tokens out of denominators.
        of: Input with the log-probs of the trainer.
        to: Input with the log-probs that made the data.
    """

    budget: float = number(0.04, above=0, scheduled=True)
    every_token: bool = flag(False)
    of: str = input_name("old_log_probs")
    to: str = input_name("rollout_log_probs")
    whole_batch: ClassVar[bool] = True

    @property
    def required_inputs(self) -> frozenset[str]:
        """The two inputs that are compared."""
        return frozenset({self.of, self.to})

    def __call__(self, batch: Rollouts, advantages: Tensor) -> Tensor:
        x = log_ratio(batch.input(self.of), batch.input(self.to))
        competes = batch.response_mask
        sign = advantages.sign()
        if not self.every_token and sign.dim() == 1:
            competes = competes & (x * sign > 0)
        elif not self.every_token:
            competes = ops.row_between(x, sign[:, 0], torch.zeros_like(sign[:, 0]), batch.spans, low=0.0)
        competing = batch.spans.with_mask(competes)
        kept = select.within_mean(x.square(), self.budget, competing, least=int(self.every_token))
        remaining = batch.spans.with_mask(kept.logical_xor_(competes).logical_not_())
        weights = ops.spread(torch.ones_like(remaining.begin, dtype=x.dtype), remaining)
        return weights.add_(x.clamp(-1, 1).mul_(0))  # NaN where the log-ratio is


def m2po(budget: float = 0.04, every_token: bool = False, of: InputName = "old_log_probs") -> Objective:
    """M2PO: GRPO on stale rollouts that drops the few tokens whose squared log-ratios are largest, and clips nothing.

    With ``x = log p_old - log p_behaviour``, ``q = p / p_behaviour`` and ``A`` the advantage of GRPO::

        harmful = A * x > 0
        loss = mean over all tokens, with 0 for dropped ones, of -A * q

    The harmful tokens with the largest ``x^2`` are dropped until the mean of ``x^2`` over the other harmful tokens is
    at most ``budget``.

    Args:
        budget: Largest mean square of the log-ratios of the harmful tokens that remain.
        every_token: Whether all tokens compete, whatever their advantage, as in AReaL.
        of: Input with the log-probs that are compared with the behaviour policy's.

    Cost: GRPO plus one selection per batch.
    References: arXiv 2510.01161.
    Differences from the paper:
        - Tokens are dropped once per batch, by the policy that the update starts from, so that the result does not
          depend on how the batch is cut into micro-batches. The paper compares the current policy.
    Differences from the released code:
        - The release turns the budget into the bounds of a clipped loss. Here tokens are dropped, which is the rule of
          the final paper as Trinity-RFT has it.
    """
    return Objective(
        token_weights=(second_moment(budget, every_token, of),),
        ratio=ratio.token(to="rollout_log_probs"),
        clip=clip.unclipped(),
        aggregation=aggregation.token_mean(),
    )
