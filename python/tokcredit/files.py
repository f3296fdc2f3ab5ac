"""Files and folders that are whole or absent, and errors that say what could not be written or read."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


class WriteError(OSError):
    """A file or a folder could not be written. The message names it, the reason, and how much space is free."""


@contextmanager
def naming(path: Path, setting: str = "output") -> Iterator[None]:
    """Raise :class:`WriteError` where a block that writes a file or a folder fails because of the disk.

    Args:
        path: The file or folder.
        setting: Name of the setting that chose its place.

    Raises:
        WriteError: The disk is full, is read-only, or refuses the write otherwise.
    """
    try:
        yield
    except WriteError:
        raise
    except Exception as error:
        if (reason := _reason(error)) is None:
            raise
        raise WriteError(f"{setting}: expected to write {path}, got {reason} ({_free(path)} free)") from error


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield another name for a file, which then takes its own: whole or not at all.

    Args:
        path: The file.

    Raises:
        WriteError: It could not be written.
    """
    new = path.with_name(path.name + ".new")
    with naming(path):
        try:
            yield new
            new.replace(path)
        except BaseException:
            with suppress(OSError):
                new.unlink(missing_ok=True)
            raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder which then takes the place of another, whole or not at all.

    Args:
        path: The folder to replace.

    Raises:
        WriteError: It could not be written.
    """
    new, old = (path.with_name(path.name + ending) for ending in (".new", ".old"))
    with naming(path):
        for folder in (new, old):
            shutil.rmtree(folder, ignore_errors=True)
        try:
            new.mkdir()
            yield new
            if path.exists():
                path.rename(old)
            new.rename(path)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        shutil.rmtree(old, ignore_errors=True)


def write(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all.

    Args:
        path: The file.
        text: Its text. What UTF-8 cannot say, such as a lone surrogate, becomes a question mark.

    Raises:
        WriteError: It could not be written.
    """
    with whole(path) as new:
        new.write_text(text, encoding="utf-8", errors="replace")


def read_json(path: Path) -> Any:
    """Return what a JSON file of a run says, or None without a file.

    Args:
        path: The file.

    Raises:
        ValueError: The file is not JSON.
    """
    return parsed(path.read_bytes(), str(path), "output") if path.exists() else None


def parsed(text: str | bytes, where: str, setting: str) -> Any:
    """Return what a JSON text says.

    Args:
        text: The text.
        where: Where it stands, for errors.
        setting: Name of the setting that chose its place.

    Raises:
        ValueError: The text is not JSON; the message has the place in the text.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, " if error.lineno > 1 else ""
        reason = f"{error.msg} at {at}column {error.colno}"
    except (ValueError, RecursionError) as error:
        reason = str(error)
    raise ValueError(f"{setting}: expected JSON in {where}, got {reason}")


def _reason(error: Exception) -> str | None:
    """Return why the disk refused a write, or None for another error; some libraries have errors of their own."""
    text = str(error)
    if isinstance(error, OSError):
        return os.strerror(error.errno) if error.errno else text
    if found := re.search(r"\(os error (\d+)\)", text):
        return os.strerror(int(found[1]))
    if isinstance(error, RuntimeError) and re.search(r"inline_container\.cc|iostream error", text):
        found = re.search(r"strerror: (.+)", text)
        return found[1] if found else "a file that ended early"
    return None


def _free(path: Path) -> str:
    folder = next((x for x in path.absolute().parents if x.is_dir()), Path())
    return f"{shutil.disk_usage(folder).free / 2**20:.1f} MiB"
