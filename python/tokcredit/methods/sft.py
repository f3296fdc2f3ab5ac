"""Supervised fine-tuning."""

from __future__ import annotations

from tokcredit.stages import aggregation
from tokcredit.stages.token_weights import TokenWeight
from tokcredit.supervised import Supervised, nll


def sft(token_weights: tuple[TokenWeight, ...] = ()) -> Supervised:
    """SFT: the mean negative log-likelihood of the tokens of the batch.

    With ``w`` the token weights, 1 by default::

        loss = mean over all tokens of -w * log p

    Rewards and groups are not read.

    Args:
        token_weights: Factors of the token losses. They do not change the denominator.

    Cost: One forward and one backward pass.
    References: None; it is the common baseline.
    Differences from the paper:
        - None known.
    """
    return Supervised(nll(), token_weights=token_weights, aggregation=aggregation.token_mean())
