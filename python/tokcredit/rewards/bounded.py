"""Calls that are bounded in time and memory: a function that hangs or dies costs its own result and nothing else."""

from __future__ import annotations

import atexit
import json
import os
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, NamedTuple

_WORKER = Path(__file__).with_name("worker.py")
_START_SECONDS = 300.0
_STOP_SECONDS = 10.0


class Failure(NamedTuple):
    """What is returned in place of the result of a call that has none.

    Attributes:
        reason: Why: the call took too long, needed too much memory, killed its process, or raised an error.
    """

    reason: str


class BoundedCalls:
    """Calls of a function in worker processes, each with a limit of processor time, of time and of memory.

    The worker is a new program, not a fork of this one, so this process may hold a CUDA context and have threads. It
    starts with the first call and ends with this process. It is in a session of its own: Ctrl-C does not reach it.

    Args:
        file: Python file of the function. It should import little, because the worker imports it anew. If it has a
            function ``prepare``, the worker calls that first, without limits. Modules of this package that it imports
            are loaded without the package itself, which would import torch.
        function: Name of the function in the file. It returns a number, or a dict that JSON can hold.
        seconds: Limit of the processor time of a call, seconds.
        memory: Limit of the memory that a call allocates, bytes.
        processes: Number of calls at once, or None for the number of processors, at most 4.
    """

    def __init__(
        self, file: Path, function: str, seconds: float = 2.0, memory: int = 1 << 30, processes: int | None = None
    ) -> None:
        self._target = (str(file), function)
        # Time passes without processor time on a busy machine, and a result must not depend on how busy it is.
        self._limits = (seconds, 30 + 10 * seconds, memory, processes or min(4, os.cpu_count() or 1))
        self._lock, self._owner = threading.Lock(), os.getpid()
        self._program: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        atexit.register(_close, weakref.ref(self))

    def __call__(self, calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Return the result of each call, or a :class:`Failure`. Equal calls are made once.

        Args:
            calls: Arguments of each call, which must pickle.

        Raises:
            RuntimeError: The worker cannot start; the message has its traceback.
        """
        keys = [pickle.dumps(call) for call in calls]
        distinct = dict(zip(keys, calls, strict=True))
        with self._lock:
            if self._owner != os.getpid():  # a fork of this process needs a worker of its own
                self._connection, self._program, self._owner = None, None, os.getpid()
            found = dict(zip(distinct, self._results(list(distinct.values())), strict=True))
        return [found[key] for key in keys]

    def close(self) -> None:
        """End the worker. The next call starts another one."""
        if self._connection is not None:
            self._connection.close()
        if self._program is not None:
            # The worker sees that its connection is closed, and ends its processes before itself.
            try:
                self._program.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._program.kill()
                self._program.wait()
        self._connection = self._program = None

    def _results(self, calls: list[tuple[Any, ...]]) -> list[Any]:
        results: dict[int, Any] = {}
        deaths = 0
        try:
            while len(results) < len(calls):
                missing = [i for i in range(len(calls)) if i not in results]
                try:
                    connection = self._connection or self._started()
                    connection.send([calls[i] for i in missing])
                    for _ in missing:
                        answer = json.loads(connection.recv_bytes())
                        failure = answer.get("failure")
                        results[missing[answer["number"]]] = answer["value"] if failure is None else Failure(failure)
                except (EOFError, OSError):
                    self.close()
                    deaths += 1
                    if deaths > 2:
                        results |= {i: Failure("the worker died") for i in missing if i not in results}
        except BaseException:
            self.close()
            raise
        return [results[i] for i in range(len(calls))]

    def _started(self) -> Connection:
        self._connection, theirs = Pipe()
        with theirs:
            self._program = subprocess.Popen(
                [sys.executable, str(_WORKER), str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._connection.send((sys.path, *self._target, self._limits))
        if not self._connection.poll(_START_SECONDS):
            raise RuntimeError(f"worker: expected a start within {_START_SECONDS:g} s, got none")
        try:
            answer = json.loads(self._connection.recv_bytes())
        except EOFError:
            raise RuntimeError(f"worker: expected {self._target[0]} to import, but its process ended") from None
        if failure := answer.get("failure"):
            raise RuntimeError(f"worker: expected {self._target[0]} to import, got\n{failure}")
        return self._connection


def _close(calls: weakref.ref[BoundedCalls]) -> None:
    if (alive := calls()) is not None:
        alive.close()
