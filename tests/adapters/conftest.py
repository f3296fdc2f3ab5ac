import pytest


@pytest.fixture(scope="session")
def engines_stay():
    """vLLM tears down what the engines of a process share when one of them goes, so none goes before the last test."""
    from tokcredit.adapters import vllm

    made, start = [], vllm.LLM
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm, "LLM", lambda *args, **settings: made.append(start(*args, **settings)) or made[-1])
        yield
