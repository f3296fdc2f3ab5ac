import dataclasses
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import tokcredit as tc
import torch
from tokcredit.train import ObjectiveSettings, OptimizerSettings, ProbeSettings, compare, run
from tokcredit.train.experiment import resolved
from tokcredit.train.learner import learning_rate
from tokcredit.train.trainer import COLLECTED, Trainer
from tokcredit.train.record import read_metrics, smoothed

TIMES = {"seconds", "sample_seconds", "train_seconds", "credit_seconds"}


def digits(prompt, reply, answer):
    """A reward that a random model meets and can raise: the share of digits in its reply."""
    return sum(c.isdigit() for c in reply) / max(len(reply), 1)


def numbers(folder):
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(folder)]


def test_a_run_leaves_everything_behind(settings):
    s = settings()
    summary = run(s)
    assert json.loads((s.output / "summary.json").read_text()) == summary
    lines = read_metrics(s.output)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5]
    assert [line["step"] for line in lines if "held_out" in line] == [0, 2, 4, 5]
    assert summary["held_out_before"] == lines[0]["held_out"] and summary["held_out_after"] == lines[5]["held_out"]
    names = {p.name for p in s.output.iterdir()}
    assert {
        "settings.json",
        "curve.png",
        "report.html",
        "model",
        "tokenizer",
        "tensorboard",
        "checkpoint-000005",
    } <= names
    assert not any("new" in name for name in names) and sum("checkpoint" in name for name in names) == 1
    assert sorted(p.name for p in s.output.glob("rollouts-*")) == [f"rollouts-{i:06}.parquet" for i in (2, 4, 5)]


def test_recorded_rollouts_hold_what_was_paid(settings):
    from transformers import AutoTokenizer

    s = settings(objective=ObjectiveSettings("tempo", weights=("importance_truncated(high=2.0)",)))
    run(s)
    table = pq.read_table(s.output / "rollouts-000005.parquet")
    header = json.loads(table.schema.metadata[b"tokcredit"])
    assert header["method"] == "tempo" and eval(header["objective"], scope()) == s.objective.build()
    words = AutoTokenizer.from_pretrained(s.output / "tokenizer")
    rows = table.to_pylist()
    assert len(rows) == 8 and all(row["step"] == 5 for row in rows)
    batch = tc.Rollouts(
        torch.tensor([t for row in rows for t in row["tokens"]]),
        torch.tensor([0, *(len(row["tokens"]) for row in rows)]).cumsum(0),
        torch.tensor([row["group"] for row in rows]),
        torch.tensor([row["reward"] for row in rows]),
    )
    expected = tc.methods.tempo().prepare(batch).advantages
    torch.testing.assert_close(torch.tensor([a for row in rows for a in row["advantages"]]), expected)
    for row in rows:
        assert words.decode(row["tokens"], skip_special_tokens=True) == row["completion"]
        assert words.decode(row["prompt_tokens"]) == row["prompt"]
        assert row["reward"] == pytest.approx(digits(None, row["completion"], None))
        # The sampler is the trained model in its own dtype: what it drew with is what the trainer finds.
        assert row["rollout_log_probs"] == pytest.approx(row["old_log_probs"], abs=1e-4)
        if any(row["advantages"]):
            assert row["log_probs"] == pytest.approx(row["old_log_probs"], abs=1e-5)
        else:
            assert row["log_probs"] is None


def scope():
    stages = (tc.credit, tc.token_weights, tc.ratio, tc.clip, tc.aggregation, tc.term, tc.token_score, tc.schedule)
    names = {k: v for stage in stages for k, v in vars(stage).items() if dataclasses.is_dataclass(v)}
    return names | {"Objective": tc.Objective, "inf": float("inf")}


def test_training_raises_the_reward(settings):
    s = settings(steps=40, eval_every=40, save_every=40, rollouts_every=40)
    s = dataclasses.replace(s, sampling=dataclasses.replace(s.sampling, prompts=8))
    summary = run(s)
    reward = [line["reward"] for line in read_metrics(s.output)[1:]]
    assert sum(reward[-5:]) / 5 > sum(reward[:5]) / 5 + 0.3
    assert summary["held_out_after"] > summary["held_out_before"] + 0.3


@pytest.mark.parametrize("method", tc.methods.names())
def test_every_method_trains(settings, method):
    objective = tc.methods.load(method)
    if unknown := objective.required_inputs - COLLECTED:
        pytest.skip(f"needs {', '.join(unknown)}")
    if "turn_rewards" in objective.required_inputs:
        pytest.skip("needs tools, see test_conversations.py")
    reward = "test_experiment:has_digit" if method in ("psr", "nsr", "w_reinforce", "thr", "nthr") else None
    optimizer = OptimizerSettings(lr=1e-3, micro_batch=3, precision="no", epochs=2, minibatches=2, schedule="linear")
    probes = ProbeSettings(continuations=2, interval=2, step_end="1", answers=2, answer_tokens=3)
    s = settings(method, optimizer=optimizer, steps=2, teacher="tiny(steps=0, seed=1)", probes=probes)
    run(s if reward is None else dataclasses.replace(s, reward=reward))
    lines = read_metrics(s.output)[1:]
    assert all(line["grad_norm"] > 0 for line in lines)
    if objective.ratio != tc.ratio.one():
        assert any(line["ratio"] != 1 for line in lines), "the second pass is off policy"
    assert lines[0]["lr"] == 1e-3 and lines[1]["lr"] == 5e-4


