"""A flavour of the emulated module, and the library that runs its kernels."""

import ctypes
import importlib.util
import subprocess
from pathlib import Path

from .build import build


class Emulator:
    """The native module whose kernels run on the host; it takes CPU tensors."""

    def __init__(self, flavour, path=None):
        path = path or build(flavour)
        spec = importlib.util.spec_from_file_location("_C", path)
        self.module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self._library = str(path.with_name(f"libkernels_{flavour}.so"))
        self._control = ctypes.CDLL(self._library)
        self._control.emulation_reports.restype = ctypes.c_char_p
        for count in ("accesses", "launches", "allocations"):
            getattr(self._control, f"emulation_{count}").restype = ctypes.c_uint64

    def seed(self, number):
        """Whose turn it is in the launches that follow is a function of this number."""
        self._control.emulation_seed(ctypes.c_uint64(number))

    def accesses(self):
        """Accesses to memory that were checked so far."""
        return self._control.emulation_accesses()

    def reports(self):
        """What was found since the last call, with the places in the sources."""
        return [self._symbolised(line) for line in self._control.emulation_reports().decode().splitlines()]

    def longest_chain(self, call):
        """How many waits for other threads lie one after the other in ``call()``, on a device that holds the grid."""
        self._control.emulation_lockstep(1)
        self._control.emulation_longest_chain()
        try:
            call()
        finally:
            self._control.emulation_lockstep(0)
        return self._control.emulation_longest_chain()

    def work_of_host(self, call):
        """How many kernels and fills ``call()`` launches, a primitive of CUB as one, and how often it takes scratch."""
        self._control.emulation_launches()
        self._control.emulation_allocations()
        call()
        return self._control.emulation_launches(), self._control.emulation_allocations()

    def _symbolised(self, line):
        offset, what = line.split(" ", 1)
        found = subprocess.run(["addr2line", "-i", "-e", self._library, offset], capture_output=True, text=True)
        return f"{what}: {' < '.join(Path(p).name for p in found.stdout.split() if '/' in p)}"
