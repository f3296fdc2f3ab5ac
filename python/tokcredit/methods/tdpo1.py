"""Token-level Direct Preference Optimization, first form."""

from __future__ import annotations

from tokcredit.preference import Preference
from tokcredit.stages.link import logistic
from tokcredit.stages.pair import sequential_kl


def tdpo1(beta: float = 0.1) -> Preference:
    """TDPO1: DPO whose margin counts the divergence of the policy from the reference at every token.

    With ``S`` the log-ratio of a response and ``K`` its sequential divergence::

        S = sum over the tokens of a response of log p - log p_ref
        K = sum over the tokens of a response of KL(reference || policy)
        z = beta * (S[chosen] - S[rejected] - (K[rejected] - K[chosen]))
        loss = mean over pairs of -log sigmoid(z)

    The gradient of the divergences cancels that of the policy's own probabilities: at each token it is
    ``1[v = token] - p_ref(v)``, times a factor of the pair.

    Args:
        beta: Strength of the preference, above 0.

    Cost: DPO, and the logits of policy and reference policy instead of log-probs; ``loss`` takes ``ref_forward_kl``.
    References: Zeng et al., arXiv 2404.11999.
    Differences from the paper:
        - None known.
    Differences from the released code:
        - The divergence is computed from log-sums; the release forms ``log(softmax(z))``, which underflows.
    """
    return Preference(link=logistic(beta), divergence=sequential_kl())
