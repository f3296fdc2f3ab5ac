"""Whole runs with replies, rewards and prompts that go wrong."""

import json
import logging
import math
import os
import signal

import pyarrow.parquet as pq
import pytest
import tokcredit as tc
import torch
from tokcredit.rewards.bounded import BoundedCalls
from tokcredit.train import ObjectiveSettings, SamplingSettings, experiment, run, tasks
from tokcredit.train.judging import RewardError
from tokcredit.train.sampler import Completions
from uniform import UniformSampler, scored

TOWERS = [f"{i}^{{{i}^{{{i}^{{{i}^{i}}}}}}}" for i in range(3, 53)]
OTHERS = [
    *("(" * (100 + i) for i in range(50)),
    *(f"\\frac{{{i}}}{{" * 12 for i in range(50)),
    *(f"{i}" + "!" * 30 for i in range(3, 28)),
]


class Scripted(UniformSampler):
    """Says the texts of ``replies``, one after another, and 7 where there are no more."""

    replies: tuple[str, ...] = ()

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self._left = list(self.replies)

    def sample(self, prompts, count, max_tokens, temperature, stop=()):
        asked = [prompt for prompt in prompts for _ in range(count)]
        rows = []
        for _ in asked:
            text = self._left.pop(0) if temperature and self._left else "7"
            rows.append([*self.words(text).input_ids, self.words.eos_token_id][:max_tokens])
        edges = torch.tensor([0, *map(len, rows)]).cumsum(0)
        tokens = torch.tensor([t for row in rows for t in row])
        log_probs = scored(self.model, asked, tokens, edges, 1.0)
        return Completions(tokens, edges, log_probs, torch.ones(len(rows), dtype=torch.bool))


@pytest.fixture
def says(monkeypatch):
    """Trainers sample these replies, and a judged answer has 0.15 s of processor time."""

    def make(*replies):
        monkeypatch.setattr("tokcredit.train.trainer.TransformersSampler", Scripted)
        monkeypatch.setattr(Scripted, "replies", replies)

    made = {}

    def bounded(file):
        if file not in made:
            made[file] = BoundedCalls(tasks._REWARDS / file, "reward", seconds=0.15)
        return made[file]

    monkeypatch.setattr(tasks, "_bounded", bounded)
    yield make
    for calls in made.values():
        calls.close()


@pytest.fixture
def sevens(tmp_path):
    """A file of problems whose answer is 7."""
    file = tmp_path / "sevens.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Say seven, {i}.", "answer": "7"}) + "\n" for i in range(200)))
    return (f"jsonl({str(file)!r})",)


def lines(settings):
    return [json.loads(line) for line in (settings.output / "metrics.jsonl").read_text().split("\n") if line]


