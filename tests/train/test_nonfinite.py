"""A loss or a gradient that is not finite is named, is never saved, and can be skipped."""

import dataclasses
import math

import pytest
import torch
from tokcredit.train import ObjectiveSettings, OptimizerSettings, SamplingSettings, run
from tokcredit.train.clock import Clock
from tokcredit.train.experiment import resolved
from tokcredit.train.implicit import RewardModel
from tokcredit.train.learner import Learner
from tokcredit.train.lengths import LengthHead, LengthLearner
from tokcredit.train.nonfinite import described
from tokcredit.train.record import read_metrics
from tokcredit.train.trainer import Trainer

TIMES = {"seconds", "sample_seconds", "train_seconds", "credit_seconds"}
SKIP = OptimizerSettings(lr=1e-3, micro_batch=3, precision="no", on_nonfinite="skip")


def weights(trainer):
    return torch.cat([p.detach().reshape(-1).clone() for p in trainer.model.parameters()])


def poison(trainer, token):
    """Make the final hidden state after a token NaN, and with it the prediction of the token that follows."""

    def hook(module, args, kwargs, out):
        ids = args[0] if args else kwargs["input_ids"]
        bad = torch.where(ids == token, torch.nan, 0.0)
        out.last_hidden_state = out.last_hidden_state + bad[..., None]
        return out

    return trainer.model.model.register_forward_hook(hook, with_kwargs=True)


def rows_of(batch):
    return [row.tolist() for row in batch.tokens.split((batch.end - batch.begin).tolist())]


METHODS = {
    "a ratio per token": ObjectiveSettings("grpo"),
    "cumulative ratio": ObjectiveSettings("ctpo"),
    "terms": ObjectiveSettings("dapo", terms=("kl(0.01)", "entropy(0.001)")),
    "no ratio": ObjectiveSettings("sft"),
    "group statistics": ObjectiveSettings("ba"),
    "a ratio per row": ObjectiveSettings("gspo"),
}


@pytest.mark.parametrize("objective", METHODS.values(), ids=METHODS)
def test_rows_and_tokens_are_named(settings, uniform, monkeypatch, objective):
    trainer = Trainer(resolved(settings(objective=objective)))
    batch = trainer.learner.with_inputs(trainer.rollout_collector.collect(1).batch)
    rows = rows_of(batch)
    token = next(row[0] for row in rows if len(row) > 1)
    gradient = trainer.objective.prepare(batch).has_gradient.tolist()
    expected = {i: [t for t in range(1, len(row)) if row[t - 1] == token] for i, row in enumerate(rows) if gradient[i]}
    expected = {i: positions for i, positions in expected.items() if positions}
    found, before = {}, weights(trainer)
    monkeypatch.setattr("tokcredit.train.nonfinite.described", lambda x: found.update(x) or described(x))
    poison(trainer, token)
    with pytest.raises(RuntimeError, match=r"^step 3: expected a finite loss and gradient, got loss .* in row ") as e:
        trainer.learner.update(batch, 3, Clock())
    assert found == expected
    assert "; ".join(described(expected)) in str(e.value)
    assert torch.equal(weights(trainer), before)


def test_rows_are_named_where_only_the_gradient_of_the_model_is_not_finite(settings, uniform):
    trainer = Trainer(resolved(settings("grpo")))
    batch = trainer.learner.with_inputs(trainer.rollout_collector.collect(1).batch)
    before = weights(trainer)
    next(trainer.model.parameters()).register_hook(lambda gradient: gradient * math.inf)
    message = r"step 2: .*, got loss [-\d.e]+ and gradient norm (nan|inf) in row 0; row 1; .*; \d more rows"
    with pytest.raises(RuntimeError, match=message):
        trainer.learner.update(batch, 2, Clock())
    assert torch.equal(weights(trainer), before)


def test_texts():
    assert described({3: [2], 1: [0, 4]}) == ["row 1 at tokens 0, 4", "row 3 at token 2"]
    assert described({1: list(range(9))}) == ["row 1 at tokens 0, 1, 2, 3, 4, ..."]
    assert described({row: [] for row in range(7)}) == [*(f"row {row}" for row in range(5)), "2 more rows"]


