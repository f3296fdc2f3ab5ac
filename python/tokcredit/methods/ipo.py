"""Identity Preference Optimization."""

from __future__ import annotations

from tokcredit.preference import Preference
from tokcredit.stages.link import squared
from tokcredit.stages.pair import Transform
from tokcredit.stages.token_weights import TokenWeight


def ipo(
    beta: float = 0.1,
    mean: bool = True,
    token_weights: tuple[TokenWeight, ...] = (),
    transform: Transform | None = None,
) -> Preference:
    """IPO: the difference of the log-ratios of chosen and rejected response is regressed to ``1 / (2 beta)``.

    With ``w`` the token weights, 1 by default::

        S = mean over the tokens of a response of w * (log p - log p_ref)       # the sum, if not mean
        loss = mean over pairs of (S[chosen] - S[rejected] - 1 / (2 * beta))^2

    Args:
        beta: Strength of the regularization, above 0; the paper's tau.
        mean: Whether ``S`` is a mean over tokens, as in TRL, or the sum.
        token_weights: Factors of the tokens in ``S``.
        transform: Transform of the sum over the tokens, or None.

    Cost: The same as DPO.
    References: Azar et al., arXiv 2310.12036.
    Differences from the paper:
        - ``S`` is a mean over tokens, as its authors confirmed to TRL; the paper writes the sum, ``mean=False``.
        - Token weights are an addition.
        - A response without tokens has ``S = 0``.
    Differences from the released code:
        - None known.
    """
    return Preference(token_weights, normalization="mean" if mean else "sum", link=squared(beta), transform=transform)
