"""Generalised knowledge distillation: imitation of a teacher's distributions on the student's own responses."""

from __future__ import annotations

from tokcredit.supervised import Divergence, Supervised, js


def gkd(token_loss: Divergence | None = None) -> Supervised:
    """GKD, on-policy distillation: the divergence between student and teacher at every token of a response.

    With p the student, q the teacher and ``m = share * q + (1 - share) * p``::

        loss = mean over all tokens of share * KL(q || m) + (1 - share) * KL(p || m)

    Responses come from the student, from a data set, or some from each; there is no gradient through sampling. ``loss``
    is given the divergences with their gradient: ``objective.token_loss(student_logits, teacher_logits)``.

    Args:
        token_loss: The divergence: ``supervised.js(share)``, ``supervised.forward_kl()`` or
            ``supervised.reverse_kl()``.
            None takes the Jensen-Shannon divergence with a share of 0.5.

    Cost: No groups and no rewards; a forward pass of the teacher over the responses.
    References: arXiv 2306.13649.
    Differences from the paper:
        - The share of responses that come from a data set is the caller's choice; the paper's lambda is not a setting.
    Differences from the released code:
        - In TRL a ``beta`` of 0 is the forward and 1 the reverse KL divergence. Here these are
          ``supervised.forward_kl()`` and ``supervised.reverse_kl()``.
    """
    return Supervised(js(0.5) if token_loss is None else token_loss)
