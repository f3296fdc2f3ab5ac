"""Direct Preference Optimization with critical tokens from contrastive estimation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokcredit.arguments import float_tensor
from tokcredit.blocks import log_probs
from tokcredit.preference import Preference
from tokcredit.rollouts import Rollouts
from tokcredit.stages.base import input_name
from tokcredit.stages.credit.group import per_token
from tokcredit.stages.link import logistic
from tokcredit.stages.token_weights import TokenWeight


@torch.no_grad()
def contrastive_log_probs(positive: Tensor, negative: Tensor, tokens: Tensor, strength: float = 1.0) -> Tensor:
    """Return the ``contrastive_log_probs`` of tokens: ``log_softmax((1 + strength) * positive - strength * negative)``.

    Args:
        positive: float ``(..., V)``, logits of the model that was trained on right solutions.
        negative: float ``(..., V)``, logits of the model that was trained on wrong ones.
        tokens: Integers ``(...)``; negative ones have a log-prob of 0.
        strength: Strength of the contrast, at least 0: the paper's beta. With 0 these are log-probs of the first model.

    Returns:
        ``(...)``, float32, or float64 for float64 logits.

    Raises:
        ValueError: The shapes differ, the vocabularies among them.
    """
    if float_tensor("positive", positive).shape != float_tensor("negative", negative).shape:
        raise ValueError(f"negative: expected {list(positive.shape)}, got {list(negative.shape)}")
    wide = torch.promote_types(torch.promote_types(positive.dtype, negative.dtype), torch.float32)
    return log_probs.from_logits((1 + strength) * positive.to(wide) - strength * negative.to(wide), tokens)


@dataclass(frozen=True)
class critical(TokenWeight):
    """``1 - s`` in rejected rows, where s is the probability of the token under a contrasted policy; 1 in chosen rows.

    Args:
        of: Input with ``log s``.
    """

    of: str = input_name("contrastive_log_probs")

    @property
    def required_inputs(self) -> frozenset[str]:
        """The input with ``log s``."""
        return frozenset({self.of})

    def __call__(self, batch: Rollouts, advantages: Tensor) -> Tensor:
        weights = -batch.input(self.of).expm1()
        return torch.where(per_token(advantages, batch.spans) < 0, weights, 1)


def cdpo(beta: float = 1.0) -> Preference:
    """cDPO: DPO that pushes down the critical tokens of a wrong solution and leaves the others.

    A token of the rejected response is critical where a model of right solutions finds it less probable than a model of
    wrong ones. With ``log s`` the ``contrastive_log_probs`` of a token under both::

        log s = log_softmax((1 + b) * z_positive - b * z_negative)[token]          with b = 1
        S = sum over the tokens of a response of w * (log p - log p_ref);  w = 1 - s if it is rejected, else 1
        loss = mean over pairs of -log sigmoid(beta * (S[chosen] - S[rejected]))

    Args:
        beta: Strength of the preference, above 0: the paper's gamma.

    Cost: DPO, and the log-probs of two more models on the rejected responses.
    References: arXiv 2411.19943.
    Differences from the paper:
        - None known.
    Differences from the released code:
        - The release applies the loss to each position, the k-th chosen with the k-th rejected token, and averages over
          the padded length, with a beta of 0.1. This is the paper's loss of whole responses.
    """
    return Preference((critical(),), link=logistic(beta))
