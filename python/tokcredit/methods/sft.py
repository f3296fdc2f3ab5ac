"""Supervised fine-tuning."""

from __future__ import annotations

from tokcredit.stages import aggregation
from tokcredit.supervised import Supervised, nll


def sft() -> Supervised:
    """SFT: the mean negative log-likelihood of the tokens of the batch.

    ``loss = -mean over tokens of log_probs``. Rewards and groups are not read.

    Cost: One forward and one backward pass.
    References: None; it is the common baseline.
    Differences from the released code:
        - None.
    """
    return Supervised(nll(), aggregation=aggregation.token_mean())
