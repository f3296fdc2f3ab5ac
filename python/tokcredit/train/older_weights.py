"""Weights of earlier steps, with which a policy samples as in asynchronous training."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class OlderWeights:
    """The weights that a model had at the last steps. It holds ``steps + 1`` copies of what is trained.

    Args:
        model: The model. What does not require a gradient now is not copied.
        steps: Number of steps by which the older weights are behind, at least 1.
    """

    def __init__(self, model: Any, steps: int) -> None:
        self._steps = steps
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._kept = deque[list[Tensor]]()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the model its older weights inside this context. Enter it once per step, before the update.

        In the first steps these are the weights of the first one.
        """
        if len(self._kept) > self._steps:
            self._kept.popleft()
        self._kept.append([p.detach().clone() for p in self._trained])
        self._give(self._kept[0])
        try:
            yield
        finally:
            self._give(self._kept[-1])

    @torch.no_grad()
    def _give(self, weights: Sequence[Tensor]) -> None:
        for p, x in zip(self._trained, weights, strict=True):
            p.copy_(x)

    def state_dict(self) -> dict[str, Any]:
        """Return the weights that later steps sample with, for a checkpoint."""
        return {"kept": list(self._kept)[-self._steps :]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the weights of a checkpoint.

        Args:
            state: From :meth:`state_dict`.
        """
        self._kept.clear()
        for weights in state["kept"]:
            self._kept.append([x.to(p.device) for x, p in zip(weights, self._trained, strict=True)])
