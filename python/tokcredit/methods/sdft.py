"""Self-distillation from demonstrations: the teacher is the policy itself, shown an expert's answer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokcredit.blocks import scan
from tokcredit.rollouts import Rollouts
from tokcredit.stages import aggregation, filters
from tokcredit.stages.base import whole_number
from tokcredit.stages.token_weights import TokenWeight
from tokcredit.supervised import Divergence, Supervised, forward_kl


@dataclass(frozen=True)
class after(TokenWeight):
    """0 at the first tokens of each row, 1 at the others. Denominators count all of them.

    Args:
        skip: Number of tokens with weight 0, at least 0.
    """

    skip: int = whole_number(3, at_least=0)

    def __call__(self, batch: Rollouts, advantages: Tensor) -> Tensor:
        return (scan.positions(batch.spans) > self.skip).to(advantages.dtype)


def sdft(token_loss: Divergence | None = None, skip: int = 3) -> Supervised:
    """SDFT: the policy, given a question, imitates itself with an expert's demonstration in the prompt.

    With p the student and q the teacher::

        loss = mean over rows of the mean over tokens of KL(q || p), 0 at the first ``skip`` tokens

    Rows without a demonstration, False in the input ``teacher_mask``, do not train. ``loss`` is given the divergences
    with their gradient: ``objective.token_loss(student_logits, teacher_logits)``.

    Args:
        token_loss: The divergence; None takes ``supervised.forward_kl()``, that of the released code.
        skip: Number of tokens at the start of each response that do not train, at least 0.

    Cost: No groups and no rewards; a forward pass of the policy under the longer prompt.
    References: arXiv 2601.19897.
    Differences from the paper:
        - The paper has ``KL(p || q)``: pass ``supervised.reverse_kl()``.
        - The teacher's weights are the caller's choice; the authors average the policy's over the steps.
    Differences from the released code:
        - Tokens that are skipped stay in the denominator. The release divides by the number of other tokens.
        - The weight ``mean over the row of min(p_old / p_engine, 2)`` is not applied; ``tc.mix("sdft",
          token_weights="tis()")`` corrects each token.
    """
    return Supervised(
        forward_kl() if token_loss is None else token_loss,
        filters=(filters.marked("teacher_mask"),),
        token_weights=(after(skip),),
        aggregation=aggregation.sequence_mean(),
    )
