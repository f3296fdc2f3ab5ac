"""The critic: values of the states before tokens, learned beside the policy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tokcredit.rollouts import Rollouts
from tokcredit.train.policy import another
from tokcredit.train.ranks import Ranks
from tokcredit.train.settings import Settings


class Critic(nn.Module):
    """A linear layer on final hidden states, of the policy or of a model of its own. First its values are 0.

    Args:
        width: Size d of the hidden states.
        model: Causal language model whose hidden states it reads, or None for those of the policy.

    Attributes:
        model: That model or None. What of it requires gradients is trained.
        head: The linear layer.
    """

    def __init__(self, width: int, model: Any = None) -> None:
        super().__init__()
        self.model, self.head = model, nn.Linear(width, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the value of each hidden state, in float32.

        Args:
            hidden_states: float ``[Q, d]``.

        Returns:
            float ``[Q]``.
        """
        with torch.autocast(hidden_states.device.type, enabled=False):
            values: Tensor = self.head(hidden_states.to(self.head.weight.dtype))[:, 0]
        return values


def made(settings: Settings, policy: Any, tokenizer: Any) -> Critic | None:
    """Return the critic that the setting ``critic`` says, or None without it.

    With an adapter a model of its own has the same adapter, and only that is trained of it.

    Args:
        settings: Settings of the run.
        policy: The policy before the first step, on its device.
        tokenizer: Tokenizer of the policy.

    Raises:
        ValueError: There is no such model, or it has other tokens.
    """
    text = settings.critic.critic
    if text is None:
        return None
    own = None if text == "head" else another("critic", text, settings, policy, tokenizer)
    if own is not None:
        _freeze_output_layer(own)
    width = (policy if own is None else own).config.get_text_config().hidden_size
    return Critic(width, own).to(policy.device)


def _freeze_output_layer(model: Any) -> None:
    """Exclude the output layer, which values do not pass, unless it is also the input layer."""
    layer = model.get_output_embeddings()
    if layer is not None and layer.weight is not model.get_input_embeddings().weight:
        layer.requires_grad_(False)


ROUNDING = 1e-10
"""Targets whose variance is at most this share of the mean square of targets and values differ by rounding only."""


def explained_variance(
    values: Tensor,
    targets: Tensor,
    mask: Tensor,
    total: Callable[[Mapping[str, Tensor]], Mapping[str, float | Tensor]] = dict,
) -> float:
    """Return the share of the variance of the targets that the values explain, ``1 - var(G - V) / var(G)``.

    It is 1 for values that are right up to a constant, 0 for a constant, and below 0 for values that are worse than a
    constant. It is NaN if the targets do not vary by more than rounding.

    Args:
        values: float ``[N]``, V.
        targets: float ``[N]``, G.
        mask: bool ``[N]``, tokens that count. What lies at others is not read.
        total: Adds up each of some numbers by name over the processes.
    """
    value, target = values[mask].double(), targets[mask].double()
    error = target - value
    sizes = {"count": mask.sum().double(), "size": target.square().sum() + value.square().sum()}
    sums = {name: float(x) for name, x in total({**sizes, "target": target.sum(), "error": error.sum()}).items()}
    count = max(sums["count"], 1.0)
    squares = {
        "target": (target - sums["target"] / count).square().sum(),
        "error": (error - sums["error"] / count).square().sum(),
    }
    spread = {name: float(x) for name, x in total(squares).items()}
    if not spread["target"] > ROUNDING * sums["size"]:
        return math.nan
    return 1 - spread["error"] / spread["target"]


def explained(batch: Rollouts, ranks: Ranks) -> float:
    """Return the explained variance of the critic before an update, over all processes.

    Args:
        batch: The rollouts of this process, with ``values`` and ``value_targets``.
        ranks: The processes.
    """
    values, targets = batch.input("values"), batch.input("value_targets")
    return explained_variance(values, targets, batch.response_mask, ranks.sum)