@pytest.mark.slow
def test_a_run_survives_200_hostile_replies(settings, says, sevens, caplog):
    hostile = [reply for pair in zip(TOWERS, *[iter(OTHERS)] * 2, strict=False) for reply in pair]
    hostile += [reply for reply in [*TOWERS, *OTHERS] if reply not in hostile] + ["9^{9^{9^{9^9}}}"] * 25
    assert len(hostile) == 200
    # One of nine replies of every prompt is right.
    replies = [reply for i in range(25) for reply in (*hostile[8 * i : 8 * i + 8], "7")]
    says(*replies)
    sampling = SamplingSettings(prompts=25, group=9, max_tokens=160)
    s = settings("grpo", tasks=sevens, reward=None, steps=2, sampling=sampling, eval_problems=1, rollouts_every=1)
    with caplog.at_level(logging.WARNING, "tokcredit"):
        summary = run(s)
    assert summary["steps"] == 2 and summary["held_out_after"] == 1.0
    _, first, second = lines(s)
    assert first["reward_mean"] == pytest.approx(1 / 9) and second["reward_mean"] == 1.0
    # No machine computes a tower; some of the others may be refused without an attempt.
    assert 75 <= first["reward_failures"] <= 200 and second["reward_failures"] == 0
    messages = [record.getMessage() for record in caplog.records if "the reward is 0" in record.getMessage()]
    assert len(messages) == first["reward_failures"]
    for reply in TOWERS:
        assert sum(f"reply: {reply!r}" in message for message in messages) == (26 if reply.startswith("9^") else 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_stops_while_a_reply_hangs(settings, says, sevens, monkeypatch, number):
    says(*TOWERS[:8])
    sample = Scripted.sample

    def and_stop(self, prompts, count, max_tokens, temperature, stop=()):
        if temperature:
            os.kill(os.getpid(), number)
        return sample(self, prompts, count, max_tokens, temperature, stop)

    monkeypatch.setattr(Scripted, "sample", and_stop)
    s = settings("grpo", tasks=sevens, reward=None, steps=50, eval_problems=1)
    assert run(s) is None and len(lines(s)) == 2


def bad(prompt, response, answer):
    """Fails for replies with an x, in ways that differ, and counts sevens in others."""
    if "xx" in response:
        return {"xxa": None, "xxb": math.nan, "xxc": "1.0", "xxd": [1.0, 2.0]}[response[:3]]
    if "x" in response:
        raise LookupError(f"cannot judge {response}")
    return response.count("7")


REPLIES = ("7", "x", "1", "xxa") + ("xxb", "77", "xxc", "2") + ("xxd", "3", "7", "4") + ("7",) * 4


@pytest.mark.parametrize("method", ["grpo", "tempo", "r3"])
def test_dropped_replies_are_as_if_they_had_not_been_sampled(settings, says, sevens, method, caplog):
    says(*REPLIES)
    sampling = SamplingSettings(prompts=4, group=4, max_tokens=8)
    s = settings(method, tasks=sevens, reward="test_hostile_replies:bad", steps=1, eval_problems=1)
    run(settings(**vars(s) | {"objective": s.objective, "sampling": sampling, "on_reward_error": "drop"}))
    (line,) = lines(s)[1:]
    kept = [r.count("7") for r in REPLIES if "x" not in r]
    assert line["reward_failures"] == 5 and line["reward_mean"] == pytest.approx(sum(kept) / len(kept))
    assert line["tokens"] == sum(len(r) + 1 for r in REPLIES if "x" not in r)
    assert sum("LookupError: cannot judge x" in r.getMessage() for r in caplog.records) == 1
    rows = pq.read_table(s.output / "rollouts-000001.parquet").to_pylist()
    assert [row["completion"] for row in rows if row["step"] == 1] == [r for r in REPLIES if "x" not in r]
    rewards = torch.tensor([float(row["reward"]) for row in rows])
    lengths = torch.tensor([0, *(len(row["tokens"]) for row in rows)])
    group_ids = torch.tensor([row["group"] for row in rows])
    tokens = torch.tensor([t for row in rows for t in row["tokens"]])
    expected = tc.methods.grpo().prepare(tc.Rollouts(tokens, lengths.cumsum(0), group_ids, rewards)).advantages
    if method == "grpo":
        assert [a for row in rows for a in row["advantages"]] == pytest.approx(expected.tolist())
        assert expected.abs().sum() > 1


def test_the_policy_zero(settings, says, sevens):
    says(*REPLIES)
    sampling = SamplingSettings(prompts=4, group=4, max_tokens=8)
    s = settings(
        "grpo",
        tasks=sevens,
        reward="test_hostile_replies:bad",
        steps=1,
        eval_problems=1,
        sampling=sampling,
        on_reward_error="zero",
    )
    run(s)
    (line,) = lines(s)[1:]
    assert line["reward_failures"] == 5
    assert line["reward_mean"] == pytest.approx(sum(r.count("7") for r in REPLIES if "x" not in r) / 16)
    assert line["tokens"] == sum(len(r) + 1 for r in REPLIES)


def test_the_policy_stop(settings, says, sevens):
    says(*REPLIES)
    s = settings("grpo", tasks=sevens, reward="test_hostile_replies:bad", steps=1, eval_problems=1)
    with pytest.raises(RewardError, match=r"reward: LookupError: 'cannot judge x'|reward: LookupError: cannot judge x"):
        experiment.run(s)


def test_a_step_without_any_reward_is_an_error(settings, says, sevens):
    says(*["x"] * 8)
    s = settings("grpo", tasks=sevens, reward="test_hostile_replies:bad", eval_problems=1, on_reward_error="drop")
    with pytest.raises(RewardError, match="on_reward_error: expected a reward of at least one response of the step"):
        run(s)


@pytest.mark.parametrize("method", ["spo_tree", "vineppo", "match_tir"])
def test_other_collectors_drop_too(settings, method, uniform):
    """Replies fail by their digest, in trees, in continuations and in conversations."""
    changes = {"model": "tiny_tools(steps=0)", "tasks": ("calculator()",)} if method == "match_tir" else {}
    s = settings(method, reward="test_hostile_replies:half", on_reward_error="drop", steps=2, **changes)
    assert s.objective == ObjectiveSettings(method)
    summary = run(s)
    assert summary["steps"] == 2 and sum(line.get("reward_failures", 0) for line in lines(s)) > 0
    assert all(math.isfinite(line["reward_mean"]) for line in lines(s)[1:])


def half(prompt, response, answer):
    """Fails for about half of the replies."""
    if sum(map(ord, response)) % 2:
        raise ValueError("odd")
    return len(response)