@pytest.fixture
def bad_steps(monkeypatch):
    """In these steps the old log-prob of one token is NaN."""
    numbers, collect = set(), Trainer._with_inputs

    def with_inputs(trainer, collection, number):
        batch = collect(trainer, collection, number)
        if number in numbers:
            old = trainer.learner.score(batch)[0]
            old[0] = math.nan
            batch = batch.with_inputs(old_log_probs=old)
        return batch

    monkeypatch.setattr(Trainer, "_with_inputs", with_inputs)
    return numbers


def numbers(folder):
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(folder)]


def test_the_run_stops_and_its_checkpoint_is_good(settings, uniform, bad_steps, tmp_path):
    s = settings("grpo", steps=4, save_every=1, optimizer=dataclasses.replace(SKIP, on_nonfinite="stop"))
    whole = dataclasses.replace(s, output=tmp_path / "whole")
    run(whole)
    bad_steps.add(3)
    with pytest.raises(
        RuntimeError,
        match=r"step 3: .* in row 0 at token 0; nothing of this step was saved; --on-nonfinite skip leaves",
    ):
        run(s)
    assert [p.name for p in s.output.glob("checkpoint-*")] == ["checkpoint-000002"]
    assert [line["step"] for line in read_metrics(s.output)] == [0, 1, 2]
    bad_steps.clear()
    run(dataclasses.replace(s, resume=True))
    assert numbers(s.output) == numbers(whole.output)


def test_skipped_updates_are_counted(settings, uniform, bad_steps, capsys):
    s = settings("grpo", steps=4, save_every=1, optimizer=dataclasses.replace(SKIP, on_nonfinite="stop"))
    bad_steps.add(3)
    with pytest.raises(RuntimeError, match="step 3"):
        run(s)
    # A run that stopped goes on with the other rule.
    summary = run(dataclasses.replace(s, optimizer=SKIP, resume=True))
    lines = read_metrics(s.output)
    assert [line.get("skipped_updates") for line in lines] == [None, None, None, 1, 0]
    assert summary["skipped_updates"] == 1
    assert all(math.isfinite(x) for line in lines for x in line.values())
    assert lines[3]["grad_norm"] == 0 and "entropy_mean" not in lines[3] and lines[4]["grad_norm"] > 0
    assert "step 3: skipped an update because of loss nan" in "".join(capsys.readouterr())


def test_a_skipped_update_changes_nothing(settings, uniform, bad_steps):
    trainer = Trainer(resolved(settings("grpo", optimizer=SKIP)))
    trainer.step(1)
    before, moments = weights(trainer), str(trainer.learner._optimizer.state_dict()["state"])
    bad_steps.add(2)
    step = trainer.step(2)
    assert len(step.update.skipped) == 1 and "in row 0 at token 0" in step.update.skipped[0]
    assert torch.equal(weights(trainer), before)
    assert str(trainer.learner._optimizer.state_dict()["state"]) == moments
    assert not trainer.step(3).update.skipped and not torch.equal(weights(trainer), before)


def test_only_the_bad_minibatch_is_skipped(settings, uniform, bad_steps):
    trainer = Trainer(resolved(settings("grpo", optimizer=dataclasses.replace(SKIP, minibatches=4, epochs=2))))
    before = weights(trainer)
    bad_steps.add(1)
    step = trainer.step(1)
    assert step.metrics["skipped_updates"] == 2, "one per epoch"
    assert math.isfinite(step.metrics["loss"]) and step.metrics["grad_norm"] > 0
    assert not torch.equal(weights(trainer), before) and weights(trainer).isfinite().all()


def test_too_many_in_a_row_end_the_run(settings, uniform, bad_steps):
    s = settings("grpo", steps=30, save_every=1, optimizer=SKIP, eval_every=100)
    bad_steps.update({1, 2, 4, 5, 6, 7, 8, 9}, range(10, 31))
    with pytest.raises(RuntimeError, match=r"^step 13: .*; 10 updates in a row were skipped$"):
        run(s)
    # The count goes on after a resume.
    with pytest.raises(RuntimeError, match=r"^step 13: .*; 10 updates in a row were skipped"):
        run(dataclasses.replace(s, resume=True))
    assert [p.name for p in s.output.glob("checkpoint-*")] == ["checkpoint-000012"]


