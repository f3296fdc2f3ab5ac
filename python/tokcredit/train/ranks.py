"""Processes that train one model together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

T = TypeVar("T")


class Ranks:
    """What the processes of a run tell each other."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.index, self.count = accelerator.process_index, accelerator.num_processes

    def sum(self, numbers: Mapping[str, Tensor]) -> dict[str, float]:
        """Of each number over all processes."""
        return self._reduced(numbers, "sum")

    def mean(self, numbers: Mapping[str, Tensor]) -> dict[str, float]:
        """Of each number over all processes."""
        return self._reduced(numbers, "mean")

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in some process."""
        return self.sum({"flag": torch.tensor(float(flag))})["flag"] > 0

    def gather(self, objects: list[T]) -> list[T]:
        """Those of all processes, one process after another; all call it."""
        return list(gather_object(objects)) if self.count > 1 else objects

    def average_gradients(self, model: Any) -> None:
        """Makes the gradients of all processes their mean.

        Processes skip rows without credit, so their backward passes differ in number: one average after the last fits
        all of them.
        """
        if self.count == 1:
            return
        for parameter in model.parameters():
            if parameter.requires_grad:
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self._accelerator.reduce(grad, "mean")

    def _reduced(self, numbers: Mapping[str, Tensor], how: str) -> dict[str, float]:
        if not numbers:
            return {}
        stacked = torch.stack([x.detach().double().cpu() for x in numbers.values()])
        if self.count > 1:
            stacked = self._accelerator.reduce(stacked.to(self._accelerator.device), how)
        return dict(zip(numbers, stacked.tolist(), strict=True))
