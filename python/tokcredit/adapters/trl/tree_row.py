"""TRL's AsyncGRPO: its packed rows, planned by the library, with an advantage per token.

``TreeRow`` does what ``trl.experimental.async_grpo.packing.TreeRow`` of TRL 1.16 does and returns the same tensors. The
trainer multiplies advantages loss term by loss term, so a sample may bring one per token::

    from trl.experimental.async_grpo import async_grpo_trainer

    async_grpo_trainer.TreeRow = tokcredit.adapters.trl.TreeRow
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokcredit.arguments import INTEGERS, describe
from tokcredit.blocks.tree_pack import pack
from tokcredit.rollouts import Rollouts

_IGNORED = -100
_LAST = -1
"""Next token of the last one of a sample; ids are at least 0."""


class TreeRow:
    """The samples of one forward pass: tokens that several samples share are forwarded once.

    A node of the tree is a token together with the next one, as in TRL, so that every place has one label.

    Attributes:
        samples: The samples in the order in which they came: ``input_ids``, ``completion_mask`` and ``old_log_probs``
            ``[T]``, ``advantage``: a number, or one per token ``[T]``, and ``group_id``.
        groups: Ids of their groups.
        trained: Number of loss terms.
        load: Attention cost: the sum over the nodes of their depth, from 1.
        tokens: Token id of each node, in the order in which samples brought them.
    """

    def __init__(self) -> None:
        self.samples: list[Mapping[str, Any]] = []
        self.groups: set[Hashable] = set()
        self.trained, self.load = 0, 0
        self.tokens: list[int] = []
        self._texts: list[NDArray[np.int64]] = []

    def _shared(self, text: NDArray[np.int64]) -> int:
        """Return how many nodes of a sample are there already."""
        most = 0
        for other in self._texts:
            n = min(len(text), len(other))
            differ = np.flatnonzero(text[:n] != other[:n])
            if not differ.size and len(text) == len(other):
                return len(text)
            most = max(most, int(differ[0]) - 1 if differ.size else n - 1)
        return most

    def fits(self, sample: Mapping[str, Any], budget: int) -> bool:
        """Return whether the row stays within so many nodes, and loss terms, with one more sample.

        Args:
            sample: The sample.
            budget: Most nodes, and most loss terms.
        """
        text = _text(sample)
        trained = self.trained + int(sample["completion_mask"].sum())
        return trained <= budget and len(self.tokens) + len(text) - self._shared(text) <= budget

    def add(self, sample: Mapping[str, Any]) -> None:
        """Add a sample.

        Args:
            sample: The sample.

        Raises:
            TypeError: The tokens are no integers.
            ValueError: Its tensors have different lengths, or a token id is negative.
        """
        text = _text(sample)
        for name in ("completion_mask", "old_log_probs"):
            if sample[name].shape != (len(text),):
                raise ValueError(f"{name}: expected [{len(text)}], got {describe(sample[name])}")
        _advantages(sample, len(text))
        shared = self._shared(text)
        self.load += (len(text) * (len(text) + 1) - shared * (shared + 1)) // 2
        self.tokens += text[shared:].tolist()
        self.samples.append(sample)
        self._texts.append(text)
        self.groups.add(sample["group_id"])
        self.trained += int(sample["completion_mask"].sum())

    def pack(self) -> dict[str, Tensor]:
        """Return the tensors that the trainer's collator and loss read, by TRL's names.

        Raises:
            ValueError: There is no sample.
        """
        if not self.samples:
            raise ValueError("samples: expected at least one, got none")
        # One more token ends each sample: as the last one of a leaf it has no place of its own.
        texts = [np.append(text, _LAST) for text in self._texts]
        following = [np.append(text[1:], _LAST) for text in texts]
        tokens, edges = torch.from_numpy(np.concatenate(texts)), np.cumsum([0, *map(len, texts)])
        rows = len(texts)
        batch = Rollouts(tokens, torch.from_numpy(edges), torch.zeros(rows, dtype=torch.int64), torch.zeros(rows))
        wanted = torch.ones_like(tokens, dtype=torch.bool).index_fill_(0, torch.from_numpy(edges[:-1]), False)
        tags = (torch.zeros(rows, 0, dtype=torch.int64), torch.from_numpy(np.concatenate(following)))
        plan = pack(batch.with_inputs(prompt_tokens=tags[0]), wanted=wanted, tags=tags)
        places, trained = plan.arrays.source.long(), self._trained(wanted)
        token_index = places[plan.index[trained]]
        labels = torch.full((plan.num_places,), _IGNORED).index_copy_(0, token_index, tokens[trained])
        paths, offsets = _paths(plan.arrays.segment_begin.tolist(), plan.arrays.segment_parent.tolist())
        begin = plan.arrays.segment_begin
        return {
            "input_ids": plan.arrays.tokens,
            "position_ids": plan.position_ids,
            "shift_labels": labels,
            "tree_kv_index": torch.from_numpy(paths),
            "tree_cu_seqlens_q": begin.int(),
            "tree_cu_seqlens_k": offsets.int(),
            "tree_max_seqlens": torch.stack([begin.diff().max(), offsets.diff().max()]),
            "token_index": token_index,
            "old_log_probs": self._joined([x["old_log_probs"] for x in self.samples], trained),
            "advantages": self._joined(
                [_advantages(x, len(text)) for x, text in zip(self.samples, self._texts, strict=True)], trained
            ),
            "segment_id": torch.from_numpy(np.repeat(np.arange(rows), np.diff(edges)))[trained],
        }

    def _trained(self, wanted: Tensor) -> Tensor:
        """Return the positions, in the texts with their last token, of the loss terms; a first token has none."""
        masks = [torch.cat([x["completion_mask"] != 0, torch.zeros(1, dtype=torch.bool)]) for x in self.samples]
        return (torch.cat(masks) & wanted).nonzero()[:, 0]

    def _joined(self, values: Sequence[Tensor], trained: Tensor) -> Tensor:
        nothing = torch.zeros(1)
        return torch.cat([part for x in values for part in (x.float(), nothing)])[trained]


def _text(sample: Mapping[str, Any]) -> NDArray[np.int64]:
    ids = sample["input_ids"]
    if not isinstance(ids, Tensor) or ids.dtype not in INTEGERS or ids.dim() != 1 or not ids.numel():
        raise TypeError(f"input_ids: expected int64 [T] with at least one token, got {describe(ids)}")
    text: NDArray[np.int64] = ids.long().numpy()
    if text.min() < 0:
        raise ValueError(f"input_ids: expected ids of at least 0, got {text.min()}")
    return text


def _advantages(sample: Mapping[str, Any], length: int) -> Tensor:
    given = torch.as_tensor(sample["advantage"], dtype=torch.float32)
    if given.shape not in ((), (length,)):
        raise ValueError(f"advantage: expected a number or [{length}], got {describe(given)}")
    return given.expand(length)


def _paths(begin: list[int], parent: list[int]) -> tuple[NDArray[np.int64], Tensor]:
    """Return the places from the root to the end of each segment, one after the other, and where each path begins."""
    last = {end - 1: s for s, end in enumerate(begin[1:])}
    paths: list[NDArray[np.int64]] = []
    for s, above in enumerate(parent):
        own = np.arange(begin[s], begin[s + 1])
        paths.append(np.concatenate([paths[last[above]], own]) if above >= 0 else own)
    return np.concatenate(paths), torch.tensor([0, *map(len, paths)]).cumsum(0)
