"""The implicit reward model: what it learns from, what it rewards, and how it is resumed."""

import copy
import dataclasses
import math

import pytest
import tokcredit as tc
import torch
from resuming import check_resumed
from test_episodes import acting  # noqa: F401 - a fixture
from test_episodes import made as scripted
from tokcredit.train import ObjectiveSettings, SamplingSettings, ToolSettings, models
from tokcredit.train.experiment import resolved
from tokcredit.train.scoring import score
from tokcredit.train.trainer import Trainer

OTHER = "tiny(steps=0, seed=1)"


def prime(settings, model="initial", **changes):
    objective = ObjectiveSettings("prime", set=("low=0", "high=1"))
    sampling = SamplingSettings(prompts=2, group=2, max_tokens=6)
    return resolved(settings(objective=objective, sampling=sampling, reward_model=model, **changes))


@pytest.mark.parametrize("model", ["initial", OTHER])
def test_it_learns_before_it_rewards(settings, uniform, model):
    trainer = Trainer(prime(settings, model, reward_model_lr=1e-3))
    rewards, start = trainer.reward_model, copy.deepcopy(trainer.reward_model._model)
    batch = trainer.rollout_collector.collect(1).batch
    with torch.no_grad():
        first = score(start, batch)[0]
    found, metrics = rewards(batch)
    assert metrics["reward_model_loss"] == pytest.approx(math.log(2)), "the log-ratio is 0 before the first step"
    with torch.no_grad():
        expected = score(rewards._model, batch)[0] - first
    torch.testing.assert_close(found.input("implicit_rewards"), expected)
    assert expected.abs().max() > 1e-3
    assert torch.equal(next(rewards._reference.parameters()), next(start.parameters()))


def test_it_learns_from_the_groups_that_train(settings, uniform):
    s = dataclasses.replace(prime(settings), objective=ObjectiveSettings("prime"))
    rewards = (trainer := Trainer(s)).reward_model
    batch = trainer.rollout_collector.collect(1).batch
    rewards._reference, rewards._optimizer._optimizer.param_groups[0]["lr"] = models.load(OTHER)[0], 0.0

    def learned(*outcomes):
        fields = batch.tokens, batch.cu_seqlens, batch.group_ids, torch.tensor(outcomes)
        return rewards(tc.Rollouts(*fields, extras={"prompt_tokens": batch.input("prompt_tokens")}))

    assert batch.group_ids.tolist() == [0, 0, 1, 1]
    found, metrics = learned(1.0, 1.0, 1.0, 0.0)
    totals = [float(x.double().sum()) for x in found.input("implicit_rewards").split(batch.sizes.tolist())]
    p, q = (torch.tensor(0.05 * x).sigmoid() for x in totals[2:])
    assert metrics["reward_model_loss"] == pytest.approx(-float(p.log() + (1 - q).log()) / 2, rel=1e-4)
    again, nothing = learned(1.0, 1.0, 0.0, 0.0)
    assert nothing == {} and torch.equal(again.input("implicit_rewards"), found.input("implicit_rewards"))


def test_the_loss_falls_on_the_same_outcomes(settings, uniform):
    """Small steps along the gradient."""
    trainer = Trainer(prime(settings, reward_model_lr=1e-4))
    batch = trainer.rollout_collector.collect(1).batch
    losses = [trainer.reward_model(batch)[1]["reward_model_loss"] for _ in range(6)]
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]


def test_micro_batches_do_not_change_the_gradient(settings, uniform):
    norms = []
    for size in (1, 3, 16):
        trainer = Trainer(prime(settings))
        trainer.reward_model._size = size
        norms.append(trainer.reward_model(trainer.rollout_collector.collect(1).batch)[1]["reward_model_grad_norm"])
    assert norms[0] > 0 and norms == pytest.approx([norms[0]] * 3, rel=1e-4)


@pytest.mark.parametrize("adapter", [None, "lora(r=4)"])
def test_resumed_training_gives_the_numbers_of_an_uninterrupted_one(settings, uniform, tmp_path, adapter):
    if adapter:
        pytest.importorskip("peft")
    s = prime(settings, adapter=adapter)

    expected, _ = check_resumed(s, tmp_path)
    assert all(line["reward_model_grad_norm"] > 0 and line["grad_norm"] > 0 for line in expected)


def test_a_loss_that_is_not_finite_changes_nothing(settings, uniform):
    trainer = Trainer(prime(settings))
    model = trainer.reward_model._model
    batch = trainer.rollout_collector.collect(1).batch
    before = copy.deepcopy(model.state_dict())
    handle = next(model.parameters()).register_hook(lambda grad: grad * math.nan)
    assert math.isnan(trainer.reward_model(batch)[1]["reward_model_loss"])
    handle.remove()
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(x.grad is None for x in model.parameters())


@pytest.mark.parametrize("rows", ["one", "call"])
def test_it_learns_the_outcomes_of_whole_episodes(acting, rows):  # noqa: F811
    tools, objective = ToolSettings(turns=5, episode_rows=rows), ObjectiveSettings("prime")
    trainer = scripted(acting, tools=tools, objective=objective, reward_model="initial")
    rewards, episodes = trainer.reward_model, trainer.rollout_collector.collect(1).batch
    # Without the rewards of steps the total reward of an episode is 0 or 1.
    batch = episodes.with_inputs(token_rewards=None)
    rewards._reference, rewards._optimizer._optimizer.param_groups[0]["lr"] = models.load(OTHER)[0], 0.0
    norms = []
    for size in (2, 99):
        rewards._size = size
        found, metrics = rewards(batch)
        norms.append(metrics["reward_model_grad_norm"])
        ratios = found.input("implicit_rewards")[batch.response_mask].double()
        ids = batch.trajectory_ids.repeat_interleave(batch.lengths)
        losses = []
        for i, reward in dict(zip(batch.trajectory_ids.tolist(), batch.rewards.tolist(), strict=True)).items():
            p = float((0.05 * ratios[ids == i].sum()).sigmoid())
            losses.append(-math.log(p if reward else 1 - p))
        assert len(losses) == 8 and 0 < float(batch.rewards.sum()) < batch.num_rows
        assert metrics["reward_model_loss"] == pytest.approx(sum(losses) / 8, rel=1e-4)
    assert norms[0] > 0 and norms[1] == pytest.approx(norms[0], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "reward_model: expected initial or a model because of prime, got None"),
        (
            {"reward_model": "initial", "objective": ObjectiveSettings("grpo")},
            "reward_model: expected None because grpo has no reward model, got initial",
        ),
        ({"reward_model": "tiny_tools(steps=0)"}, "reward_model: expected the tokens of tiny.*, got tiny_tools"),
        ({"reward_model_lr": 0.1}, "reward_model_lr: expected 0 because there is no reward model, got 0.1"),
    ],
)
def test_refusals(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        Trainer(resolved(settings("prime", **changes)))
