"""A function that does what it is told, for the tests of bounded calls. It runs in their worker."""

import ctypes
import os
import signal
import time


def act(kind, value=0.0):
    if kind == "power":
        return float(9**9**9**9 > 0)
    if kind == "loop":
        while True:
            pass
    if kind == "swallow":
        while True:
            try:
                while True:
                    pass
            except BaseException:
                pass
    if kind == "sleep":
        time.sleep(1e6)
    if kind == "memory":
        return float(len(bytearray(1 << 40)))
    if kind == "recursion":
        return act("recursion")
    if kind == "crash":
        ctypes.string_at(0)
    if kind == "exit":
        os._exit(0)
    if kind == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if kind == "kill the worker":
        with open(value, "a") as file:
            file.write(f"{os.getpid()}\n")
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(1e6)
    if kind == "raise":
        raise ValueError("a reason")
    if kind == "text":
        return "seven"
    if kind == "none":
        return None
    return {"process": float(os.getpid()), "worker": float(os.getppid())}.get(kind, value)


def modules(name):
    """The number of imported modules that begin with a name."""
    import sys

    return float(sum(module.split(".")[0] == name for module in sys.modules))
