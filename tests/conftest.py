import sys
from pathlib import Path

import hypothesis
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
hypothesis.settings.register_profile("tests", deadline=None, max_examples=60, derandomize=True)
hypothesis.settings.load_profile("tests")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        from tokcredit import _C

        if not _C.build_info()["cuda"]:
            pytest.skip("built without CUDA")
    return request.param
