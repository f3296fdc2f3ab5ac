import pytest
from tokcredit.train import ObjectiveSettings, OptimizerSettings, SamplingSettings, Settings


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """The embedded models are made anew, outside the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def settings(tmp_path):
    """A run of a random model that takes seconds."""

    def make(method="tempo", **changes):
        sampling = SamplingSettings(prompts=2, group=4, max_tokens=6, widths=(2, 2))
        optimizer = OptimizerSettings(lr=1e-3, micro_batch=3, precision="no")
        defaults = {
            "model": "tiny(steps=0)",
            "objective": ObjectiveSettings(method),
            "sampling": sampling,
            "optimizer": optimizer,
            "reward": "test_experiment:digits",
            "tasks": ("addition(digits=1)",),
            "steps": 5,
            "eval_every": 2,
            "eval_problems": 4,
            "save_every": 2,
            "rollouts_every": 2,
            "output": tmp_path / "run",
        }
        return Settings(**(defaults | changes))

    return make
