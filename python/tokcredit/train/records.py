"""Records of JSONL files and of data sets on disk, and the messages of chats in them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from tokcredit.files import parsed
from tokcredit.settings import is_unicode
from tokcredit.train.problems import Message


class Record(NamedTuple):
    """One object of a file.

    Attributes:
        place: File and line, or folder and row.
        values: Values by name.
        text: How an error shows it.
    """

    place: str
    values: dict[str, Any]
    text: str

    def expected(self, option: str, what: str, got: Any) -> ValueError:
        """Return an error about the record.

        Args:
            option: Name of the option that named the file.
            what: What was expected.
            got: What was found, as it is shown.
        """
        return ValueError(f"{option}: {self.place}: expected {what}, got {got}")


def of_file(option: str, path: str, names: Collection[str]) -> Iterator[Record]:
    """Yield the objects of a JSONL file in UTF-8. Only a line feed ends a line.

    Args:
        option: Name of the option that named the file, for errors.
        path: The file.
        names: Keys that every object must have.

    Raises:
        ValueError: The file cannot be read, or a line is no object with these keys.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{option}: expected a JSONL file in UTF-8, got {path!r}: {error}") from None
    # Only a line feed ends a line of JSON. str.splitlines also splits at U+2028 and others, which a string may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _of_line(option, f"{path}:{number}", line, names)


def _of_line(option: str, place: str, line: str, names: Collection[str]) -> Record:
    wanted = f"a JSON object {{{', '.join(map(repr, names))}}}"
    record = Record(place, {}, f"{line[:100]!r}")
    values = parsed(line, place, option)
    if not isinstance(values, dict) or not set(names) <= values.keys():
        raise record.expected(option, wanted, record.text)
    if not is_unicode(shown := json.dumps([values[name] for name in names], ensure_ascii=False)):
        raise record.expected(option, "texts without lone surrogates", ascii(shown))
    return record._replace(values=values)


def of_folder(option: str, path: str, names: Collection[str]) -> Iterator[Record]:
    """Yield the rows of a data set that ``datasets.Dataset.save_to_disk`` wrote. Rows are read when they are needed.

    Args:
        option: Name of the option that named the folder, for errors.
        path: The folder.
        names: Columns that it must have.

    Raises:
        ValueError: It is no such folder, or has several splits, or lacks a column.
    """
    if find_spec("datasets") is None:
        raise ImportError(f"{option}: a folder needs the package datasets: pip install datasets")
    import datasets

    try:
        data = datasets.load_from_disk(path)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{option}: expected a folder of save_to_disk, got {path!r}: {error}") from None
    if isinstance(data, datasets.DatasetDict):
        raise ValueError(f"{option}: expected the folder of a split, one of {', '.join(data)} in {path}, got all")
    if missing := set(names) - set(data.column_names):
        have = ", ".join(data.column_names)
        raise ValueError(
            f"{option}: {path}: expected the columns {', '.join(names)}, got {have} without {min(missing)}"
        )
    for number, values in enumerate(data):
        yield Record(f"{path}, row {number}", values, f"{str(values)[:100]!r}")


def messages(chat: Any) -> tuple[Message, ...] | None:
    """Return the messages of a chat, or None if it is none.

    Args:
        chat: Objects with a role and a content, which is a text, or parts of it as of multimodal chats.
    """
    if not isinstance(chat, list) or not chat:
        return None
    found = []
    for message in chat:
        if not isinstance(message, dict):
            return None
        # A column of a data set has the keys of all its messages, with nulls.
        message = {name: x for name, x in message.items() if x is not None}
        if set(message) != {"role", "content"}:
            return None
        content = message["content"]
        if isinstance(content, list):
            texts = [p.get("text") if isinstance(p, dict) and p.get("type") == "text" else None for p in content]
            content = "".join(map(str, texts)) if all(isinstance(text, str) for text in texts) else None
        if not isinstance(message["role"], str) or not isinstance(content, str):
            return None
        found.append(Message(message["role"], content))
    return tuple(found)
