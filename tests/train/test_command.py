"""The command on a run of a random model: signals, and steps between that are 0."""

import json
import os
import signal

import pytest
from tokcredit.cli import main
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
