"""Communication between the processes that train one model together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from tokcredit.rollouts import FIELDS, Rollouts

T = TypeVar("T")


class Ranks:
    """The processes of a run.

    Args:
        accelerator: Accelerator that connects them.

    Attributes:
        index: Number of this process, from 0.
        count: Number of processes.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.index, self.count = accelerator.process_index, accelerator.num_processes

    def sum(self, numbers: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the sum of each number over all processes.

        Args:
            numbers: 0-d tensors by name, the same names in every process.
        """
        return self._reduced(numbers, "sum")

    def mean(self, numbers: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the mean of each number over all processes.

        Args:
            numbers: 0-d tensors by name, the same names in every process.
        """
        return self._reduced(numbers, "mean")

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in some process.

        Args:
            flag: Flag of this process.
        """
        return self.sum({"flag": torch.tensor(float(flag))})["flag"] > 0

    def exchange(self, objects: list[T]) -> list[T]:
        """Return the objects of all processes, in the order of the processes. All processes must call it.

        Args:
            objects: Objects of this process, which must pickle.
        """
        return list(gather_object(objects)) if self.count > 1 else objects

    def average_gradients(self, model: Any) -> None:
        """Replace the gradients by their mean over all processes.

        Processes skip rows without gradient, so they differ in the number of backward passes. One average after the
        last backward pass is right for all of them.

        Args:
            model: Module whose parameters have the gradients.
        """
        if self.count == 1:
            return
        for parameter in model.parameters():
            if parameter.requires_grad:
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self._accelerator.reduce(grad, "mean")

    def gather(self, batch: Rollouts, names: frozenset[str]) -> tuple[Rollouts, Tensor]:
        """Return the rollouts of all processes, and which of their rows are those of this process.

        Args:
            batch: Rollouts of this process, packed.
            names: Names of the inputs to gather with them.

        Returns:
            The rollouts, and int64 ``[R]`` on the host.
        """
        if self.count == 1:
            return batch, torch.arange(batch.num_rows)
        columns = {"tokens", "group_ids", "rewards", "response_mask", *names & set(FIELDS)}
        own = {name: getattr(batch, name).cpu() for name in columns}
        own |= {name: batch.input(name).cpu() for name in names - set(FIELDS)}
        parts = gather_object([own | {"lengths": (batch.end - batch.begin).cpu()}])
        whole: dict[str, Any] = {name: torch.cat([part[name] for part in parts]).to(batch.device) for name in parts[0]}
        lengths = whole.pop("lengths")
        before = sum(len(part["rewards"]) for part in parts[: self.index])
        together = Rollouts(
            cu_seqlens=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
            **{name: whole[name] for name in columns},
            extras={name: whole[name] for name in names - set(FIELDS)},
        )
        return together, torch.arange(before, before + batch.num_rows)

    def _reduced(self, numbers: Mapping[str, Tensor], how: str) -> dict[str, float]:
        if not numbers:
            return {}
        stacked = torch.stack([x.detach().double().cpu() for x in numbers.values()])
        if self.count > 1:
            stacked = self._accelerator.reduce(stacked.to(self._accelerator.device), how)
        return dict(zip(numbers, stacked.tolist(), strict=True))
