import pytest

pytest.importorskip("transformers", reason="the trainer's packages are not installed")

import torch
from bigrams import TOKENIZER, as_pair, scripted
from tokcredit.train import tiny


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """The embedded models are made anew, outside the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def pair():
    """Two random models in float64, in which no decision is a matter of rounding; nine tokens end a response."""
    models = [tiny.model(TOKENIZER, seed).eval().double() for seed in (0, 1)]
    with torch.no_grad():
        for model in models:
            model.generation_config.eos_token_id = [1, *range(20, 28)]
            for p in model.parameters():
                p.mul_(2.0)
    return as_pair(*models)


@pytest.fixture
def apart():
    """Two scripted models that agree on the first token, 7 or 8, and then write 1 or 2, and a or b."""
    return as_pair(*(scripted({"=": ("7", "8")}, tokens) for tokens in (("1", "2"), ("a", "b"))))


@pytest.fixture
def save(tmp_path):
    """Writes models into folders and returns the names of these."""

    def written(*models):
        names = [str(tmp_path / f"model-{i}") for i in range(len(models))]
        for model, name in zip(models, names, strict=True):
            model.save_pretrained(name)
            TOKENIZER.save_pretrained(name)
        return names

    return written
