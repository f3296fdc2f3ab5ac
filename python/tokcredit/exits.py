"""How a command ends: with one line for a known error, a traceback for any other, and 128 + n for signal n."""

from __future__ import annotations

import os
import re
import signal
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

_PACKAGE = Path(__file__).parent
_STANDARD = Path(sysconfig.get_paths()["stdlib"])
_NAMES = re.compile(r"(step \d+|[\w.-]+(, [\w.-]+)*): ")


def is_known(error: BaseException, typed: Sequence[str]) -> bool:
    """Return whether one line says all about an error: the package raised it about a setting, or a file is missing.

    An error in which code of the user took part is never known, nor is one that was not foreseen.

    Args:
        error: The error.
        typed: Arguments of the command line, which may name a module of the user as ``module:function``.
    """
    modules = {x.split(".")[0] for t in typed for x in re.findall(r"^(?:.*=)?([\w.]+):\w+$", t)} - {"tokcredit"}
    frames = [frame for one in _chain(error) for frame, _ in traceback.walk_tb(one.__traceback__)]
    if any(_is_of_user(frame, modules) for frame in frames):
        return False
    if isinstance(error, OSError | ImportError):
        return True
    *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
    foreseen = isinstance(error, TypeError | ValueError | RuntimeError) and _NAMES.match(str(error)) is not None
    return foreseen and _file(innermost).is_relative_to(_PACKAGE)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _file(frame: FrameType) -> Path:
    return Path(frame.f_code.co_filename)


def _is_of_user(frame: FrameType, modules: set[str]) -> bool:
    if str(frame.f_globals.get("__name__", "")).split(".")[0] in modules:
        return True
    file = _file(frame)
    installed = {"site-packages", "dist-packages"} & set(file.parts)
    ours = file.is_relative_to(_PACKAGE) or file.is_relative_to(_STANDARD)
    return file.is_absolute() and not installed and not ours


@contextmanager
def signals() -> Iterator[Callable[[signal.Signals], signal.Signals]]:
    """Interrupt on SIGTERM as on SIGINT, and note which signal came first, also while others handle it.

    Yields:
        Function that returns the first of these signals so far, or its argument if there was none.
    """
    reader, writer = os.pipe()
    for end in (reader, writer):
        os.set_blocking(end, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)

    def first(otherwise: signal.Signals) -> signal.Signals:
        try:
            received = os.read(reader, 4096)
        except BlockingIOError:
            received = b""
        return next((signal.Signals(x) for x in received if x in (signal.SIGINT, signal.SIGTERM)), otherwise)

    try:
        yield first
    finally:
        signal.signal(signal.SIGTERM, handler)
        signal.set_wakeup_fd(before)
        os.close(reader)
        os.close(writer)
