"""Processes that train one model together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from tokcredit.inputs import FIELDS
from tokcredit.rollouts import Rollouts

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

    def exchange(self, objects: list[T]) -> list[T]:
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

    def gather(self, batch: Rollouts, names: frozenset[str]) -> tuple[Rollouts, Tensor]:
        """The rollouts of all processes with this evidence, and which rows of them are this process's."""
        if self.count == 1:
            return batch, torch.arange(batch.num_rows, device=batch.tokens.device)
        columns = {"tokens", "group_ids", "rewards", "response_mask", *names & set(FIELDS)}
        own = {name: getattr(batch, name).cpu() for name in columns}
        own |= {name: batch.input(name).cpu() for name in names - set(FIELDS)}
        parts = gather_object([own | {"lengths": (batch.end - batch.begin).cpu()}])
        device = batch.tokens.device
        whole: dict[str, Any] = {name: torch.cat([part[name] for part in parts]).to(device) for name in parts[0]}
        lengths = whole.pop("lengths")
        before = sum(len(part["rewards"]) for part in parts[: self.index])
        together = Rollouts(
            cu_seqlens=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
            **{name: whole[name] for name in columns},
            extras={name: whole[name] for name in names - set(FIELDS)},
        )
        return together, torch.arange(before, before + batch.num_rows, device=device)

    def _reduced(self, numbers: Mapping[str, Tensor], how: str) -> dict[str, float]:
        if not numbers:
            return {}
        stacked = torch.stack([x.detach().double().cpu() for x in numbers.values()])
        if self.count > 1:
            stacked = self._accelerator.reduce(stacked.to(self._accelerator.device), how)
        return dict(zip(numbers, stacked.tolist(), strict=True))
