"""Communication between the processes that train one model together."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
from torch import Tensor

from tokcredit.rollouts import FIELDS, Rollouts

T = TypeVar("T")

_PLUGINS = {"FSDP": "FSDP", "DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM"}
_PARALLEL = {"DP_SHARD": "FSDP", "TP": "tensor", "CP": "context", "SP": "sequence"}


def check_launch() -> None:
    """Check that the launcher asked for whole models in every process.

    The trainer averages gradients and copies weights itself, parameter by parameter, so a sharded model would be
    trained wrongly. Call it before anything else asks accelerate for its state.

    Raises:
        ValueError: A plugin of accelerate cuts the model into parts.
    """
    found = [name for key, name in _PLUGINS.items() if parse_flag_from_env(f"ACCELERATE_USE_{key}")]
    if parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG"):
        sizes = {name: os.environ.get(f"PARALLELISM_CONFIG_{key}_SIZE", "1") for key, name in _PARALLEL.items()}
        found += [f"{name} parallelism of size {size}" for name, size in sizes.items() if size != "1"]
    if found:
        raise ValueError(
            f"accelerate: expected a launch in which every process holds the whole model, got {', '.join(found)}; "
            "a model that outgrows one GPU is trained inside TRL or verl, with tokcredit.adapters.trl or "
            "tokcredit.adapters.verl"
        )


def processes() -> PartialState:
    """Return accelerate's state of the processes, which is made if it is missing.

    Raises:
        ValueError: The launcher started several processes, but accelerate found no way to connect them.
    """
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    count = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
    if state.num_processes < count:
        raise ValueError(
            f"accelerate: expected {count} connected processes as WORLD_SIZE says, got {state.num_processes}; "
            "set ACCELERATE_USE_CPU=true for processes without a GPU"
        )
    return state


def on_main(function: Callable[[], T]) -> T:
    """Call a function in the main process only; return its result, or raise its error, in all of them.

    Args:
        function: The function. Its result and its error must pickle.
    """
    state = processes()
    if state.num_processes == 1:
        return function()
    done: list[Any] = [None, None]
    if state.is_main_process:
        try:
            done = [function(), None]
        except Exception as error:
            done = [None, error]
    result, failed = broadcast_object_list(done)
    if failed is not None:
        raise failed
    return result


class Ranks:
    """The processes of a run.

    Args:
        accelerator: Accelerator that connects them.

    Attributes:
        index: Number of this process, from 0.
        count: Number of processes.
        device: Device of this process.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator, self.device = accelerator, accelerator.device
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

    def together(self, function: Callable[[], T]) -> T:
        """Call a function that exchanges nothing; return its result, or raise an error in all processes if one fails.

        A process that fails by itself would leave the others waiting for it. All processes must call it.

        Args:
            function: The function.

        Raises:
            RuntimeError: The function failed in other processes only. Where it failed, its own error is raised.
        """
        if self.count == 1:
            return function()
        results: list[T] = []
        failed: Exception | None = None
        try:
            results.append(function())
        except Exception as error:
            failed = error
        if self.any(failed is not None):
            texts = [] if failed is None else [f"process {self.index}: {type(failed).__name__}: {failed}"]
            others = "; ".join(self.exchange(texts))
            raise failed or RuntimeError(f"expected no error in any process, got {others}")
        return results[0]

    def on_main(self, function: Callable[[], T]) -> T | None:
        """Call a function in the main process only; return its result there, and None in the others.

        Unlike the function :func:`on_main`, its result need not pickle. All processes must call it.

        Args:
            function: The function, which exchanges nothing.

        Raises:
            RuntimeError: The function failed; in the main process its own error is raised.
        """
        return self.together(lambda: function() if self.index == 0 else None)

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
        names |= {name for name in ("token_rewards", "turn_ids", "context_keys") if batch.has_input(name)}
        columns = {"tokens", "group_ids", "rewards", "response_mask", *names & set(FIELDS)}
        columns |= {"trajectory_ids"} if batch.trajectory_ids is not None else set()
        own = {name: getattr(batch, name).cpu() for name in columns}
        own |= {name: batch.input(name).cpu() for name in names - set(FIELDS)}
        parts = gather_object([own | {"lengths": (batch.end - batch.begin).cpu()}])
        whole: dict[str, Any] = {name: torch.cat([part[name] for part in parts]).to(batch.device) for name in parts[0]}
        lengths = whole.pop("lengths")
        before = sum(len(part["rewards"]) for part in parts[: self.index])
        # Rewards of tokens were told apart from outcomes already, also where both have the same sum.
        dense = {name: whole.pop(name) for name in columns & {"token_rewards"}}
        together = Rollouts(
            cu_seqlens=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
            **{name: whole[name] for name in columns - set(dense)},
            extras={name: whole[name] for name in names - set(FIELDS)},
        ).with_inputs(**dense)
        return together, torch.arange(before, before + batch.num_rows)

    def _reduced(self, numbers: Mapping[str, Tensor], how: str) -> dict[str, float]:
        if not numbers:
            return {}
        stacked = torch.stack([x.detach().double().cpu() for x in numbers.values()])
        if self.count > 1:
            stacked = self._accelerator.reduce(stacked.to(self._accelerator.device), how)
        return dict(zip(numbers, stacked.tolist(), strict=True))
