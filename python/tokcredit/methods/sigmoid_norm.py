"""Direct Preference Optimization of means over tokens."""

from __future__ import annotations

from tokcredit.preference import Preference
from tokcredit.stages.link import logistic
from tokcredit.stages.pair import Transform
from tokcredit.stages.token_weights import TokenWeight


def sigmoid_norm(
    beta: float = 0.1, token_weights: tuple[TokenWeight, ...] = (), transform: Transform | None = None
) -> Preference:
    """Length-normalised DPO: the mean log-ratio per token of the chosen response is raised above that of the rejected.

    With ``w`` the token weights, 1 by default::

        S = sum over the tokens of a response of w * (log p - log p_ref)
        z = beta * (S[chosen] / tokens[chosen] - S[rejected] / tokens[rejected])
        loss = mean over pairs of -log sigmoid(z)

    Args:
        beta: Strength of the preference, above 0.
        token_weights: Factors of the tokens in ``S``.
        transform: Transform of ``S`` before it is divided by the length, or None.

    Cost: The same as DPO.
    References: TRL's ``sigmoid_norm``; arXiv 2411.15124 (Tulu 3) trains with it.
    Differences from the paper:
        - A response without tokens has a mean of 0.
    Differences from the released code:
        - None known. TRL counts completion tokens before the causal shift, the same number if there is a prompt.
    """
    return Preference(token_weights, normalization="mean", link=logistic(beta), transform=transform)