@pytest.mark.parametrize("rule", ["stop", "skip"])
def test_weights_that_are_not_finite_are_not_saved(settings, uniform, monkeypatch, rule):
    s = settings("grpo", steps=3, save_every=1, optimizer=dataclasses.replace(SKIP, on_nonfinite=rule))
    optimize = Learner._optimize

    def breaking(learner, prepared, number, clock):
        done = optimize(learner, prepared, number, clock)
        if number == 2:
            with torch.no_grad():
                learner._model.model.norm.weight[3] = math.inf
        return done

    monkeypatch.setattr(Learner, "_optimize", breaking)
    with pytest.raises(
        RuntimeError, match="step 2: expected finite weights after the update, got others in 1 parameters"
    ):
        run(s)
    assert [p.name for p in s.output.glob("checkpoint-*")] == ["checkpoint-000001"]


def test_large_weights_are_finite(settings, uniform):
    trainer = Trainer(resolved(settings("grpo")))
    with torch.no_grad():
        trainer.model.model.norm.weight[3] = 1e30  # its square is infinite
    trainer.learner._check_weights(1)


def length_batch(trainer):
    batch = trainer.learner.with_inputs(trainer.rollout_collector.collect(1).batch, frozenset({"hidden_states"}))
    hidden = batch.input("hidden_states").clone()
    hidden[0] = math.nan
    return batch, batch.with_inputs(hidden_states=hidden)


def test_the_length_head_stays_finite(settings, uniform):
    trainer = Trainer(resolved(settings("lenvm")))
    good, bad = length_batch(trainer)
    head = LengthHead(good.input("hidden_states").shape[-1])
    learner, every = LengthLearner(head, 0.9, trainer.ranks), torch.ones(good.num_rows, dtype=torch.bool)
    before = [p.detach().clone() for p in head.parameters()]
    assert math.isnan(learner.update(bad, every))
    assert all(torch.equal(a, b) for a, b in zip(before, head.parameters(), strict=True))
    assert math.isfinite(learner.update(good, every))
    assert not any(torch.equal(a, b) for a, b in zip(before, head.parameters(), strict=True))


@pytest.mark.parametrize("rule", ["stop", "skip"])
def test_the_length_head_follows_the_rule(settings, uniform, monkeypatch, rule):
    trainer = Trainer(resolved(settings("lenvm", optimizer=dataclasses.replace(SKIP, on_nonfinite=rule))))
    monkeypatch.setattr(LengthLearner, "update", lambda *arguments: math.nan)
    if rule == "stop":
        with pytest.raises(RuntimeError, match=r"step 1: .*, got a loss or a gradient of the length head"):
            trainer.step(1)
    else:
        assert trainer.step(1).metrics["skipped_updates"] == 1


@pytest.mark.parametrize("method", ["lenvm", "prime"])
def test_too_many_in_a_row_of_a_model_beside_the_policy(settings, uniform, monkeypatch, method):
    """Updates of the policy lie between them. The count goes on after a resume."""
    sampling = SamplingSettings(prompts=2, group=2, max_tokens=6)
    model = "initial" if method == "prime" else None
    s = resolved(settings(method, optimizer=SKIP, sampling=sampling, reward_model=model, steps=10))
    trainer, again = Trainer(s), Trainer(s)
    monkeypatch.setattr(LengthLearner, "update", lambda *arguments: math.nan)
    monkeypatch.setattr(
        RewardModel,
        "__call__",
        lambda model, batch: (
            batch.with_inputs(implicit_rewards=torch.zeros(batch.num_tokens)),
            {"reward_model_loss": math.nan},
        ),
    )
    model = {"lenvm": "length head", "prime": "reward model"}[method]
    for number in range(1, 7):
        assert trainer.step(number).metrics["skipped_updates"] == 1
    again.load_state_dict(trainer.state_dict())
    for number in range(7, 10):
        again.step(number)
    with pytest.raises(RuntimeError, match=f"step 10: .* of the {model}; .*; 10 updates in a row were skipped"):
        again.step(10)


def test_the_temperature_does_not_follow_a_skipped_step(settings, uniform, bad_steps):
    s = settings("hapo", optimizer=SKIP)
    trainer = Trainer(resolved(dataclasses.replace(s, sampling=dataclasses.replace(s.sampling, adaptive=0.1))))
    trainer.step(1)
    before = trainer.adaptive.statistics
    bad_steps.add(2)
    assert trainer.step(2).update.skipped
    assert trainer.adaptive.statistics is before
