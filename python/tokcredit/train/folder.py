"""Run folders: one process writes into a folder at a time, and a folder holds the results of one group of settings."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tokcredit.files import WriteError, naming, read_json, write
from tokcredit.train.ranks import on_main, processes


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder, which is made if it is missing. The main process of a run holds it for all of them.

    The system frees the lock when its process ends, however it ends. A folder that was made here and is still empty at
    the end is removed.

    Args:
        folder: The folder.

    Raises:
        ValueError: Another process holds the folder.
        WriteError: The folder cannot be written.
    """
    lock = FileLock(folder / ".lock")
    made = on_main(lambda: _acquire(lock, folder))
    try:
        yield
    finally:
        if processes().is_main_process:
            _release(lock, folder, made)


def _acquire(lock: FileLock, folder: Path) -> bool:
    """Take the lock and return whether the folder was made."""
    made, owner = not folder.exists(), folder / ".owner"
    with naming(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            name = owner.read_text() if owner.exists() else "another process"
            raise ValueError(f"output: expected a folder that is not in use, got {folder}, which {name} uses") from None
        try:
            write(owner, f"process {os.getpid()} on {socket.gethostname()}")
        except WriteError:
            _release(lock, folder, made)
            raise
    return made


def _release(lock: FileLock, folder: Path, made: bool) -> None:
    with suppress(OSError):
        (folder / ".owner").unlink(missing_ok=True)
        if made and [path.name for path in folder.iterdir()] == [".lock"]:
            (folder / ".lock").unlink()
            folder.rmdir()
    lock.release()


def plain(settings: Any) -> dict[str, Any]:
    """Return settings as a folder keeps them: as JSON values by name, without ``resume``, which is no part of a run.

    Args:
        settings: A dataclass, whose fields may be dataclasses too.
    """
    text = json.dumps(dataclasses.asdict(settings), default=str)
    return json.loads(text, object_pairs_hook=lambda pairs: {k: v for k, v in pairs if k != "resume"})


def check(
    folder: Path, settings: Mapping[str, Any], resume: bool, free: Collection[str], files: Collection[str]
) -> None:
    """Check that a run with these settings may write into a folder.

    Args:
        folder: Folder of the run.
        settings: Settings from :func:`plain`.
        resume: Whether the run in the folder is continued.
        free: Names of settings that may differ from those of the run in the folder.
        files: Patterns of the names that a run writes.

    Raises:
        ValueError: The folder has a run, and it is not resumed or its settings differ; or it has no run, but files of
            someone else that the run would overwrite.
    """
    before = read_settings(folder)
    if before is None:
        if taken := sorted(path.name for pattern in files for path in folder.glob(pattern)):
            raise ValueError(
                f"output: expected a folder without {taken[0]}, which a run would overwrite, or with the settings.json "
                f"of the run that wrote it, got {folder}"
            )
        return
    if not resume:
        raise ValueError(f"output: expected a folder without a run, or --resume, got {folder}")
    earlier = _flat(before)
    for name, value in _flat(settings).items():
        if name not in free and value != earlier.get(name):
            raise ValueError(
                f"{name}: expected {earlier.get(name)} as in the run in {folder}, or another output, got {value}"
            )


def read_settings(folder: Path) -> dict[str, Any] | None:
    """Return the settings of the run in a folder, or None without a run.

    Args:
        folder: Folder of the run.
    """
    return read_json(folder / "settings.json")


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of a run. From then on the folder has a run.

    Args:
        folder: Folder of the run.
        settings: Settings from :func:`plain`.
    """
    write(folder / "settings.json", json.dumps(settings, indent=2) + "\n")


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return single settings by name; the command line has the same names, without those of the groups."""
    out: dict[str, Any] = {}
    for name, value in settings.items():
        out |= _flat(value) if isinstance(value, dict) else {name: value}
    return out
