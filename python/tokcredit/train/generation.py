"""Generation: a causal language model continues prompts. Rows that have ended leave at once, waiting prompts join."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from tokcredit.train.row_cache import is_supported, row_cache
from tokcredit.train.scoring import left_padded

_WORTH = 64
"""A forward pass of its own for what prompts share has to save at least this number of tokens."""


class Generation:
    """The rows that a model continues, ``count`` for each prompt.

    Keys and values of a prompt are computed once for all its rows, and those of the tokens that all prompts begin with
    once for all prompts. Use it so::

        generation = Generation(...)
        while (logits := generation.advance()) is not None:
            tokens = ...  # one for each row of generation.rows
            generation.keep(tokens, going)

    Models with layers that hold something else than the keys and values of all tokens, such as sliding windows, use
    their own cache. Prompts join only if there are no other rows then, and share nothing.

    Args:
        model: Causal language model of transformers.
        prompts: Token ids of each prompt.
        count: Rows of each prompt.
        batch: Largest number of rows at once; the rows of one prompt are together in any case.
        most: Largest number of tokens of a row.
        pad: Token id of the padding.

    Attributes:
        rows: int64 ``[n]``, number of the row that the logits belong to, on the device; the rows of a prompt have
            neighbouring numbers.
    """

    def __init__(
        self, model: Any, prompts: Sequence[Sequence[int]], count: int, batch: int, most: int, pad: int
    ) -> None:
        self._model, self._count, self._batch, self._most, self._pad = model, count, batch, most, pad
        self._prompts, self._joined = prompts, 0
        self._flexible = is_supported(model)
        self._prefix = self._shared() if self._flexible else None
        self._skip = 0 if self._prefix is None else self._prefix.get_seq_length()
        # Without a masked column there is no mask, and torch's attention of grouped queries is slower then on a CPU.
        self._masked = int(model.device.type == "cpu" and self._flexible)
        self.rows = torch.zeros(0, dtype=torch.int64, device=model.device)
        self._tokens = self.rows
        self._mask = torch.ones(0, 0, dtype=torch.bool, device=model.device)
        self._cache: Any = None

    def advance(self) -> Tensor | None:
        """Return the logits of the next token of each row, ``[n, V]``, or None if all rows have ended."""
        logits = [self._read()] if len(self.rows) else []
        if number := self._number():
            logits.append(self._join(number))
        return torch.cat(logits) if logits else None

    def keep(self, tokens: Tensor, going: Tensor) -> None:
        """Take the next token of each row, and let rows go.

        Args:
            tokens: int64 ``[n]``.
            going: bool ``[n]``, False for rows that have ended.
        """
        self._tokens = tokens
        if going.all():
            return
        number = int(going.sum())
        kept = torch.arange(number, device=going.device)
        # Rows from behind come to the places of those that have ended.
        kept[~going[:number]] = number + going[number:].nonzero()[:, 0]
        self.rows, self._tokens, self._mask = self.rows[kept], tokens[kept], self._mask[kept]
        self._cache.batch_select_indices(kept)

    def _read(self) -> Tensor:
        """Return the logits after the last token of each row."""
        self._mask = functional.pad(self._mask, (0, 1), value=True)
        return self._forward(self._tokens[:, None], self._mask, self._cache)[0]

    def _forward(self, tokens: Tensor, mask: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Return the logits ``[n, V]`` after these tokens, and the cache with them; ``mask`` is that of all columns."""
        positions = (mask.cumsum(1)[:, -tokens.shape[1] :] - 1).clamp(min=0)
        out = self._model(
            tokens,
            attention_mask=mask.long(),
            position_ids=positions,
            past_key_values=cache,
            logits_to_keep=1,
            use_cache=True,
        )
        return out.logits[:, -1], out.past_key_values

    def _number(self) -> int:
        """Return the number of prompts that join now: some at once, because the others are copied then."""
        waiting = len(self._prompts) - self._joined
        fitting = min(waiting, (self._batch - len(self.rows)) // self._count)
        if not len(self.rows):
            return min(waiting, max(fitting, 1))
        enough = min(waiting, max(self._batch // (4 * self._count), 1))
        return fitting if self._flexible and fitting >= enough else 0

    def _join(self, number: int) -> Tensor:
        """Return the logits after the next prompts, whose rows are then among the others."""
        first, last = self._joined, self._joined + number
        unshared = [p[self._skip :] for p in self._prompts[first:last]]
        ids, real = left_padded(unshared, self._pad, self._model.device)
        mask = functional.pad(real, (self._skip, 0), value=True)
        logits, cache = self._forward(ids, mask, self._prefixed(number))
        mask = functional.pad(mask, (self._masked, 0)).repeat_interleave(self._count, 0)
        begin = 0
        if len(self.rows):
            # Rows that have ended began earlier.
            begin = int(self._mask.any(0).int().argmax())
            self._mask = self._mask[:, begin:]
        else:
            self._mask = mask[:0]
            self._cache = row_cache(cache, self._most) if self._flexible else cache
        if self._flexible:
            for layer, new in zip(self._cache.layers, cache.layers, strict=True):
                padded = (functional.pad(x, (0, 0, self._masked, 0)) for x in (new.keys, new.values))
                layer.join(*(x.repeat_interleave(self._count, 0) for x in padded), begin)
        else:
            cache.batch_repeat_interleave(self._count)
        width = max(mask.shape[1], self._mask.shape[1])
        self._mask = torch.cat([functional.pad(x, (width - x.shape[1], 0)) for x in (self._mask, mask)])
        new_rows = torch.arange(first * self._count, last * self._count, device=self.rows.device)
        self.rows, self._joined = torch.cat([self.rows, new_rows]), last
        return logits.repeat_interleave(self._count, 0)

    def _shared(self) -> Any:
        """Return the cache of the tokens that all prompts begin with, or None if they are few."""
        first, last = min(self._prompts, key=list), max(self._prompts, key=list)
        # All prompts lie between these two; the last token of each is left to its own forward pass.
        length = next((i for i, (a, b) in enumerate(zip(first[:-1], last[:-1], strict=False)) if a != b), None)
        if length is None:
            length = min(map(len, self._prompts)) - 1
        if length * (len(self._prompts) - 1) < _WORTH:
            return None
        ids = torch.tensor([list(first[:length])], device=self._model.device)
        return self._forward(ids, torch.ones_like(ids, dtype=torch.bool), None)[1]

    def _prefixed(self, number: int) -> Any:
        """Return the cache of the tokens that all prompts begin with, for so many prompts."""
        if self._prefix is None:
            return None
        layers = self._prefix.layers
        return DynamicCache([tuple(x.expand(number, -1, -1, -1) for x in (y.keys, y.values)) for y in layers])
