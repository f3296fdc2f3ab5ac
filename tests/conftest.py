import signal
import sys
from importlib.util import find_spec
from pathlib import Path

import hypothesis
import pytest
import torch

# On a bare machine with torch alone the operations and methods are tested, and what needs further packages is not.
collect_ignore = [] if find_spec("tyro") else ["test_cli.py", "train", "analyze", "packing"]

sys.path.insert(0, str(Path(__file__).parent))
# A shell lets what it starts in the background ignore this signal, which tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)
hypothesis.settings.register_profile("tests", deadline=None, max_examples=60, derandomize=True)
hypothesis.settings.register_profile("fuzz", deadline=None, max_examples=1700)
hypothesis.settings.load_profile("tests")


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where a module's tensors are made: tests of operations run once on each device."""
    emulated = is_emulated(request.config)
    if request.param == "cuda" and not emulated:
        require_cuda()
    torch.set_default_device("cpu" if emulated else request.param)
    yield request.param
    torch.set_default_device(None)


@pytest.fixture(scope="module")
def cuda():
    """For tests that only make sense on a CUDA device."""
    require_cuda()
    return torch.device("cuda")


def is_emulated(config):
    """Whether the kernels of CUDA run on a host emulator, which takes CPU tensors."""
    return config.pluginmanager.has_plugin("tests.emulation.plugin")


def missing_cuda():
    """Why no test can run on a CUDA device, or None."""
    from tokcredit import _C

    if not torch.cuda.is_available():
        return "no CUDA device"
    return None if _C.build_info()["cuda"] else "built without CUDA"


def require_cuda():
    if reason := missing_cuda():
        pytest.skip(reason)


DESELECTED = pytest.StashKey[str]()


def pytest_collection_modifyitems(config, items):
    """Leave out tests of CUDA where there is none, and say so once instead of in a line for each."""
    if reason := missing_cuda():
        emulated = is_emulated(config)
        left_out = [
            item
            for item in items
            if item.get_closest_marker("gpu") and not (emulated and {"device", "emulator"} & set(item.fixturenames))
        ]
        if left_out:
            gone = set(left_out)
            items[:] = [item for item in items if item not in gone]
            config.hook.pytest_deselected(items=left_out)
            config.stash[DESELECTED] = f"{reason}: {len(left_out)} tests of CUDA left out"


def pytest_terminal_summary(terminalreporter, config):
    if line := config.stash.get(DESELECTED, None):
        terminalreporter.write_line(line)
