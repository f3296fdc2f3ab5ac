import pytest
import torch
from tokcredit.train import ObjectiveSettings, OptimizerSettings, SamplingSettings, Settings
from uniform import UniformSampler


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
            "reward": "uniform:digest",
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


@pytest.fixture
def uniform(monkeypatch):
    """Trainers sample with :class:`UniformSampler`, so that no test depends on what a model says."""
    monkeypatch.setattr("tokcredit.train.trainer.TransformersSampler", UniformSampler)


@pytest.fixture
def gradients(monkeypatch):
    """Gradients of the optimizer steps of any trainer: one flat tensor for each, before they are scaled."""
    found = []

    def keep(accelerator, parameters, norm):
        found.append(torch.cat([p.grad.reshape(-1).clone() for p in parameters if p.grad is not None]))
        return found[-1].norm()

    monkeypatch.setattr("accelerate.Accelerator.clip_grad_norm_", keep)
    return found
