import pytest

pytest.importorskip("transformers", reason="the trainer's packages are not installed")
