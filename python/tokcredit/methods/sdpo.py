"""Self-distillation: the teacher is the policy itself, told a successful attempt or the environment's feedback."""

from __future__ import annotations

from tokcredit.stages import filters, scale
from tokcredit.supervised import Divergence, Supervised, js


def sdpo(token_loss: Divergence | None = None, ratio_cap: float = 2.0) -> Supervised:
    """SDPO: the teacher is the policy itself, whose prompt also has a successful attempt of the group, or feedback.

    With p the student, q the teacher, ``rho = p / p_old`` of the sampled token, and ``sg`` the stop-gradient::

        w = sg(min(rho, ratio_cap))
        loss = mean over all tokens of w * JS(p, sg(q))

    The divergence compares the student's 100 most likely tokens, and all others as one outcome. Rows whose
    teacher is told nothing, False in the input ``teacher_mask``, do not train. ``loss`` is given the divergences with
    their gradient, ``objective.token_loss(student_logits, teacher_logits)``, and the log-probs by name:
    ``loss(prepared, divergences, log_probs=...)``.

    Args:
        token_loss: The divergence; None takes ``supervised.js(0.5, top_k=100)``. The authors' setting for feedback on
            code is ``supervised.reverse_kl(top_k=20)``.
        ratio_cap: Largest factor of a token, above 0.

    Cost: No groups; a forward pass of the policy under the longer prompt. Rewards only choose what the teacher is told.
    References: arXiv 2601.20802.
    Differences from the paper:
        - The teacher's weights are the caller's choice; the authors average the policy's over the steps, at a rate of
          0.05.
    Differences from the released code:
        - Tokens that the policy did not choose stay visible to the teacher. The release hides them.
        - The weight ``min(p_old / p_engine, 2)`` is not applied; ``tc.mix("sdpo", token_weights="tis()")`` applies it.
        - The loss on sampled tokens alone is ``tc.mix("sdpo", token_loss="nll()", scales=("teacher_log_ratio()",
          "truncated_ratio()"))``.
        - The trust-region teacher, a mixture of the logits of the initial and the current policy, is left out.
    """
    return Supervised(
        js(0.5, top_k=100) if token_loss is None else token_loss,
        filters=(filters.marked("teacher_mask"),),
        scales=(scale.truncated_ratio(ratio_cap),),
    )
