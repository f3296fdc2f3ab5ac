"""Direct Preference Optimization."""

from __future__ import annotations

from tokcredit.preference import Preference
from tokcredit.stages.link import logistic
from tokcredit.stages.token_weights import TokenWeight


def dpo(beta: float = 0.1, label_smoothing: float = 0.0, token_weights: tuple[TokenWeight, ...] = ()) -> Preference:
    """DPO: raise the log-ratio of the chosen row to the reference policy above that of the rejected row.

    With ``S`` the sum over a row's tokens of ``log p - log p_ref``::

        loss = mean over pairs of -log sigmoid(beta * (S[chosen] - S[rejected]))

    Args:
        beta: Strength of the preference, above 0.
        label_smoothing: Assumed share of wrong labels e, at least 0 and below 0.5: the loss is then
            ``-(1 - e) log sigmoid(z) - e log sigmoid(-z)``.
        token_weights: Factors of the tokens in ``S``, none by default.

    Cost: Two rows per pair, and log-probs of the reference policy.
    References: Rafailov et al., arXiv 2305.18290. Label smoothing: conservative DPO, arXiv 2305.18290 (released code).
    Differences from the released code:
        - Token weights, which the paper does not have.
    """
    return Preference(tuple(token_weights), link=logistic(beta, label_smoothing=label_smoothing))
