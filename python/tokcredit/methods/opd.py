"""On-policy distillation with the teacher's log-prob of each sampled token as its advantage."""

from __future__ import annotations

from tokcredit.objective import Objective
from tokcredit.stages import aggregation, clip, credit


def opd(coefficient: float = 1.0, discount: float = 0.0) -> Objective:
    """OPD: each token's advantage is how much more likely the teacher finds it than the policy that sampled it.

    With ``q`` the importance ratio::

        A[t] = coefficient * (log p_teacher[t] - log p_old[t]), plus the discounted sum of those of later tokens
        loss = mean over all tokens of -A * q

    The expected gradient is that of ``KL(policy || teacher)``. The teacher's credit is added to any other with
    ``credit.sum``, for example ``tc.mix("grpo", credit=tc.credit.sum(tc.credit.group_normalized(),
    tc.credit.distilled()))``.

    Args:
        coefficient: Factor of the advantages; may be a schedule.
        discount: Factor by which the log-ratio of each later token counts too, from 0 to 1; may be a schedule.

    Cost: No groups and no rewards; log-probs of the sampled tokens under the teacher.
    References: arXiv 2306.13649 for the setting; the advantage is that of Thinking Machines' "On-Policy Distillation".
    Differences from the paper:
        - None known; there are numbers of the authors' code only.
    Differences from the released code:
        - A token at which the teacher's log-prob is missing (NaN) makes loss and gradient NaN. Tinker's code puts 0.
    """
    return Objective(
        credit.distilled(coefficient, discount), clip=clip.unclipped(), aggregation=aggregation.token_mean()
    )
