"""Baselines without groups: greedy responses for remax, running means of the tasks for rae."""

import json
import math

import pytest
import torch
from tokcredit.train import ObjectiveSettings, SamplingSettings, checkpoint
from tokcredit.train.experiment import resolved
from tokcredit.train.trainer import Trainer


def test_a_task_is_a_role(settings, uniform, tmp_path):
    file = tmp_path / "problems.jsonl"
    lines = [{"prompt": f"{i}+{i + 1}=", "answer": str(2 * i + 1)} for i in range(20)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    s = settings(
        objective=ObjectiveSettings("rae"),
        sampling=SamplingSettings(prompts=4, group=1, max_tokens=6),
        tasks=("addition(digits=1)", f"jsonl('{file}')"),
    )
    trainer, again = Trainer(resolved(s)), Trainer(resolved(s))
    means, seen = {}, []
    for number in (1, 2, 3):
        step = trainer.step(number)
        batch, expected = step.update.prepared.batch, []
        for problem, reward in zip(step.collection.problems, batch.rewards.tolist(), strict=True):
            b = means.get(problem.task, 0.0)
            expected.append(b)
            means[problem.task] = 0.95 * b + 0.05 * reward
        assert batch.input("role_baselines").tolist() == pytest.approx(expected)
        seen.append(batch.input("role_baselines"))
        if number == 2:
            checkpoint.save(trainer.accelerator, tmp_path, 2)
    assert len(means) == 2 and all(means.values())
    checkpoint.load(again.accelerator, tmp_path)
    assert torch.equal(again.step(3).update.prepared.batch.input("role_baselines"), seen[2])


def test_remax_subtracts_the_reward_of_a_greedy_response(settings, uniform):
    trainer = Trainer(resolved(settings("remax")))
    batch = trainer.step(1).update.prepared.batch
    greedy = batch.input("greedy_rewards")
    problems = trainer.context.chosen(1)[1]
    expected = dict(zip(trainer.context.chosen(1)[0], trainer.rollout_collector.attempt(problems), strict=True))
    assert greedy.tolist() == pytest.approx([expected[g] for g in batch.group_ids.tolist()])
    assert len(set(expected.values())) == 2


def test_a_greedy_response_without_reward_counts_as_0(settings, uniform, monkeypatch):
    trainer = Trainer(resolved(settings("remax")))
    monkeypatch.setattr(trainer.rollout_collector, "attempt", lambda problems: [math.nan, 0.25][: len(problems)])
    batch = trainer.step(1).update.prepared.batch
    first = batch.group_ids == batch.group_ids[0]
    assert (batch.input("greedy_rewards")[first] == 0).all() and (batch.input("greedy_rewards")[~first] == 0.25).all()
