"""What a teacher with fixed weights says about responses: collected once for each, and kept in the run folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokcredit.files import naming
from tokcredit.rollouts import Rollouts
from tokcredit.supervised import Divergence
from tokcredit.train.folder import read_settings
from tokcredit.train.ranks import processes

FOLDER = "teacher"
"""Name of the folder with the scores, in the folder of a run."""
TOP = ("teacher_top_ids", "teacher_top_log_probs")
"""Inputs with the most likely tokens of the teacher."""

Row = dict[str, NDArray[Any]]


def wanted(objective: Any) -> tuple[frozenset[str], int]:
    """Return which inputs an objective takes of a teacher with fixed weights, and the number of most likely tokens.

    They are log-probs of tokens, and the most likely tokens of the teacher where the divergence is that of these. A
    divergence over the vocabulary takes the teacher's logits instead, which are not kept.

    Args:
        objective: The objective.
    """
    names, loss = objective.required_inputs & {"teacher_log_probs"}, getattr(objective, "token_loss", None)
    if isinstance(loss, Divergence) and loss.top_k is not None and loss.top_of == "teacher":
        return names | set(TOP), loss.top_k
    return names, 0


def fingerprint(model: Any) -> str:
    """Return a digest of some weights of each parameter of a model, which differs for models of other weights.

    Args:
        model: The model.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in model.named_parameters():
        flat = weight.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // 64)].float().cpu().numpy()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode() + some.tobytes())
    return digest.hexdigest()


class TeacherScores:
    """Gives batches the inputs that a teacher with fixed weights makes, and computes those of each response once.

    Rows are the same if prompt, tokens, mask, temperature and teacher are. Each call writes the rows that are new into
    a file of their own, whole or not at all; a run that has no step yet writes nothing and keeps them for later.

    Args:
        names: Names of the inputs.
        compute: Returns rows with the inputs.
        teacher: Text that differs for other teachers and other settings of it.
        run: Folder of the run. What it has is read.
    """

    def __init__(self, names: frozenset[str], compute: Callable[[Rollouts], Rollouts], teacher: str, run: Path) -> None:
        self._names, self._compute, self._teacher = sorted(names), compute, f"{sorted(names)} {teacher}"
        self._run = run
        self._known: dict[bytes, tuple[Path, int]] = {}
        self._new: dict[bytes, Row] = {}
        for path in sorted((run / FOLDER).glob("*.parquet")) if read_settings(run) is not None else ():
            keys = _table(path)["row"].to_pylist()
            self._known |= {key: (path, number) for number, key in enumerate(keys)}

    def __call__(self, batch: Rollouts) -> Rollouts:
        """Return a batch with the inputs.

        Args:
            batch: Packed rows with ``prompt_tokens``, or with the ``teacher_prompt_tokens`` that the teacher sees.
        """
        keys = self._keys(batch)
        missing: dict[bytes, int] = {}
        for row, key in enumerate(keys):
            if key not in self._known and key not in self._new:
                missing.setdefault(key, row)
        if missing:
            found = self._compute(batch.select(list(missing.values())))
            made = {name: found.input(name).cpu().numpy() for name in self._names}
            for key, begin, end in zip(missing, found.begin.tolist(), found.end.tolist(), strict=True):
                self._new[key] = {name: x[begin:end] for name, x in made.items()}
        rows = [self._row(key) for key in keys]
        if self._new and (self._run / "settings.json").exists():
            self._write()
        return batch.with_inputs(**{name: self._joined(name, rows, batch) for name in self._names})

    def _keys(self, batch: Rollouts) -> list[bytes]:
        seen = "teacher_prompt_tokens" if batch.has_input("teacher_prompt_tokens") else "prompt_tokens"
        prompts, tokens, mask = (x.cpu().numpy() for x in (batch.input(seen), batch.tokens, batch.response_mask))
        out = []
        for prompt, begin, end in zip(prompts, batch.begin.tolist(), batch.end.tolist(), strict=True):
            digest = hashlib.blake2b(self._teacher.encode(), digest_size=16)
            for part in (prompt[prompt >= 0], tokens[begin:end], mask[begin:end]):
                digest.update(f" {len(part)} ".encode() + part.astype(np.int64).tobytes())
            out.append(digest.digest())
        return out

    def _row(self, key: bytes) -> Row:
        if key in self._new:
            return self._new[key]
        path, number = self._known[key]
        table = _table(path)
        length = table["tokens"][number].as_py()
        values = {name: np.asarray(table[name][number].values) for name in self._names}
        return {name: x.reshape(length, x.size // max(length, 1)) for name, x in values.items()}

    def _joined(self, name: str, rows: Sequence[Row], batch: Rollouts) -> Tensor:
        width = next((x[name].reshape(len(x[name]), -1).shape[1] for x in rows if len(x[name])), 1)
        kind = torch.int64 if name == TOP[0] else torch.float32
        out = torch.zeros(batch.num_tokens, width, dtype=kind)
        for row, begin, end in zip(rows, batch.begin.tolist(), batch.end.tolist(), strict=True):
            out[begin:end] = torch.from_numpy(row[name].reshape(end - begin, width).copy()).to(kind)
        return (out if name in TOP else out[:, 0]).to(batch.device)

    def _write(self) -> None:
        """Write the new rows into a file whose name is that of its first row and of this process."""
        import pyarrow as pa

        from tokcredit.train.record import write_table

        path = self._run / FOLDER / f"{next(iter(self._new)).hex()}-{processes().process_index}.parquet"
        columns: dict[str, Any] = {
            "row": pa.array(list(self._new), pa.binary()),
            "tokens": pa.array([len(x[self._names[0]]) for x in self._new.values()], pa.int64()),
        }
        for name in self._names:
            kind = pa.list_(pa.int32() if name == TOP[0] else pa.float32())
            columns[name] = pa.array([x[name].reshape(-1) for x in self._new.values()], kind)
        with naming(path):
            path.parent.mkdir(exist_ok=True)
        write_table(path, pa.table(columns))
        self._known |= {key: (path, number) for number, key in enumerate(self._new)}
        self._new = {}


@lru_cache(4)
def _table(path: Path) -> Any:
    from pyarrow.parquet import read_table

    return read_table(path)
