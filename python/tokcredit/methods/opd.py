"""On-policy distillation with the teacher's log-prob of each sampled token as its advantage."""

from __future__ import annotations

from tokcredit.objective import Objective
from tokcredit.stages import aggregation, clip, credit


def opd(coefficient: float = 1.0, discount: float = 0.0) -> Objective:
    """OPD: the advantage of a token is the log-ratio of the teacher to the policy that sampled it.

    With ``q`` the importance ratio::

        A[t] = coefficient * sum over s >= t of discount^(s - t) * (log p_teacher[s] - log p_old[s])
        loss = mean over all tokens of -A * q

    With a discount of 0 only ``s = t`` counts. The expected gradient of the first update after sampling is then
    ``coefficient`` times that of ``KL(policy || teacher)`` of the next token, averaged over the tokens. The teacher's
    credit is added to any other with ``credit.sum``, for example ``tc.mix("grpo",
    credit=tc.credit.sum(tc.credit.group_normalized(), tc.credit.distilled()))``.

    Args:
        coefficient: Factor of the advantages; may be a schedule.
        discount: Factor by which the log-ratio of each later token counts too, from 0 to 1; may be a schedule.

    Cost: No groups and no rewards; log-probs of the sampled tokens under the teacher.
    References: arXiv 2306.13649 for the setting; the advantage is that of Thinking Machines' "On-Policy Distillation".
    Differences from the paper:
        - None known.
    Differences from the released code:
        - Tinker sums over the tokens. Here the loss is their mean.
        - SDPO, TRL and prime-rl also have a form whose A has the current policy in place of the old one:
          ``tc.mix("sft", scales=("teacher_log_ratio()", "truncated_ratio()"))``.
        - With a discount, Tinker's code counts tokens that the policy did not choose as steps. Here they are skipped.
        - A token at which the teacher's log-prob is missing (NaN) makes loss and gradient NaN.
    """
    return Objective(
        credit.distilled(coefficient, discount), clip=clip.unclipped(), aggregation=aggregation.token_mean()
    )
