"""A cache of keys and values whose rows join and leave while a model continues the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class RowLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one attention layer, in memory that holds further tokens, so that a token is written in place.

    ``keys`` and ``values`` are views of that memory, ``(rows, heads, width, features)``. All rows end in the last
    column. What lies before the first token of a row is finite and has to be masked.

    Args:
        room: Largest number of tokens that the rows get after a row has joined.
    """

    keys: Tensor
    values: Tensor
    is_initialized: bool

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room
        self._memory: tuple[Tensor, ...] = ()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add tokens to every row, and return keys and values of all.

        Args:
            key_states: ``(rows, heads, tokens, features)``.
            value_states: The same of the values.
            args: What some models pass beside; not read.
            kwargs: The same.
        """
        width = self.keys.shape[2]
        end = width + key_states.shape[2]
        if end > self._memory[0].shape[2]:
            self._memory = tuple(self._larger(x, end, 0) for x in (self.keys, self.values))
        for memory, states in zip(self._memory, (key_states, value_states), strict=True):
            memory[:, :, width:end] = states
        self.keys, self.values = (x[:, :, :end] for x in self._memory)
        return self.keys, self.values

    def join(self, keys: Tensor, values: Tensor, begin: int) -> None:
        """Add rows.

        Args:
            keys: ``(rows, heads, width, features)``, of any width.
            values: The same of the values.
            begin: Column in which the first of the other rows begins; earlier columns are left out.
        """
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
            self.keys, self.values = keys[:0, :, :0], values[:0, :, :0]
        rows, width = len(self.keys), max(self.keys.shape[2] - begin, keys.shape[2])
        present = (x[:, :, begin:] for x in (self.keys, self.values))
        self._memory = tuple(self._larger(x, width, len(keys)) for x in present)
        for memory, states in zip(self._memory, (keys, values), strict=True):
            memory[rows:, :, width - states.shape[2] : width] = states
        self.keys, self.values = (x[:, :, :width] for x in self._memory)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows. Only those that change their place are copied.

        Args:
            indices: int64 ``[kept]``, the row that comes to each place.
        """
        moved = (indices != torch.arange(len(indices), device=indices.device)).nonzero()[:, 0]
        width = self.keys.shape[2]
        for memory in self._memory:
            memory[moved, :, :width] = memory[indices[moved], :, :width]
        self._memory = tuple(x[: len(indices)] for x in self._memory)
        self.keys, self.values = (x[:, :, :width] for x in self._memory)

    def _larger(self, states: Tensor, width: int, more: int) -> Tensor:
        """Return memory for further rows and for further columns, with these rows so that they end at ``width``."""
        rows, heads, old, features = states.shape
        columns = width + min(self._room, max(64, width // 4))
        memory = states.new_zeros(rows + more, heads, columns, features)
        begin = width - old if more else 0
        memory[:rows, :, begin : begin + old] = states
        return memory


def row_cache(prefilled: DynamicCache, room: int) -> DynamicCache:
    """Return a cache without rows, with layers like those of another cache.

    Args:
        prefilled: Cache of keys and values.
        room: Largest number of tokens that the rows get after a row has joined.
    """
    cache = DynamicCache()
    cache.layers = [RowLayer(room) for _ in prefilled.layers]
    return cache


def is_supported(model: Any) -> bool:
    """Return whether the layers of a model hold the keys and values of all tokens, and nothing else.

    Args:
        model: Causal language model of transformers.
    """
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)
