import pytest

pytest.importorskip("transformers", reason="the trainer's packages are not installed")

import torch
from tokcredit.analyze.study import Pair
from tokcredit.train import tiny

WORDS = tiny.tokenizer()


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """The embedded models are made anew, outside the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def pair():
    """Two random models, far from uniform and from each other, which end replies at a tenth of the tokens."""
    models = [tiny.model(WORDS, seed).eval() for seed in (0, 1)]
    with torch.no_grad():
        for model in models:
            model.generation_config.eos_token_id = [1, *range(20, 28)]
            for p in model.parameters():
                p.mul_(2.0)
    return Pair(*models, WORDS, len(WORDS), torch.tensor([1, *range(20, 28)]))


@pytest.fixture
def folders(pair, tmp_path):
    """The two models in folders."""
    names = [str(tmp_path / name) for name in ("first", "second")]
    for model, name in zip(pair[:2], names, strict=True):
        model.save_pretrained(name)
        WORDS.save_pretrained(name)
    return names
