"""A pytest plug-in that runs every native call twice, by the emulated kernels and by the CPU's code, and compares.

``python -m pytest -p tests.emulation.plugin -m gpu``: the "cuda" parameters of the suite, on CPU tensors.
"""

import functools

import pytest
from tokcredit import _C

from .emulator import Emulator
from .operations import SIGNATURES, run_both

TOO_LARGE = {"test_above_the_size_torch_refuses"}  # the emulator runs about a million tokens a second
calls = 0
emulator = Emulator("plain")


def twin(op, emulated, host):
    @functools.wraps(host)
    def call(*arguments):
        global calls
        calls += 1
        if found := run_both(op, emulated, host, arguments):
            pytest.fail("; ".join(found))

    return call


def pytest_configure():
    for op in SIGNATURES:
        setattr(_C, op, twin(op, getattr(emulator.module, op), getattr(_C, op)))


def pytest_collection_modifyitems(items):
    for item in items:
        if item.originalname in TOO_LARGE:
            item.add_marker(pytest.mark.skip("too large for the emulator"))


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"emulated: {calls} native calls compared with the CPU's")
