"""The formats of trainers: which columns hold the prompt, the group, the response and its reward."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from tokcredit.report.columns import scalar
from tokcredit.report.records import Record

_SURROGATE = re.compile("[\ud800-\udfff]")
_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?([eE][-+]?\d+)?")
_KEY = re.compile(r"(.+)_(\d+)_(\d+)")
_PADDING = re.compile("pad[0-9a-f]{32}")  # group of the rows that verl adds, so that every rank has as many
PAIR = frozenset({"chosen", "rejected"})
"""Columns of a file of pairs."""


@dataclass(frozen=True)
class Row:
    """One rollout of a file.

    Attributes:
        where: Row and file, for errors.
        group: What all rollouts of its group have in common.
        prompt: Text of the prompt.
        reward: The reward; 0 if it has none.
        scored: Whether it has a reward. A row without one does not count in its group.
        pieces: Text of the response, in pieces with whether the policy wrote them, or None where there are token ids.
        columns: Further columns under the names of this package, among them ``tokens`` where the file has token ids.
        asked: The prompt as the file has it: a text, messages, or None.
        said: The response as the file has it: a text, messages, or None where there are only token ids.
    """

    where: str
    group: Any
    prompt: str
    reward: float
    scored: bool
    pieces: Sequence[tuple[str, bool]] | None
    columns: Record
    asked: Any
    said: Any


def rows(records: Sequence[Record], file: Path, rewards: Mapping[str, float] | None = None) -> list[Row]:
    """Return the rollouts of a file.

    Args:
        records: Records of the file, at least one.
        file: The file, for errors.
        rewards: Weights of the columns whose sum is the reward, or None for the usual column.

    Raises:
        ValueError: A record lacks a column or has a value of the wrong kind, or pairs have rewards.
    """
    if rewards is not None and not rewards:
        raise ValueError("rewards: expected at least one column, got none")
    numbered = [(record, f"row {number} of {file}") for number, record in enumerate(records)]
    for columns, make in (({"output", "score"}, _verl), ({"completion", "advantage"}, _trl), (PAIR, _pairs)):
        if all(columns <= record.keys() for record in records):
            return make(numbered, file, rewards)
    return [_plain(record, where, rewards) for record, where in numbered]


def _plain(record: Record, where: str, rewards: Mapping[str, float] | None) -> Row:
    """Return a row whose columns have the names of this package."""
    reward, scored = _reward(record, where, "reward", rewards)
    prompt, pieces = record.get("prompt"), None
    said = "text" if record.get("text") is not None else "completion"
    if record.get("tokens") is None:
        if record.get(said) is None:
            raise ValueError(f"tokens or text: expected one of them in {where}, got neither")
        pieces = _pieces(said, record, where)
    group = record["group"] if "group" in record else _asked(prompt, where)
    # A null, or NaN where a column has numbers, is no group: such a row has nothing in common with another.
    group = where if group is None or group != group else ("group" in record, repr(group))
    return Row(where, group, _text(prompt), reward, scored, pieces, record, prompt, record.get(said))


def _trl(records: Sequence[tuple[Record, str]], file: Path, rewards: Mapping[str, float] | None) -> list[Row]:
    """Return the rows of a table of TRL, in which neighbours with the same prompt are a group."""
    rewards = rewards or {_reward_column([record for record, _ in records], file): 1.0}
    groups = groupby(records, key=lambda numbered: repr(_asked(numbered[0].get("prompt"), numbered[1])))
    return [
        Row(
            where,
            group,
            _text(record.get("prompt")),
            *_reward(record, where, "", rewards),
            _pieces("completion", record, where),
            {},
            record.get("prompt"),
            record["completion"],
        )
        for group, (_, block) in enumerate(groups)
        for record, where in block
    ]


def _reward_column(records: Sequence[Record], file: Path) -> str:
    """Return the only column of floats between completion and advantage, where TRL writes rewards and ``log_extra``."""
    names = list(records[0])
    between = names[names.index("completion") + 1 : names.index("advantage")]
    types = {name: {type(record.get(name)) for record in records} - {type(None)} for name in between}
    numbers = [name for name in between if types[name] == {float}]
    if not numbers:
        raise ValueError(f"rewards: expected a column of floats between completion and advantage in {file}, got none")
    if len(numbers) > 1:
        raise ValueError(
            f"rewards: expected a weight for each reward function among the columns {', '.join(numbers)} of {file}, "
            f"because TRL does not mark them, got none; for example --rewards {numbers[0]} 1"
        )
    return numbers[0]


def _verl(records: Sequence[tuple[Record, str]], file: Path, rewards: Mapping[str, float] | None) -> list[Row]:
    """Return the rows of a dump of verl. Its V1 trainers write a uid, ``GROUP_SESSION_OUTPUT``, and the older none.

    The outputs of a session are the turns of an episode.
    """
    found, parts, sessions = [], [], dict[Any, int]()
    for record, where in records:
        prompt, uid = record.get("input"), record.get("uid")
        group = ("input", repr(_asked(prompt, where))) if uid is None else ("uid", repr(uid))
        session: tuple[Any, ...] = (where,)
        turn = 0
        if key := _KEY.fullmatch(str(uid)):
            group, session, turn = ("uid", key[1]), key.group(1, 2), int(key[3])
            if _PADDING.fullmatch(key[1]):
                continue
        reward = _reward(record, where, "score", rewards, as_text=True)
        pieces = _pieces("output", record, where)
        parts.append({"trajectory": sessions.setdefault(session, len(sessions)), "turn": turn})
        found.append(Row(where, group, _text(prompt), *reward, pieces, {}, prompt, record["output"]))
    if len(sessions) == len(found):
        return found
    return [replace(row, columns=part) for row, part in zip(found, parts, strict=True)]


def _pairs(records: Sequence[tuple[Record, str]], file: Path, rewards: Mapping[str, float] | None) -> list[Row]:
    """Return two rows for each pair: the chosen response with the reward 1, and the rejected one with 0."""
    if rewards is not None:
        raise ValueError(f"rewards: expected none because {file} holds pairs, got {', '.join(rewards)}")
    return [
        _response(record, name, reward, where)
        for record, where in records
        for name, reward in (("chosen", 1.0), ("rejected", 0.0))
    ]


def _response(record: Record, name: str, reward: float, where: str) -> Row:
    """Return a response of a pair. A column of this package has the name of the response before its own."""
    columns = {key.removeprefix(f"{name}_"): x for key, x in record.items() if key.startswith(f"{name}_")}
    columns |= {"tokens": columns.get("ids"), "response_mask": columns.get("mask")}
    pieces = _pieces(name, record, where) if columns["tokens"] is None else None
    prompt = record.get("prompt")
    return Row(f"{name} of {where}", where, _text(prompt), reward, True, pieces, columns, prompt, record[name])


def _asked(prompt: Any, where: str) -> Any:
    """Return the prompt, which rows of a group have in common where nothing else tells the group."""
    if prompt is None:
        raise ValueError(f"group or prompt: expected one of them in {where}, got neither")
    return prompt


def _reward(
    record: Record, where: str, name: str, weights: Mapping[str, float] | None, as_text: bool = False
) -> tuple[float, bool]:
    """Return the number in a column, or the weighted sum of the columns that have one, and whether there is any."""
    values = {column: _number(column, record, where, as_text) for column in weights or (name,)}
    found = {column: x for column, x in values.items() if not (weights and math.isnan(x))}
    for column, x in found.items():
        if not math.isfinite(x):
            raise ValueError(f"{column}: expected a finite number in {where}, got {record[column]}")
    return float(sum((weights or {name: 1.0})[column] * x for column, x in found.items())), bool(found)


def _number(name: str, record: Record, where: str, as_text: bool) -> float:
    """Return a number of a record, NaN for null; verl writes some numbers as text."""
    if name not in record:
        raise ValueError(f"{name}: expected in {where}, got {', '.join(record)}")
    value = record[name]
    if as_text and isinstance(value, str) and _NUMBER.fullmatch(value):
        return float(value)
    return float(scalar(name, value, "float", where))


def _pieces(name: str, record: Record, where: str) -> list[tuple[str, bool]]:
    """Return the pieces of a response that is a text or chat messages. Roles are not part of it."""
    said = record[name]
    if isinstance(said, str):
        pieces = [(said, True)]
    elif isinstance(said, list) and all(isinstance(x, Mapping) and isinstance(x.get("role"), str) for x in said):
        pieces = [(_written(message), message["role"] == "assistant") for message in said]
    else:
        raise ValueError(f"{name}: expected text or chat messages in {where}, got {said!r:.60}")
    for text, _ in pieces:
        if lone := _SURROGATE.search(text):
            raise ValueError(
                f"{name}: expected text that UTF-8 can encode in {where}, got the lone surrogate "
                f"U+{ord(lone[0]):04X} at character {lone.start()}"
            )
    return pieces


def _written(message: Record) -> str:
    """Return what a chat message says: its reasoning, its content, and its tool calls as JSON."""
    parts = [_text(message.get(name)) for name in ("reasoning_content", "thinking", "content")]
    called = message.get("tool_calls") or []
    calls = [
        x.get("function", x) if isinstance(x, Mapping) else x
        for x in (called if isinstance(called, list) else [called])
    ]
    return "".join([*parts, *(json.dumps(_present(call), ensure_ascii=False, default=str) for call in calls)])


def _present(x: Any) -> Any:
    """Return mappings without nulls: in a Parquet table every call has the arguments of all functions."""
    return {name: _present(y) for name, y in x.items() if y is not None} if isinstance(x, Mapping) else x


def _text(said: Any) -> str:
    """Return the text of a string, of parts of a message, or of chat messages with their roles."""
    if isinstance(said, str):
        return said
    if isinstance(said, Mapping):
        return f"{said['role']}: {_written(said)}" if "role" in said else _text(said.get("text"))
    if isinstance(said, Sequence):
        messages = any(isinstance(x, Mapping) and "role" in x for x in said)
        return ("\n" if messages else "").join(map(_text, said))
    return "" if said is None else str(said)
