"""On-policy self-distillation: the teacher is the initial policy, shown the reference solution."""

from __future__ import annotations

from tokcredit.stages import filters
from tokcredit.supervised import Divergence, Supervised, forward_kl


def opsd(token_loss: Divergence | None = None) -> Supervised:
    """OPSD: the student imitates the initial policy, whose prompt also has the reference solution.

    With p the student and q the teacher::

        loss = mean over all tokens of KL(q || p)

    Rows without a solution, False in the input ``teacher_mask``, do not train. ``loss`` is given the divergences with
    their gradient: ``objective.token_loss(student_logits, teacher_logits)``.

    Args:
        token_loss: The divergence; None takes ``supervised.forward_kl()``, that of later releases. The first release
            has ``supervised.js(0.5)`` and divides the logits of both by a temperature of 1.1.
            ``supervised.forward_kl(cap=0.05)`` bounds the influence of each token.

    Cost: No groups and no rewards; a forward pass of the initial policy under the longer prompt.
    References: arXiv 2601.18734.
    Differences from the paper:
        - None known beside those of the code.
    Differences from the released code:
        - Later releases cap every element ``q * log(q / p)`` of the sum. What is left then lowers tokens that the
          teacher prefers, so a cap here is one of the whole divergence of a token.
    """
    return Supervised(forward_kl() if token_loss is None else token_loss, filters=(filters.marked("teacher_mask"),))
