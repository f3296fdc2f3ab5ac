"""Rollouts of one step, read from the files that trainers write."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokcredit import inputs
from tokcredit.report import formats, records
from tokcredit.report.columns import array, scalar
from tokcredit.report.formats import Row
from tokcredit.report.records import Record
from tokcredit.report.vocabulary import Vocabulary, load_tokenizer
from tokcredit.rollouts import FIELDS, Rollouts

RECORDED = "recorded_advantages"
"""Input that holds the advantages that the trainer wrote."""


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
        of_pairs: Whether the file has pairs of a chosen and a rejected response.
        answers: For each row the texts that answered its turns, or None if the file does not have them.
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
    of_pairs: bool = False
    answers: list[list[str]] | None = None


def read(
    path: str | Path,
    tokenizer: str | None = None,
    step: int | None = None,
    rewards: Mapping[str, float] | None = None,
) -> Run:
    """Return the rollouts of one step of a file or of a run folder.

    Readable files are ``rollouts-*.parquet`` of this trainer, the completions of TRL (``log_completions``), the JSONL
    of verl (``rollout_data_dir``), and JSONL of ``{"group", "prompt", "tokens" or "text", "reward"}``. Parquet and
    JSONL may carry ``response_mask``, ``log_probs`` (of the updated policy), ``advantages``, ``trajectory`` (the same
    number in the rows of an episode) and any registered input without further axes by its name, each in every row or in
    none.

    Rows of a group have the same ``group``, or the same ``uid`` in verl's files, or else the same prompt. A row whose
    ``group`` is null is a group of its own. Responses that are chat messages become the texts of their messages, and
    only those of the assistant count as the policy's.

    Pairs ``{"prompt", "chosen", "rejected"}`` are groups of two rows, and their further columns have the name of the
    response first, for example ``chosen_ids``, ``chosen_mask`` and ``chosen_ref_log_probs``. Rows of an episode that
    are one turn each may carry its number as ``turn`` in place of ``turn_ids``. ``answers`` are texts that answered the
    turns of a row, one per turn.

    Args:
        path: A file, or a folder with such files, of which the one of ``step`` is taken.
        tokenizer: Folder or name of a ``transformers`` tokenizer, or None for the ``tokenizer`` folder beside the file.
        step: Training step, or None for the last.
        rewards: Weights of the columns whose sum is the reward, or None for ``reward``, ``score`` in verl's files, and
            the only reward function in TRL's. A row in which all of them are null has no reward: it does not train
            and does not count in its group.

    Raises:
        ValueError: There is no readable file, a row lacks something or holds a value of the wrong kind, text has no
            tokenizer, or TRL had several reward functions and ``rewards`` is None.
    """
    file = _file(Path(path), step)
    found, settings = records.load(file)
    found, wanted = _of_step(found, step, file)
    if not found:
        raise ValueError(f"path: expected rollouts in {file}, got an empty file")
    beside = file.parent / "tokenizer"
    loaded = load_tokenizer(tokenizer or str(beside)) if tokenizer or beside.is_dir() else None
    rows, of_pairs = formats.rows(found, file, rewards), all(record.keys() >= formats.PAIR for record in found)
    if loaded is None and any(row.pieces is not None for row in rows):
        raise ValueError(f"tokenizer: expected one because {file} holds text and no token ids, got None")
    run = _run(rows, Vocabulary(loaded), file, wanted, settings)
    return replace(run, of_pairs=of_pairs, answers=_answers(rows))


def _of_step(found: list[Record], step: int | None, file: Path) -> tuple[list[Record], int | None]:
    """Return the records of a step, the last by default, and its number."""
    if all(record.get("step") is None for record in found):
        return found, step
    of_record = [scalar("step", r.get("step"), "integer", f"row {n} of {file}") for n, r in enumerate(found)]
    wanted = max(of_record) if step is None else step
    if wanted not in of_record:
        raise ValueError(f"step: expected one of {', '.join(map(str, sorted(set(of_record))))} in {file}, got {wanted}")
    return [record for record, number in zip(found, of_record, strict=True) if number == wanted], wanted


def files(path: Path) -> list[Path]:
    """Return a file by itself, or the files with rollouts in a folder, in the order of their steps.

    Args:
        path: A file, or a folder with such files.

    Raises:
        ValueError: There is no readable file.
    """
    if path.is_file():
        if path.suffix not in (".parquet", ".jsonl"):
            raise ValueError(f"path: expected a .parquet or .jsonl file, got {path}")
        return [path]
    for pattern in ("rollouts-*.parquet", "completions_*.parquet", "completions/completions_*.parquet", "*.jsonl"):
        if found := sorted(path.glob(pattern), key=_number):
            return found
    raise ValueError(f"path: expected rollouts-*.parquet, completions_*.parquet or *.jsonl, got nothing in {path}")


def _file(path: Path, step: int | None) -> Path:
    found = files(path)
    if path.is_file() or step is None:
        return found[-1]
    if not (chosen := [f for f in found if _number(f) == step]):
        raise ValueError(f"step: expected one of {', '.join(str(_number(f)) for f in found)}, got {step}")
    return chosen[-1]


def _number(file: Path) -> int:
    digits = re.findall(r"\d+", file.stem)
    return int(digits[-1]) if digits else -1


def _run(rows: list[Row], vocabulary: Vocabulary, file: Path, step: int | None, settings: Mapping[str, str]) -> Run:
    groups: dict[Any, int] = {}
    group_ids = [groups.setdefault(row.group, len(groups)) for row in rows]
    prompts = [""] * len(groups)
    for row, group in zip(rows, group_ids, strict=True):
        prompts[group] = prompts[group] or row.prompt
    tokens, chosen = zip(*(_tokens(row, vocabulary.tokenizer) for row in rows), strict=True)
    lengths = [len(ids) for ids in tokens]
    if not settings:  # this trainer writes null for what it did not compute, for example in rows that do not train
        _check_whole(rows)
    mask, log_probs, advantages = (
        _column(name, kind, rows, lengths)
        for name, kind in (("response_mask", "bool"), ("log_probs", "float"), ("advantages", "float"))
    )
    named = _inputs(rows, lengths)
    if settings == {} and log_probs is not None and "old_log_probs" not in named:
        # JSONL with one kind of log-probs has those of the policy that sampled.
        named["old_log_probs"], log_probs = log_probs, None
    turns = _column("turn", "integer", rows, None)
    if turns is not None and "turn_ids" not in named:
        named["turn_ids"] = turns.repeat_interleave(torch.tensor(lengths))
    if advantages is not None:
        named[RECORDED] = advantages
    # This trainer tells rewards of tokens apart from outcomes, also where both have the same sum.
    dense = {name: named.pop(name) for name in named.keys() & {"token_rewards"} if settings}
    batch = Rollouts(
        _joined(tokens),
        torch.tensor([0, *lengths]).cumsum(0),
        torch.tensor(group_ids),
        torch.tensor([row.reward for row in rows]),
        _joined(chosen) if mask is None else _joined(chosen) & mask,
        **{name: x for name, x in named.items() if name in FIELDS},  # type: ignore[arg-type]
        extras={name: x for name, x in named.items() if name not in FIELDS},
        trajectory_ids=_column("trajectory", "integer", rows, None),
    ).with_inputs(**dense)
    name = "/".join(file.absolute().parts[-2:])
    return Run(batch, log_probs, advantages, prompts, vocabulary, name, step, _progress(file, step), settings)


def _progress(file: Path, step: int | None) -> float | None:
    """Return the progress as the trainer counts it, from the number of steps in its settings."""
    settings = file.parent / "settings.json"
    if step is None or not settings.exists():
        return None
    steps = records.parsed(settings.read_bytes(), str(settings)).get("steps")
    return min(1.0, max(0, step - 1) / max(steps - 1, 1)) if isinstance(steps, int) else None


def _tokens(row: Row, tokenizer: Any) -> tuple[Any, Any]:
    """Return the token ids of a row, int64 ``[T]``, and which of them the policy chose and is rewarded for, bool."""
    if row.pieces is None:
        ids = array("tokens", row.columns["tokens"], "integer", row.where)
        return ids, np.full(len(ids), row.scored)
    pieces = [tokenizer.encode(text, add_special_tokens=False) for text, _ in row.pieces]
    chosen = [[by_policy and row.scored] * len(ids) for ids, (_, by_policy) in zip(pieces, row.pieces, strict=True)]
    return np.asarray([*chain(*pieces)], dtype=np.int64), np.asarray([*chain(*chosen)], dtype=bool)


def _check_whole(rows: Sequence[Row]) -> None:
    """Raise if some rows have a column and others lack it."""
    for name in (
        "response_mask",
        "log_probs",
        "advantages",
        "trajectory",
        "turn",
        *sorted(inputs.names() - inputs.names("host")),
    ):
        lacking = [row for row in rows if row.columns.get(name) is None]
        if 0 < len(lacking) < len(rows):
            raise ValueError(f"{name}: expected in every row of the file or in none, got none in {lacking[0].where}")


def _inputs(rows: Sequence[Row], lengths: Sequence[int]) -> dict[str, Tensor]:
    """Return the registered inputs without further axes that every row has."""
    found: dict[str, Tensor] = {}
    for name in sorted(inputs.names() - inputs.names("host")):
        entry = inputs.get(name)
        if entry.axes:
            continue
        column = _column(name, entry.dtype, rows, lengths if entry.per == "token" else None)
        if column is not None:
            found[name] = column
    return found


def _column(name: str, kind: str, rows: Sequence[Row], lengths: Sequence[int] | None) -> Tensor | None:
    """Return a column of all rows, or None where a row lacks it: a list of each length, or one value, per row."""
    cells = [row.columns.get(name) for row in rows]
    if any(cell is None for cell in cells):
        return None
    if lengths is None:
        values = [scalar(name, cell, kind, row.where) for row, cell in zip(rows, cells, strict=True)]
        return torch.from_numpy(array(name, values, kind, "the file"))
    lists = [array(name, cell, kind, row.where) for row, cell in zip(rows, cells, strict=True)]
    for row, values, length in zip(rows, lists, lengths, strict=True):
        if len(values) != length:
            raise ValueError(f"{name}: expected {length} values in {row.where}, got {len(values)}")
    return _joined(lists)


def _answers(rows: Sequence[Row]) -> list[list[str]] | None:
    """Return the column ``answers``, or None where a row lacks it."""
    found = [row.columns.get("answers") for row in rows]
    if any(texts is None for texts in found):
        return None
    for row, texts in zip(rows, found, strict=True):
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"answers: expected a list of texts in {row.where}, got {texts!r:.60}")
    return [list(texts) for texts in found if texts is not None]


def _joined(arrays: Iterable[Any]) -> Tensor:
    return torch.from_numpy(np.concatenate(list(arrays)))
