"""The command on a run of a random model: signals, and steps between that are 0."""

import json
import os
import signal
import zlib

import pyarrow.parquet as pq
import pytest
from tokcredit import train
from tokcredit.cli import main
from tokcredit.train.compatibility import checked
from tokcredit.train.experiment import resolved
from tokcredit.train.trainer import Trainer

OPTIONS = [
    *("--model", "tiny(steps=0)", "--tasks", "addition(digits=1)", "--reward", "uniform:digest", "--precision", "no"),
    *("--prompts", "2", "--group", "2", "--max-tokens", "4", "--eval-problems", "2", "--seed", "1"),
    *("--eval-every", "0", "--save-every", "0", "--rollouts-every", "0"),
]


@pytest.fixture
def interrupted(monkeypatch):
    """Make the signal come during a step."""
    step = Trainer.step

    def make(number, at):
        def interrupted(trainer, n):
            if n == at:
                os.kill(os.getpid(), number)
            return step(trainer, n)

        monkeypatch.setattr(Trainer, "step", interrupted)

    return make


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_exits_with_the_signal(number, uniform, interrupted, tmp_path, capsys):
    interrupted(number, at=2)
    with pytest.raises(SystemExit) as stopped:
        main(["train", *OPTIONS, "--steps", "4", "--output", str(tmp_path)])
    assert stopped.value.code == 128 + number and f"stopped by {number.name}" in capsys.readouterr().err
    assert [x.name for x in tmp_path.glob("checkpoint-*")] == ["checkpoint-000002"]


def test_a_stopped_comparison_exits_with_the_signal(uniform, interrupted, tmp_path):
    interrupted(signal.SIGTERM, at=1)
    with pytest.raises(SystemExit) as stopped:
        main(["compare", *OPTIONS, "--steps", "2", "--methods", "grpo", "rloo", "--output", str(tmp_path)])
    assert stopped.value.code == 143 and not (tmp_path / "compare.md").exists()


def test_a_signal_in_the_last_step_does_not_stop_a_run(uniform, interrupted, tmp_path):
    """With 0 between measurements, rollouts and checkpoints, they are made at the end only."""
    interrupted(signal.SIGINT, at=3)
    main(["train", *OPTIONS, "--steps", "3", "--output", str(tmp_path)])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if "held_out_reward_mean" in x] == [0, 3]
    assert [x.name for x in tmp_path.glob("rollouts-*")] == ["rollouts-000003.parquet"]
    assert [x.name for x in tmp_path.glob("checkpoint-*")] == ["checkpoint-000003"]


def hanging(prompt, reply, answer):
    """Two signals, the first of which asks the run to end after the step, which never ends."""
    if os.environ["HANG"] in prompt:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        while True:
            pass
    return float(len(reply))


@pytest.mark.parametrize("policy", ["stop", "zero", "drop"])
def test_a_reward_function_that_hangs_can_be_stopped(policy, uniform, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HANG", "=")
    words = [*OPTIONS, "--steps", "2", "--output", str(tmp_path / "run"), "--on-reward-error", policy]
    words[words.index("uniform:digest")] = "test_command:hanging"
    with pytest.raises(SystemExit) as stopped:
        main(["train", *words])
    assert stopped.value.code == 130
    assert "stopping after this step; the same signal again stops at once" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def equal(prompt, reply, answer):
    """Equal rewards for the two replies to some prompts."""
    return float(len(reply)) if zlib.crc32(prompt.encode()) % 2 else 1.0


def alike(prompt, reply, answer):
    return 1.0


def of_one(prompt, reply, answer):
    """No reward for short replies."""
    return float(len(reply)) if len(reply) > 1 else None


@pytest.mark.parametrize("reward", ["equal", "of_one"])
def test_pairs_without_a_chosen_reply_are_skipped_and_counted(uniform, tmp_path, reward):
    words = [*OPTIONS, "--method", "dpo", "--steps", "2", "--output", str(tmp_path), "--on-reward-error", "drop"]
    words[words.index("uniform:digest")], words[words.index("--prompts") + 1] = f"test_command:{reward}", "16"
    main(["train", *words, "--rollouts-every", "1"])
    skipped = []
    for number in (1, 2):
        rows = pq.read_table(tmp_path / f"rollouts-{number:06}.parquet").to_pylist()
        rewards = {g: [r["reward"] for r in rows if r["group"] == g] for g in {r["group"] for r in rows}}
        assert all(len(pair) == 2 and pair[0] != pair[1] for pair in rewards.values())
        skipped.append(16 - len(rewards))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["pairs"] for line in lines[1:]] == [16 - x for x in skipped]
    dropped = reward == "of_one"
    for line, count in zip(lines[1:], skipped, strict=True):
        assert 0 < line["pairs_skipped"] <= count if dropped else line["pairs_skipped"] == count > 0
        assert line["grad_norm"] > 0


def test_a_step_without_a_pair_is_named(uniform, tmp_path):
    words = [*OPTIONS, "--method", "dpo", "--steps", "2", "--output", str(tmp_path / "run")]
    words[words.index("uniform:digest")] = "test_command:alike"
    with pytest.raises(RuntimeError, match=r"step 1: expected two responses with different rewards .* for all 2; more"):
        train.run(parsed(words))
    assert not (tmp_path / "run").exists()


def parsed(words):
    """The settings that words on the command line stand for."""
    given = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tokcredit.train.run", lambda settings: given.append(settings) or {})
        main(["train", *words])
    return given[0]


@pytest.mark.parametrize("method", ["grpo", "tempo", "rloo", "gspo"])
def test_one_reply_to_a_prompt_is_refused_where_replies_are_compared(method):
    words = [*OPTIONS, "--method", method]
    words[words.index("--group") + 1] = "1"
    with pytest.raises(ValueError, match=f"group: expected at least 2 because the credit of {method} compares"):
        checked(resolved(parsed(words)))


@pytest.mark.parametrize("method", ["psr", "w_reinforce", "spo_tree"])
def test_one_reply_to_a_prompt_is_enough_elsewhere(method):
    words = [*OPTIONS, "--method", method]
    words[words.index("--group") + 1] = "1"
    checked(resolved(parsed(words)))