def has_digit(prompt, reply, answer):
    return float(any(c.isdigit() for c in reply))


def test_a_penalty_pulls_to_the_initial_model(settings):
    objective = ObjectiveSettings("grpo", kl="k3(beta=0.5)")
    s = settings(objective=objective, steps=3)
    run(s)
    kl = [line["kl"] for line in read_metrics(s.output)[1:]]
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[2] > 1e-5


def test_groups_without_signal_cost_no_pass(settings, monkeypatch):
    s = settings(reward="test_experiment:always")
    trainer = Trainer(resolved(s))
    before = [p.detach().clone() for p in trainer.model.parameters()]
    monkeypatch.setattr("tokcredit.train.collectors.predict", None)
    step = trainer.step(1)
    assert step.metrics["groups_with_signal"] == 0 and step.metrics["reward"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def always(prompt, reply, answer):
    return 1.0


def test_micro_batches_do_not_change_the_step(settings):
    grads = []
    for size in (1, 3, 100):
        s = resolved(settings(optimizer=OptimizerSettings(lr=0.1, micro_batch=size, precision="no")))
        trainer = Trainer(s)
        trainer.step(1)
        grads.append(torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters()]))
    start = torch.cat([p.detach().reshape(-1) for p in Trainer(s).model.parameters()])
    assert (grads[0] - start).abs().max() > 0.01
    # AdamW's first step is lr times the sign of the gradient; where that is noise around 0 the sign is noise too.
    for other in grads[1:]:
        assert ((other - grads[0]).abs() < 1e-3).float().mean() > 0.99


def test_a_killed_run_continues_with_the_same_numbers(settings, tmp_path):
    whole, killed = settings(steps=7, output=tmp_path / "whole"), settings(steps=7, output=tmp_path / "killed")
    run(whole)
    process = multiprocessing.get_context("spawn").Process(target=run, args=(killed,))
    process.start()
    while process.is_alive() and len(read_metrics(killed.output)) < 5:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL and not (killed.output / "summary.json").exists()
    run(dataclasses.replace(killed, resume=True))
    assert numbers(killed.output) == numbers(whole.output)
    rows = [pq.read_table(s.output / "rollouts-000007.parquet").to_pylist() for s in (whole, killed)]
    assert rows[0] == rows[1]


def test_a_stop_request_saves_first(settings, tmp_path, monkeypatch):
    s = settings(steps=6, save_every=100)
    step = Trainer.step

    def interrupted(trainer, number):
        if number == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(trainer, number)

    monkeypatch.setattr(Trainer, "step", interrupted)
    assert run(s) is None
    assert [p.name for p in s.output.glob("checkpoint-*")] == ["checkpoint-000003"]
    monkeypatch.setattr(Trainer, "step", step)
    assert run(dataclasses.replace(s, resume=True))["steps"] == 6
    whole = dataclasses.replace(s, output=tmp_path / "whole")
    run(whole)
    assert numbers(s.output) == numbers(whole.output)


def test_a_folder_is_not_overwritten(settings):
    s = settings(steps=1)
    run(s)
    with pytest.raises(ValueError, match="output: expected a folder without a run, or --resume"):
        run(s)
    with pytest.raises(ValueError, match="seed: expected 0 as in the run to resume, got 1"):
        run(dataclasses.replace(s, resume=True, seed=1))
    longer = run(dataclasses.replace(s, resume=True, steps=2))
    assert longer["steps"] == 2


def test_missing_evidence_is_said_before_anything_runs(settings, monkeypatch):
    monkeypatch.setattr(tc.Objective, "needs", frozenset({"probes"}))
    with pytest.raises(ValueError, match=r"method: expected one whose evidence .*got tempo, which needs probes"):
        Trainer(resolved(settings()))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.853553, 0.5, 0.146447]),
    ],
)
def test_learning_rate(schedule, expected):
    o = OptimizerSettings(lr=1.0, warmup=2, schedule=schedule)
    assert [learning_rate(o, n, 6) for n in range(1, 7)] == pytest.approx(expected, abs=1e-6)


def test_compare(settings, capsys):
    s = settings(steps=2)
    folder = compare(("grpo", "ctpo"), s, seeds=2)
    runs = {f"{m}-seed{seed}" for m in ("grpo", "ctpo") for seed in (0, 1)}
    assert {p.name for p in folder.iterdir()} == runs | {"compare.md", "compare.png"}
    # Same seed: same prompts and same first draws.
    first = [read_metrics(folder / f"{m}-seed1")[1] for m in ("grpo", "ctpo")]
    assert first[0]["reward"] == first[1]["reward"] and first[0]["tokens"] == first[1]["tokens"]
    assert "| `ctpo` |" in (folder / "compare.md").read_text()
    before = {p: p.stat().st_mtime_ns for p in Path(folder).glob("*/summary.json")}
    compare(("grpo", "ctpo"), s, seeds=2)
    assert before == {p: p.stat().st_mtime_ns for p in Path(folder).glob("*/summary.json")}


def test_smoothing_has_no_start_up_bias():
    assert smoothed([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert smoothed([0.0, 1.0], weight=0.5) == pytest.approx([0.0, 2 / 3])
