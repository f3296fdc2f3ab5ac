"""The optimizer of a model that learns beside the policy: of the critic, or of a reward model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tokcredit.train.ranks import Ranks
from tokcredit.train.settings import OptimizerSettings


class SideOptimizer:
    """Updates a model beside the policy, in every process alike. What of it requires gradients is trained.

    Args:
        model: The model.
        lr: Learning rate, which has no schedule.
        settings: Settings of the policy's optimizer, whose weight decay and limit of the gradient norm it has too.
        ranks: The processes.
    """

    def __init__(self, model: nn.Module, lr: float, settings: OptimizerSettings, ranks: Ranks) -> None:
        self._model, self._ranks, self._limit = model, ranks, settings.max_grad_norm
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        parameters = list(self._trained.values())
        self._optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=settings.weight_decay, fused=True)

    def clip(self) -> float:
        """Average the gradients over the processes, scale them down to the limit, and return their norm before that."""
        self._ranks.average_gradients(self._model)
        return float(nn.utils.clip_grad_norm_(self._trained.values(), self._limit))

    def step(self) -> None:
        """Update the model."""
        self._optimizer.step()

    def forget(self) -> None:
        """Forget the gradients."""
        self._optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Return the weights that are trained, and the state of the optimizer, for a checkpoint."""
        weights = {name: p.detach() for name, p in self._trained.items()}
        return {"weights": weights, "optimizer": self._optimizer.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state of a checkpoint.

        Args:
            state: From :meth:`state_dict`.
        """
        for name, p in self._trained.items():
            p.copy_(state["weights"][name])
        self._optimizer.load_state_dict(state["optimizer"])
