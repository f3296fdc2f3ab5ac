"""Pairs from files with rollouts: one file is in memory at a time, and each pair is written when it is made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from tokcredit.files import whole
from tokcredit.pairs.choosing import choose
from tokcredit.pairs.settings import PairsSettings
from tokcredit.report import formats, records
from tokcredit.report.columns import array
from tokcredit.report.formats import Row
from tokcredit.report.readers import files
from tokcredit.report.vocabulary import load_tokenizer


def make(settings: PairsSettings) -> dict[str, int]:
    """Write pairs as JSONL, whole or not at all, and return counts by name.

    Each line has ``prompt``, ``chosen`` and ``rejected`` as TRL has them: texts, or messages where the run has a chat
    template. Where the run holds token ids, ``prompt_ids``, ``chosen_ids`` and ``rejected_ids`` have them exactly, and
    ``chosen_mask`` and ``rejected_mask`` mark the tokens that the policy chose if it did not choose all.

    Args:
        settings: Where rollouts are read from, and how pairs are chosen.

    Raises:
        ValueError: The rollouts cannot be read, or no group has a pair.
    """
    found = files(settings.path)
    counts = dict.fromkeys(("pairs", "groups", "groups_without"), 0)
    writer = _Writer(settings, found[0].parent)
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    with whole(settings.output) as new, new.open("w", encoding="utf-8") as out, tqdm(found, unit="file") as bar:
        for file in bar:
            for group in _groups(file, settings):
                lines = [writer.line(*pair) for pair in _pairs(group, settings)]
                out.writelines(json.dumps(line) + "\n" for line in lines)
                counts["pairs"] += len(lines)
                counts["groups"] += 1
                counts["groups_without"] += not lines
            bar.set_postfix(counts)
        if not counts["pairs"]:
            raise ValueError(
                f"path: expected a group with different responses whose rewards differ by more than {settings.gap:g}, "
                f"got {counts['groups']} groups without one in {settings.path}"
            )
    return counts


def _groups(file: Path, settings: PairsSettings) -> Iterator[list[Row]]:
    """Yield the rows of each group of a file that have a reward; rows that continue other prompts are another group."""
    read, _ = records.load(file)
    if not read:
        return
    groups: dict[Any, list[Row]] = {}
    trajectories: set[Any] = set()
    for row in formats.rows(read, file, settings.rewards):
        if (number := row.columns.get("trajectory")) is not None:
            if (key := (row.columns.get("step"), number)) in trajectories:
                raise ValueError(f"path: expected episodes of one row, got another row of one in {row.where}")
            trajectories.add(key)
        ids = _ids(row, "prompt_tokens") if row.columns.get("prompt_tokens") is not None else ()
        groups.setdefault((row.columns.get("step"), row.group, row.prompt, *ids), []).append(row)
    for group in groups.values():
        yield [row for row in group if row.scored]


def _pairs(group: list[Row], settings: PairsSettings) -> Iterator[tuple[Row, Row]]:
    responses = [_ids(row) if row.pieces is None else "".join(text for text, _ in row.pieces) for row in group]
    numbers = choose(settings.choose, [row.reward for row in group], responses, settings.gap, settings.per_group)
    for chosen, rejected in numbers:
        yield group[chosen], group[rejected]


def _ids(row: Row, name: str = "tokens") -> list[int]:
    ids: list[int] = array(name, row.columns[name], "integer", row.where).tolist()
    return ids


class _Writer:
    """Turns two rows into a line.

    Args:
        settings: Settings of the pairs.
        folder: Folder of the run.
    """

    def __init__(self, settings: PairsSettings, folder: Path) -> None:
        beside = folder / "tokenizer"
        name = settings.tokenizer or (str(beside) if beside.is_dir() else None)
        self._tokenizer = load_tokenizer(name) if name is not None else None
        self._with_ids = not settings.texts_only
        written = folder / "settings.json"
        of_run = records.parsed(written.read_bytes(), str(written)) if written.exists() else {}
        self._system = (of_run.get("chat") or {}).get("system_prompt")

    def line(self, chosen: Row, rejected: Row) -> dict[str, Any]:
        said = {"chosen": self._said(chosen), "rejected": self._said(rejected)}
        prompt = chosen.asked
        if self._is_chat(chosen):
            system = [] if self._system is None else [{"role": "system", "content": self._system}]
            prompt = [*system, {"role": "user", "content": chosen.prompt}]
            said = {name: [{"role": "assistant", "content": text}] for name, text in said.items()}
        line: dict[str, Any] = {"prompt": _plain("prompt", prompt, chosen)}
        line |= {
            name: _plain(name, text, row) for (name, text), row in zip(said.items(), (chosen, rejected), strict=True)
        }
        if self._with_ids and chosen.columns.get("prompt_tokens") is not None and chosen.pieces is None:
            line["prompt_ids"] = [token for token in _ids(chosen, "prompt_tokens") if token >= 0]
            for name, row in (("chosen", chosen), ("rejected", rejected)):
                line[f"{name}_ids"] = _ids(row)
                mask = row.columns.get("response_mask")
                if mask is not None and not np.all(mask):
                    line[f"{name}_mask"] = array("response_mask", mask, "bool", row.where).tolist()
        return line

    def _is_chat(self, row: Row) -> bool:
        """Return whether the trainer asked with a chat template. Files without token ids keep what they have."""
        with_template = self._tokenizer is not None and self._tokenizer.chat_template is not None
        return with_template and row.pieces is None and isinstance(row.asked, str)

    def _said(self, row: Row) -> Any:
        if row.said is not None:
            return row.said
        if self._tokenizer is None:
            raise ValueError(f"tokenizer: expected one because {row.where} has token ids and no text, got None")
        return self._tokenizer.decode(_ids(row), skip_special_tokens=True)


def _plain(name: str, said: Any, row: Row) -> Any:
    """Return a text, or messages without nulls, which a Parquet table has where other messages have a key."""
    if isinstance(said, str):
        return said
    if not isinstance(said, list) or not all(isinstance(message, Mapping) for message in said):
        raise ValueError(f"{name}: expected text or messages in {row.where}, got {said!r:.60}")
    return [{key: x for key, x in message.items() if x is not None} for message in said]
