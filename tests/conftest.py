import sys
from importlib.util import find_spec
from pathlib import Path

import hypothesis
import pytest
import torch

# On a bare machine with torch alone the operations and methods are tested, and what needs further packages is not.
collect_ignore = (
    [] if find_spec("tyro") else ["test_cli.py", "test_inspect.py", "test_inspect_page.py", "train", "analyze"]
)

sys.path.insert(0, str(Path(__file__).parent))
hypothesis.settings.register_profile("tests", deadline=None, max_examples=60, derandomize=True)
hypothesis.settings.load_profile("tests")


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where a module's tensors are made: tests of operations run once on each device."""
    emulated = request.config.pluginmanager.has_plugin("tests.emulation.plugin")  # CUDA kernels take CPU tensors
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


def require_cuda():
    from tokcredit import _C

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if not _C.build_info()["cuda"]:
        pytest.skip("built without CUDA")
