"""The program behind :class:`tokcredit.rewards.bounded.BoundedCalls`: it calls one function, in processes with limits.

It is started as a script, does not import torch, and has one thread. It imports the function once and
forks processes that call it, so a process that was killed is replaced at once. It ends when its connection closes.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import logging
import os
import resource
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Limits:
    """Limits of a call.

    Attributes:
        seconds: Processor time.
        wall_seconds: Time.
        memory: Bytes of address space beyond those of this program.
        processes: Number of calls at once.
    """

    seconds: float
    wall_seconds: float
    memory: int
    processes: int


class _Process:
    """A process that calls the function, and the number of the call that it works on."""

    def __init__(self, function: Callable[..., Any], limits: Limits, inherited: list[Connection]) -> None:
        self.number: int | None = None
        self.deadline = 0.0
        self._limits = limits
        self.connection, theirs = Pipe()
        self.pid = os.fork()
        if self.pid == 0:
            # Open copies of these would hide the death of this program from the processes at their other ends.
            for connection in (*inherited, self.connection):
                connection.close()
            _call_until_closed(function, theirs, limits)
        theirs.close()

    def start(self, number: int, arguments: tuple[Any, ...]) -> None:
        self.number, self.deadline = number, time.monotonic() + self._limits.wall_seconds
        self.connection.send(arguments)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.reap()

    def reap(self) -> int:
        """Return the number of the signal that ended the process, or 0."""
        self.connection.close()
        _, status = os.waitpid(self.pid, 0)
        return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def _call_until_closed(function: Callable[..., Any], connection: Connection, limits: Limits) -> None:
    """Answer the calls of a connection, then end the process."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPROF, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        _limit(resource.RLIMIT_AS, _address_space() + limits.memory)
        _limit(resource.RLIMIT_CORE, 0)
        while True:
            arguments = connection.recv()
            # The default action of both signals ends the process, also inside of a long C function, and also if nobody
            # watches it any more.
            signal.setitimer(signal.ITIMER_PROF, limits.seconds)
            signal.setitimer(signal.ITIMER_REAL, limits.wall_seconds)
            try:
                value = function(*arguments)
                answer = json.dumps({"value": value if isinstance(value, dict) else float(value)})
            except Exception as error:
                answer = json.dumps({"failure": f"{type(error).__name__}: {str(error)[:200]}"})
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            connection.send_bytes(answer.encode())
    except (EOFError, OSError):
        os._exit(0)
    except BaseException:
        os._exit(1)


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    soft = value if hard == resource.RLIM_INFINITY else min(value, hard)
    try:
        resource.setrlimit(kind, (soft, hard))
    except (ValueError, OSError):  # macOS refuses limits of the address space
        return


def _address_space() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 0


def _serve(function: Callable[..., Any], limits: Limits, parent: Connection) -> None:
    processes: list[_Process] = []
    try:
        while True:
            waiting = deque(enumerate(parent.recv()))
            while waiting or any(p.number is not None for p in processes):
                for process in [p for p in processes if p.number is None]:
                    if waiting:
                        process.start(*waiting.popleft())
                while waiting and len(processes) < limits.processes:
                    processes.append(_Process(function, limits, [parent, *(p.connection for p in processes)]))
                    processes[-1].start(*waiting.popleft())
                _answer(parent, processes, limits)
    except (EOFError, OSError):
        return
    finally:
        for process in processes:
            process.kill()


def _answer(parent: Connection, processes: list[_Process], limits: Limits) -> None:
    """Wait for a result or a deadline, send what is known, and forget processes that ended."""
    busy = [p for p in processes if p.number is not None]
    patience = min(p.deadline for p in busy) - time.monotonic()
    ready = wait([parent, *(p.connection for p in busy)], min(max(patience, 0), 60))
    if parent in ready:  # nothing more is sent to this program before its last answer, so the connection is closed
        raise EOFError
    for process in busy:
        answer = None
        if process.connection in ready:
            try:
                answer = json.loads(process.connection.recv_bytes())
            except (EOFError, OSError):
                answer = {"failure": _death(process.reap(), limits)}
                processes.remove(process)
        elif process.deadline <= time.monotonic():
            process.kill()
            processes.remove(process)
            answer = {"failure": f"no result within {limits.wall_seconds:g} s"}
        if answer is not None:
            parent.send_bytes(json.dumps({"number": process.number, **answer}).encode())
            process.number = None


def _death(number: int, limits: Limits) -> str:
    if number == signal.SIGPROF:
        return f"no result within {limits.seconds:g} s of processor time"
    if number == signal.SIGALRM:
        return f"no result within {limits.wall_seconds:g} s"
    return f"the process died of {signal.Signals(number).name}" if number else "the process ended"


def main() -> None:
    """Serve the connection whose file descriptor is the only argument."""
    parent = Connection(int(sys.argv[1]))
    sys.path[:], file, name, limits = parent.recv()
    # Modules of this package are imported without the package itself, which imports torch.
    here = os.path.dirname(os.path.abspath(__file__))
    for package, folder in (("tokcredit", os.path.dirname(here)), ("tokcredit.rewards", here)):
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = [folder]
    logging.disable(logging.CRITICAL)
    try:
        spec = importlib.util.spec_from_file_location("bounded_function", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        function = getattr(module, name)
        getattr(module, "prepare", lambda: None)()
    except Exception:
        parent.send_bytes(json.dumps({"failure": traceback.format_exc()}).encode())
        return
    parent.send_bytes(json.dumps({}).encode())
    # Collections in the forked processes would copy the pages that they share with this program.
    gc.freeze()
    _serve(function, Limits(*limits), parent)


if __name__ == "__main__":
    main()
