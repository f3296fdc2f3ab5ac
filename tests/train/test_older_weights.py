"""Rollouts that older weights, or weights in another dtype, sampled. No test depends on what a model says."""

import copy
import dataclasses

import pytest
import tokcredit as tc
import torch
from accelerate import Accelerator
from resuming import check_resumed
from tokcredit.train import ObjectiveSettings, OptimizerSettings, ProbeSettings, SamplingSettings, run
from tokcredit.train import trainer as trainer_module
from tokcredit.train.experiment import resolved
from tokcredit.train.scoring import score
from tokcredit.train.trainer import Trainer
from uniform import UniformSampler


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture
def made(settings):
    """Settings with a staleness, and other settings of sampling or of the run."""

    def make(staleness, method="grpo", changes=None, **others):
        sampling = dataclasses.replace(settings().sampling, staleness=staleness, **(changes or {}))
        return resolved(settings(method, sampling=sampling, **others))

    return make


@pytest.fixture
def sampled(monkeypatch):
    """The temperature and the weights of each call of a sampler that takes the weights over when it is told to."""
    found = []

    class Recording(UniformSampler):
        def sync(self):
            self.weights = flat(self.model)

        def sample(self, prompts, count, max_tokens, temperature, stop=()):
            found.append((temperature, self.weights))
            return super().sample(prompts, count, max_tokens, temperature, stop)

    monkeypatch.setattr("tokcredit.train.trainer.TransformersSampler", Recording)
    return found


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_a_step_samples_with_the_weights_of_so_many_steps_ago(made, sampled, staleness):
    trainer = Trainer(made(staleness))
    weights = []
    for number in range(1, 5):
        weights.append(flat(trainer.model))
        step = trainer.step(number)
        expected = weights[max(number - 1 - staleness, 0)]
        assert len(sampled) == 1 and sampled.pop()[1].equal(expected)
        batch = step.update.prepared.batch
        # The update starts from the newest weights, and the sampler's log-probs are those of the older ones.
        newest = score(_with(trainer.model, weights[-1]), batch)[0]
        older = score(_with(trainer.model, expected), batch)[0]
        torch.testing.assert_close(batch.rollout_log_probs, older, atol=1e-5, rtol=1e-5)
        known = ~step.update.log_probs.isnan()
        assert known.any() and not flat(trainer.model).equal(weights[-1])
        torch.testing.assert_close(step.update.log_probs[known], newest[known], atol=1e-5, rtol=1e-5)
        if staleness and number > 1:
            assert (newest - older).abs().max() > 1e-3, "the weights have moved"
    trainer.evaluate()
    assert sampled.pop()[1].equal(flat(trainer.model)), "held-out problems are solved by the policy itself"


@torch.no_grad()
def _with(model, weights):
    """Return a copy of a model with other weights."""
    other = copy.deepcopy(model)
    torch.nn.utils.vector_to_parameters(weights, other.parameters())
    return other


@pytest.mark.parametrize("method", ["vineppo", "remax"])
def test_greedy_responses_are_of_the_sampler_and_continuations_of_the_policy(made, sampled, method):
    probes = ProbeSettings(continuations=2, interval=2, below=1.0)
    trainer = Trainer(made(2, method, probes=probes))
    first = flat(trainer.model)
    trainer.step(1)
    second = flat(trainer.model)
    sampled.clear()
    trainer.step(2)
    (_, rollouts), *others = sampled
    assert rollouts.equal(first) and others
    assert all(x.equal(second if method == "vineppo" else first) for _, x in others)


def test_a_resumed_run_has_the_same_older_weights(made, sampled, tmp_path):
    check_resumed(made(2), tmp_path, after=(3, 4, 5))
    whole, resumed = ([x for _, x in part] for part in (sampled[:5], sampled[5:]))
    assert all(a.equal(b) for a, b in zip(whole, resumed, strict=True)) and not whole[3].equal(whole[0])


def test_an_adapter_keeps_only_what_it_trains(made, uniform):
    pytest.importorskip("peft")
    trainer = Trainer(made(1, adapter="lora(r=2)"))
    trainer.step(1)
    (kept,) = trainer.state_dict()["older_weights"]["kept"]
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert [x.shape for x in kept] == [p.shape for p in trained]
    assert sum(x.numel() for x in kept) < flat(trainer.model).numel() / 10


@pytest.mark.parametrize(
    ("training", "sampling", "dtype"),
    [
        ("no", "auto", None),
        ("no", "no", None),
        ("no", "bf16", torch.bfloat16),
        ("bf16", "auto", torch.bfloat16),
        ("bf16", "bf16", torch.bfloat16),
        ("bf16", "no", None),
    ],
)
def test_the_dtype_of_the_sampler(made, monkeypatch, training, sampling, dtype):
    seen = []

    def make(model, tokenizer, dtype, batch, adaptive):
        seen.append(dtype)
        return UniformSampler(model, tokenizer)

    monkeypatch.setattr(trainer_module, "TransformersSampler", make)
    # One process has one mixed precision.
    monkeypatch.setattr(trainer_module, "Accelerator", lambda mixed_precision: Accelerator())
    optimizer = OptimizerSettings(lr=1e-3, precision=training)
    objective = Trainer(made(0, changes={"sampling_precision": sampling}, optimizer=optimizer)).objective
    assert seen == [dtype]
    differs = sampling not in ("auto", training)
    assert objective.token_weights == ((tc.token_weights.tis(),) if differs else ())


def test_a_sampler_in_bfloat16_has_the_log_probs_of_the_rounded_weights(made):
    trainer = Trainer(made(0, changes={"sampling_precision": "bf16"}))
    with torch.no_grad():  # far from uniform
        for p in trainer.model.parameters():
            p.mul_(2.0)
    batch = trainer.step(1).update.prepared.batch
    gap = (batch.rollout_log_probs - batch.old_log_probs).abs()
    assert trainer.model.dtype == torch.float32 and 1e-4 < gap.max() < 1.0


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, (tc.token_weights.tis(),)),
        ({"token_weights": ()}, ()),
        ({"token_weights": ("mis()",)}, (tc.token_weights.mis(),)),
        ({"ratio": "token(to='rollout_log_probs')"}, ()),
    ],
)
def test_rollouts_of_older_weights_are_corrected_unless_something_else_was_chosen(made, uniform, chosen, expected):
    objective = ObjectiveSettings("grpo", **chosen)
    assert Trainer(made(1, objective=objective)).objective.token_weights == expected
    assert Trainer(made(0, objective=objective)).objective.token_weights == (
        expected if "token_weights" in chosen else ()
    )


@pytest.mark.parametrize("value", [-1, 0.5, True])
def test_a_staleness_is_a_number_of_steps(value):
    with pytest.raises((TypeError, ValueError), match="staleness: expected a whole number at least 0, got"):
        SamplingSettings(staleness=value)


def test_pairs_have_no_staleness(settings, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "1+1=", "chosen": "2", "rejected": "3"}\n')
    with pytest.raises(ValueError, match="staleness: expected 0 because of pairs, got 3"):
        run(settings("dpo", sampling=SamplingSettings(staleness=3), pairs=pairs, tasks=(), reward=None))
