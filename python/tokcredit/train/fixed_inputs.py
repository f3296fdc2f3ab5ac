"""Inputs of examples that do not change in training: computed once before it, and kept in the run folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from tokcredit.rollouts import Rollouts
from tokcredit.train.examples import Example, batch_of
from tokcredit.train.ranks import Ranks
from tokcredit.train.record import write_table

_FILE = "fixed_inputs.parquet"


class FixedInputs:
    """Per-token inputs of some of the examples.

    Args:
        names: Names of the inputs.
        examples: All examples.
        folder: Folder of the run that is continued, whose numbers are read, or None.
    """

    def __init__(self, names: frozenset[str], examples: Sequence[Example], folder: Path | None) -> None:
        self._names, self._examples = sorted(names), examples
        self._known: dict[int, dict[str, NDArray[np.float32]]] = {}
        if names and folder is not None:
            table = pq.read_table(folder / _FILE)
            columns = [table[name].to_numpy() for name in self._names]
            for number, *values in zip(table["example"].to_pylist(), *columns, strict=True):
                self._known[number] = dict(zip(self._names, values, strict=True))

    def compute(
        self,
        blocks: Iterable[Sequence[int]],
        collect: Callable[[Sequence[Example], Rollouts], Rollouts],
        ranks: Ranks,
    ) -> None:
        """Compute the inputs of those examples that have none yet.

        An example is computed together with those of the first block that has it, so a run that is continued with more
        blocks has the same numbers as a longer one.

        Args:
            blocks: Numbers of examples.
            collect: Returns a batch of examples with the inputs.
            ranks: The processes, which share the work.
        """
        if not self._names:
            return
        seen = set(self._known)
        missing = []
        for block in blocks:
            missing.append([i for i in dict.fromkeys(block) if i not in seen])
            seen |= set(block)
        found = ranks.exchange(ranks.together(lambda: self._computed(missing, collect, ranks)))
        self._known |= dict(found)

    def _computed(
        self,
        missing: Sequence[Sequence[int]],
        collect: Callable[[Sequence[Example], Rollouts], Rollouts],
        ranks: Ranks,
    ) -> list[tuple[int, dict[str, NDArray[np.float32]]]]:
        """Return the inputs of this process's share of some examples, by their numbers."""
        found = []
        with tqdm(total=sum(map(len, missing)), desc="inputs", unit="example", disable=ranks.index > 0) as bar:
            for part in missing:
                mine = part[ranks.index :: ranks.count]
                if mine:
                    examples = [self._examples[i] for i in mine]
                    batch = collect(examples, batch_of(examples, range(len(mine)), ranks.device))
                    rows = {name: batch.input(name).cpu().split(list(map(self._tokens, mine))) for name in self._names}
                    found += [(i, {name: rows[name][n].float().numpy() for name in rows}) for n, i in enumerate(mine)]
                bar.update(len(part))
        return found

    def add(self, batch: Rollouts, numbers: Sequence[int]) -> Rollouts:
        """Return a batch of examples with the inputs.

        Args:
            batch: From :func:`~tokcredit.train.examples.batch_of`.
            numbers: Numbers of its examples.
        """
        return batch.with_inputs(**{name: self._column(name, numbers).to(batch.device) for name in self._names})

    def write(self, folder: Path) -> None:
        """Write the inputs into the folder of the run.

        Args:
            folder: The folder.
        """
        if self._names:
            numbers, kind = sorted(self._known), pa.list_(pa.float32())
            columns = {name: pa.array([self._known[i][name] for i in numbers], kind) for name in self._names}
            write_table(folder / _FILE, pa.table({"example": numbers, **columns}))

    def _column(self, name: str, numbers: Sequence[int]) -> Tensor:
        return torch.from_numpy(np.concatenate([self._known[i][name] for i in numbers]))

    def _tokens(self, number: int) -> int:
        return sum(len(response.tokens) for response in self._examples[number].responses)
