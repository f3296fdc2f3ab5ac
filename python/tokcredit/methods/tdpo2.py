"""Token-level Direct Preference Optimization, second form."""

from __future__ import annotations

from tokcredit.preference import Preference
from tokcredit.stages.link import logistic
from tokcredit.stages.pair import sequential_kl


def tdpo2(beta: float = 0.1, alpha: float = 0.5) -> Preference:
    """TDPO2: TDPO whose divergence has a weight, and no gradient for the chosen response.

    With ``S`` the log-ratio of a response, ``K`` its sequential divergence and ``sg`` a stop-gradient::

        S = sum over the tokens of a response of log p - log p_ref
        K = sum over the tokens of a response of KL(reference || policy)
        z = beta * (S[chosen] - S[rejected] - alpha * (K[rejected] - sg(K[chosen])))
        loss = mean over pairs of -log sigmoid(z)

    Args:
        beta: Strength of the preference, above 0.
        alpha: Weight of the divergence, at least 0. With 0 it is DPO.

    Cost: The same as TDPO1.
    References: Zeng et al., arXiv 2404.11999.
    Differences from the paper:
        - None known.
    Differences from the released code:
        - The divergence is computed from log-sums; the release forms ``log(softmax(z))``, which underflows.
    """
    return Preference(link=logistic(beta), divergence=sequential_kl(alpha, chosen_gradient=False))
