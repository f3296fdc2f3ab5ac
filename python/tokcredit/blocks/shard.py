"""Tensor parallelism: the output layer whose weight is divided by ids of the vocabulary among processes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from tokcredit import ops
from tokcredit.arguments import float_tensor, whole_number


@dataclass(frozen=True, eq=False)
class Shard:
    """Which rows of an output layer's weight each process of a group has.

    The rows of the first process belong to the first ids, those of the second to the next ids, and so on.

    Args:
        sizes: Rows of the weight of each process, in order of the ids. They may differ.
        group: The processes; None for all.
        sums_hidden: Whether each process gets the whole gradient of the hidden states. With False it gets the part from
            its own ids. Use this where the operation before sums the parts, as Megatron's gather does with sequence
            parallelism.

    Raises:
        RuntimeError: ``torch.distributed`` is not initialized.
        ValueError: There is not one size per process, or this process is not in the group.
    """

    sizes: tuple[int, ...]
    group: dist.ProcessGroup | None = None
    sums_hidden: bool = True

    def __post_init__(self) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("group: expected torch.distributed to be initialized, and it is not")
        object.__setattr__(self, "sizes", tuple(whole_number("sizes", size) for size in self.sizes))
        if self.rank < 0:
            raise ValueError("group: expected one with this process, got one without it")
        if len(self.sizes) != dist.get_world_size(self.group):
            raise ValueError(f"sizes: expected {dist.get_world_size(self.group)}, one per process, got {self.sizes}")

    @classmethod
    def of(cls, weight: Tensor, group: dist.ProcessGroup | None = None, sums_hidden: bool = True) -> Shard:
        """Return the shard of a weight. All processes of the group call this; it waits for their sizes.

        Args:
            weight: float ``[V_k, d]``, the rows that this process has.
            group: The processes; None for all.
            sums_hidden: As in the class.
        """
        own = torch.tensor([float_tensor("weight", weight).shape[0]], device=weight.device)
        sizes = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(sizes, own, group=group)
        return cls(tuple(int(size) for size in sizes), group, sums_hidden)

    @property
    def rank(self) -> int:
        """Number of this process in the group."""
        return dist.get_rank(self.group)

    @property
    def first(self) -> int:
        """Id of the first row of the weight of this process."""
        return sum(self.sizes[: self.rank])

    def ids(self, vocabulary: int) -> int:
        """Return how many of the first ids this process has.

        Args:
            vocabulary: Number of ids.
        """
        return min(max(vocabulary - self.first, 0), self.sizes[self.rank])

    def most_ids(self, vocabulary: int) -> int:
        """Return how many of the first ids a process has at most. Tiles have this size, so that all have as many.

        Args:
            vocabulary: Number of ids.
        """
        return min(max(self.sizes), vocabulary)

    def statistics(self, z: Tensor, rows: ops.LogitRows, vocabulary: int, squares: bool) -> ops.LogitSums:
        """Return log-probs, entropies and the further results over all ids. All processes call this together.

        Five numbers per position are exchanged, and one more for each chosen id.

        Args:
            z: float ``[m, V_k]``, logits of the ids of this process.
            rows: What is read beside them; its ids are those of the whole vocabulary.
            vocabulary: Number of ids of all processes.
            squares: Whether sums of squared probabilities are wanted.

        Raises:
            ValueError: On the CPU an id is out of range.
        """
        state = ops.logits_state(z, rows, min(self.first, vocabulary), vocabulary)
        states = [torch.empty_like(state) for _ in self.sizes]
        dist.all_gather(states, state, group=self.group)
        found = ops.sums_of_state(ops.joined_states(torch.stack(states)), rows, z.dtype)
        return found if squares else found._replace(squares=None)

    def sum_(self, hidden: Tensor) -> None:
        """Add up the gradient of the hidden states over the processes, in place, if ``sums_hidden``.

        Args:
            hidden: The part of it from the ids of this shard.
        """
        if self.sums_hidden:
            dist.all_reduce(hidden, group=self.group)
