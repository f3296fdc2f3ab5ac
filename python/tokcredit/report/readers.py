"""Rollouts of one step, read from the files that trainers write."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokcredit import inputs
from tokcredit.report.vocabulary import Vocabulary, load_tokenizer
from tokcredit.rollouts import FIELDS, Rollouts

Record = Mapping[str, Any]

RECORDED = "recorded_advantages"
"""Input that holds the advantages that the trainer wrote."""

_DTYPES = {"float": np.float32, "integer": np.int64, "bool": np.bool_}


@dataclass(frozen=True, eq=False)
class Run:
    """The rollouts of one step, and what is needed to show them.

    Attributes:
        batch: The rollouts, packed, with the inputs that the file has; groups are numbered by first appearance.
        log_probs: float32 ``[N]``, under the policy after its update, or None.
        advantages: float32 ``[N]``, as the trainer computed them, or None.
        prompts: One text per group.
        vocabulary: Texts of the token ids.
        name: Name of the file and of its folder.
        step: Training step, or None if unknown.
        progress: From 0 at the first step of training to 1 at the last, or None if unknown.
        settings: What the trainer wrote about itself (version, method, objective, model, tokenizer); empty if nothing.
    """

    batch: Rollouts
    log_probs: Tensor | None
    advantages: Tensor | None
    prompts: list[str]
    vocabulary: Vocabulary
    name: str
    step: int | None
    progress: float | None
    settings: Mapping[str, str]


def read(path: str | Path, tokenizer: str | None = None, step: int | None = None) -> Run:
    """Return the rollouts of one step of a file or of a run folder.

    Readable files are ``rollouts-*.parquet`` of this trainer, the completions of TRL (``log_completions``), the JSONL
    of verl (``rollout_data_dir``), and JSONL of ``{"group", "prompt", "tokens" or "text", "reward"}``. Parquet and
    JSONL may carry ``response_mask``, ``log_probs`` (of the updated policy), ``advantages`` and any registered input
    without further axes by its name. TRL's reward is the sum of its reward functions.

    Args:
        path: A file, or a folder with such files, of which the one of ``step`` is taken.
        tokenizer: Folder or name of a ``transformers`` tokenizer, or None for the ``tokenizer`` folder beside the file.
        step: Training step, or None for the last.

    Raises:
        ValueError: There is no readable file, a row lacks something, or text has no tokenizer.
    """
    file = _file(Path(path), step)
    records, settings = _parquet(file) if file.suffix == ".parquet" else (_jsonl(file), {})
    steps = sorted({int(r["step"]) for r in records if r.get("step") is not None})
    wanted = step if step is not None else steps[-1] if steps else None
    if steps:
        if wanted not in steps:
            raise ValueError(f"step: expected one of {', '.join(map(str, steps))} in {file}, got {wanted}")
        records = [r for r in records if r.get("step") is not None and int(r["step"]) == wanted]
    if not records:
        raise ValueError(f"path: expected rollouts in {file}, got an empty file")
    beside = file.parent / "tokenizer"
    loaded = load_tokenizer(tokenizer or str(beside)) if tokenizer or beside.is_dir() else None
    rows = [_row(record, number, file) for number, record in enumerate(records)]
    for row in rows:
        if "tokens" not in row:
            if loaded is None:
                raise ValueError(f"tokenizer: expected one because {file} holds text and no token ids, got None")
            row["tokens"] = loaded.encode(row["text"], add_special_tokens=False)
    return _run(rows, Vocabulary(loaded), file, wanted, settings)


def _file(path: Path, step: int | None) -> Path:
    if path.is_file():
        if path.suffix not in (".parquet", ".jsonl"):
            raise ValueError(f"path: expected a .parquet or .jsonl file, got {path}")
        return path
    for pattern in ("rollouts-*.parquet", "completions_*.parquet", "completions/completions_*.parquet", "*.jsonl"):
        if files := sorted(path.glob(pattern), key=_number):
            chosen = [f for f in files if step is None or _number(f) == step]
            if not chosen:
                raise ValueError(f"step: expected one of {', '.join(str(_number(f)) for f in files)}, got {step}")
            return chosen[-1]
    raise ValueError(f"path: expected rollouts-*.parquet, completions_*.parquet or *.jsonl, got nothing in {path}")


def _number(file: Path) -> int:
    digits = re.findall(r"\d+", file.stem)
    return int(digits[-1]) if digits else -1


def _parquet(file: Path) -> tuple[list[Record], dict[str, str]]:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(file)
    settings = json.loads((table.schema.metadata or {}).get(b"tokcredit", b"{}"))
    columns = [_cells(column.combine_chunks()) for column in table.columns]
    records: list[Record] = [dict(zip(table.column_names, cells, strict=True)) for cells in zip(*columns, strict=True)]
    return records, {key: str(value) for key, value in settings.items() if value is not None}


def _cells(column: Any) -> list[Any]:
    """Return the cells of an Arrow column; lists of numbers stay arrays."""
    from pyarrow import types

    if not types.is_list(column.type) or not (
        types.is_primitive(column.type.value_type) or types.is_boolean(column.type.value_type)
    ):
        return column.to_pylist()
    offsets, values = column.offsets.to_numpy(), column.values.to_numpy(zero_copy_only=False)
    present = column.is_valid().to_numpy(zero_copy_only=False)
    return [values[a:b] if there else None for a, b, there in zip(offsets[:-1], offsets[1:], present, strict=True)]


def _jsonl(file: Path) -> list[Record]:
    records: list[Record] = []
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"path: expected JSON in line {number} of {file}, got {error}") from None
            if not isinstance(record, dict):
                raise ValueError(f"path: expected an object in line {number} of {file}, got {type(record).__name__}")
            records.append(record)
    return records


def _row(record: Record, number: int, file: Path) -> dict[str, Any]:
    """Return a record of any of the formats under the names of this package."""
    row = dict(record)
    if "output" in row and "score" in row:  # verl
        row = {"prompt": row["input"], "text": row["output"], "reward": row["score"]}
    elif "advantage" in row and "reward" not in row:  # TRL: reward functions lie between completion and advantage
        names = list(row)[list(row).index("completion") + 1 : list(row).index("advantage")]
        rewards = [row[name] for name in names if isinstance(row[name], (int, float))]
        row = {"prompt": row["prompt"], "text": row["completion"], "reward": sum(r for r in rewards if r == r)}
    elif row.get("text") is None and row.get("tokens") is None and "completion" in row:
        row["text"] = row["completion"]
    missing = [name for name in ("reward",) if not isinstance(row.get(name), (int, float))]
    if row.get("tokens") is None:
        row.pop("tokens", None)
        missing += [] if "text" in row else ["tokens or text"]
    if missing:
        raise ValueError(f"{missing[0]}: expected in every row of {file}, got none in row {number}")
    row["text"], row["prompt"] = _text(row.get("text", "")), _text(row.get("prompt", ""))
    row.setdefault("group", row["prompt"])
    return row


def _text(said: Any) -> str:
    """Return the text of a string or of chat messages."""
    if isinstance(said, str):
        return said
    if isinstance(said, Sequence):
        return "\n".join(f"{m.get('role', '')}: {_text(m.get('content', ''))}" for m in said if isinstance(m, Mapping))
    return "" if said is None else str(said)


def _run(
    rows: list[dict[str, Any]], vocabulary: Vocabulary, file: Path, step: int | None, settings: Mapping[str, str]
) -> Run:
    groups: dict[str, int] = {}
    group_ids = [groups.setdefault(repr(row["group"]), len(groups)) for row in rows]
    prompts = [""] * len(groups)
    for row, group in zip(rows, group_ids, strict=True):
        prompts[group] = prompts[group] or row["prompt"]
    lengths = [len(row["tokens"]) for row in rows]
    mask, log_probs, advantages = (
        _column(name, rows, lengths, np.float32) for name in ("response_mask", "log_probs", "advantages")
    )
    named = _inputs(rows, lengths)
    if settings == {} and log_probs is not None and "old_log_probs" not in named:
        # JSONL with one kind of log-probs has those of the policy that sampled.
        named["old_log_probs"], log_probs = log_probs, None
    if advantages is not None:
        named[RECORDED] = advantages
    batch = Rollouts(
        torch.from_numpy(_joined((row["tokens"] for row in rows), np.int64)),
        torch.tensor([0, *lengths]).cumsum(0),
        torch.tensor(group_ids),
        torch.tensor([float(row["reward"]) for row in rows]),
        None if mask is None else mask.bool(),  # type: ignore[arg-type]
        **{name: x for name, x in named.items() if name in FIELDS},  # type: ignore[arg-type]
        extras={name: x for name, x in named.items() if name not in FIELDS},
    )
    name = "/".join(file.absolute().parts[-2:])
    return Run(batch, log_probs, advantages, prompts, vocabulary, name, step, _progress(file, step), settings)


def _progress(file: Path, step: int | None) -> float | None:
    """Return the progress as the trainer counts it, from the number of steps in its settings."""
    settings = file.parent / "settings.json"
    if step is None or not settings.exists():
        return None
    steps = json.loads(settings.read_text()).get("steps")
    return min(1.0, max(0, step - 1) / max(steps - 1, 1)) if isinstance(steps, int) else None


def _inputs(rows: list[dict[str, Any]], lengths: list[int]) -> dict[str, Tensor]:
    """Return the registered inputs without further axes that every row has."""
    found: dict[str, Tensor] = {}
    for name in sorted(inputs.names() - inputs.names("host")):
        entry = inputs.get(name)
        if entry.axes or any(row.get(name) is None for row in rows):
            continue
        if entry.per == "token":
            found[name] = _column(name, rows, lengths, _DTYPES[entry.dtype])  # type: ignore[assignment]
        else:
            found[name] = torch.from_numpy(np.asarray([row[name] for row in rows], dtype=_DTYPES[entry.dtype]))
    return found


def _column(name: str, rows: list[dict[str, Any]], lengths: list[int], dtype: Any) -> Tensor | None:
    """Return a per-token column of all rows, or None where a row lacks it."""
    lists = [row.get(name) for row in rows]
    if any(values is None for values in lists):
        return None
    for number, (values, length) in enumerate(zip(lists, lengths, strict=True)):
        if len(values) != length:  # type: ignore[arg-type]
            raise ValueError(f"{name}: expected {length} numbers in row {number}, got {len(values)}")  # type: ignore[arg-type]
    return torch.from_numpy(_joined(lists, dtype))


def _joined(lists: Iterable[Any], dtype: Any) -> Any:
    return np.concatenate([np.asarray(values, dtype=dtype) for values in lists])
