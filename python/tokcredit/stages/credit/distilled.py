"""Credit from a teacher: how much more likely the teacher finds each token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokcredit.blocks import scan
from tokcredit.rollouts import Rollouts
from tokcredit.stages.base import input_name, number
from tokcredit.stages.credit.group import Credit


@dataclass(frozen=True)
class distilled(Credit):
    """The log-ratio of a teacher to the policy that sampled: ``coefficient * (log q - log p_old)`` of each token.

    With a discount of 0 the expected gradient of the first update after sampling is ``coefficient`` times that of
    ``KL(policy || teacher)`` of the next token. Rewards are not read, and nothing is normalised;
    ``tokcredit.credit.sum`` adds it to a credit of rewards. A token at which the teacher's log-prob is NaN gets an
    advantage of NaN.

    Args:
        coefficient: Factor of the advantages; may be a schedule or a controller.
        discount: Factor by which the log-ratio of each later token counts too: 0 for none, 1 for their sum.
        of: Input with the log-probs of the policy that sampled.
    """

    coefficient: float = number(1.0, scheduled=True)
    discount: float = number(0.0, at_least=0, at_most=1, scheduled=True)
    of: str = input_name("old_log_probs")

    @property
    def required_inputs(self) -> frozenset[str]:
        """``teacher_log_probs``, and the input that ``of`` names."""
        return frozenset({"teacher_log_probs", self.of})

    def __call__(self, batch: Rollouts) -> Tensor:
        found = batch.input("teacher_log_probs") - batch.input(self.of)
        if self.discount:
            found = scan.returns(found, batch.spans, self.discount)
        return torch.where(batch.response_mask, found * self.coefficient, 0)


__all__ = ["distilled"]
