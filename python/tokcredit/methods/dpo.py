"""Direct Preference Optimization."""

from __future__ import annotations

from tokcredit.preference import Preference
from tokcredit.stages.link import logistic
from tokcredit.stages.pair import Transform
from tokcredit.stages.token_weights import TokenWeight


def dpo(
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    token_weights: tuple[TokenWeight, ...] = (),
    transform: Transform | None = None,
) -> Preference:
    """DPO: the log-ratio of the chosen response to the reference policy is raised above that of the rejected one.

    With ``w`` the token weights, 1 by default, and ``e`` the label smoothing::

        S = sum over the tokens of a response of w * (log p - log p_ref)
        z = beta * (S[chosen] - S[rejected])
        loss = mean over pairs of -(1 - e) * log sigmoid(z) - e * log sigmoid(-z)

    Args:
        beta: Strength of the preference, above 0.
        label_smoothing: Assumed share of wrong labels, at least 0 and below 0.5. Above 0 it is conservative DPO.
        token_weights: Factors of the tokens in ``S``.
        transform: Transform of ``S``, for example ``pair.f_divergence("js")`` for f-DPO, or None.

    Cost: Two rows per pair, and log-probs of the reference policy.
    References: Rafailov et al., arXiv 2305.18290; f-DPO, arXiv 2309.16240.
    Differences from the paper:
        - Token weights are an addition.
    Differences from the released code:
        - None known. In TRL ``label_smoothing`` has no effect on the ``sigmoid`` loss; its ``robust`` loss is
          ``link.robust``.
    """
    return Preference(token_weights, link=logistic(beta, label_smoothing=label_smoothing), transform=transform)
