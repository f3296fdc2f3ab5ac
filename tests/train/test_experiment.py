import dataclasses
import json
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tokcredit as tc
import torch
from tokcredit import cli, train
from tokcredit.stages.credit.group import per_token
from tokcredit.train import (
    CollectorSettings,
    CriticSettings,
    ObjectiveSettings,
    OptimizerSettings,
    PrivilegedSettings,
    ProbeSettings,
    compare,
    compatibility,
    fixed_collectors,
    micro_batches,
    run,
)
from tokcredit.train import trainer as trainer_module
from tokcredit.train.clock import Clock
from tokcredit.train.compatibility import distils, only_read
from tokcredit.train.experiment import resolved
from tokcredit.train.learning_rate import learning_rate
from tokcredit.train.record import read_metrics, smoothed
from tokcredit.train.scoring import score
from tokcredit.train.trainer import Trainer
from uniform import UniformSampler, digest

TIMES = {"seconds", "sample_seconds", "train_seconds", "credit_seconds"}


def numbers(folder):
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(folder)]


def test_a_run_leaves_everything_behind(settings):
    s = settings()
    summary = run(s)
    assert json.loads((s.output / "summary.json").read_text()) == summary
    lines = read_metrics(s.output)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5]
    assert [line["step"] for line in lines if "held_out_reward_mean" in line] == [0, 2, 4, 5]
    assert summary["held_out_before"] == lines[0]["held_out_reward_mean"]
    assert summary["held_out_after"] == lines[5]["held_out_reward_mean"]
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


def test_recorded_rollouts_hold_the_advantages(settings):
    from transformers import AutoTokenizer

    s = settings(objective=ObjectiveSettings("tempo", token_weights=("importance(high=2.0)",)))
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
        assert row["reward"] == pytest.approx(digest(None, row["completion"], None))
        # The sampler is the trained model in its own dtype, so its log-probs are those of the trainer.
        assert row["rollout_log_probs"] == pytest.approx(row["old_log_probs"], abs=1e-4)
        if any(row["advantages"]):
            assert row["log_probs"] == pytest.approx(row["old_log_probs"], abs=1e-5)
        else:
            assert row["log_probs"] is None


def scope():
    stages = (tc.filters, tc.token_weights, tc.ratio, tc.clip, tc.scale, tc.aggregation, tc.term, tc.schedule)
    names = {k: v for stage in stages for k, v in vars(stage).items() if dataclasses.is_dataclass(v)}
    return names | {"Objective": tc.Objective, "tempo_credit": type(tc.methods.tempo().credit), "inf": float("inf")}


@pytest.mark.parametrize("method", ["grpo", "tempo", "ctpo", "gspo"])
def test_an_update_lowers_the_loss_of_its_rollouts(settings, uniform, method):
    """A step along the gradient lowers the loss of its own rollouts, if it is small."""
    optimizer = OptimizerSettings(lr=1e-5, micro_batch=3, precision="no")
    trainer = Trainer(resolved(settings(method, optimizer=optimizer)))
    batch = trainer.rollout_collector.collect(1).batch
    old = score(trainer.model, batch)[0].detach()
    prepared = trainer.objective.prepare(batch.with_inputs(old_log_probs=old))
    update = trainer.learner.update(trainer.learner.with_inputs(batch), 1, Clock())
    new = score(trainer.model, batch)[0].detach()
    losses = [float(trainer.objective.loss(prepared, x).loss) for x in (old, new)]
    assert losses[1] < losses[0] == pytest.approx(update.metrics["loss"], abs=1e-5)


def test_rewarded_replies_become_likelier(settings, monkeypatch):
    """The loop from sampling to the update, many times: the rewarded responses gain on the others in every step."""

    class Scripted(UniformSampler):
        def sample(self, prompts, count, max_tokens, temperature, stop=()):
            made = super().sample(prompts, count, max_tokens, temperature, stop)
            texts = ["12", "ab", "34", "cd"] * (len(made.finished) // 4 or 1)
            tokens = torch.tensor([t for text in texts for t in self.words(text).input_ids])
            return made._replace(
                tokens=tokens[: 2 * len(made.finished)],
                cu_seqlens=torch.arange(len(made.finished) + 1) * 2,
                log_probs=torch.zeros(2 * len(made.finished)),
            )

    monkeypatch.setattr("tokcredit.train.trainer.TransformersSampler", Scripted)
    optimizer = OptimizerSettings(lr=1e-4, micro_batch=3, precision="no")
    trainer = Trainer(resolved(settings("grpo", reward="uniform:digits", optimizer=optimizer)))
    gains = []
    for number in range(1, 6):
        batch = trainer.step(number).collection.batch
        with torch.no_grad():
            log_probs = score(trainer.model, batch)[0].view(-1, 2).sum(1)
        gains.append(float(log_probs[batch.rewards == 1].mean() - log_probs[batch.rewards == 0].mean()))
        assert batch.rewards.tolist() == [1, 0, 1, 0] * 2
    assert gains == sorted(gains) and len(set(gains)) == 5


@pytest.mark.parametrize("method", tc.methods.names())
def test_every_method_trains(settings, uniform, method):
    objective = tc.methods.load(method)
    if objective.required_inputs & tc.inputs.names("environment"):
        pytest.skip("needs tools or an environment, see test_conversations.py and test_episodes.py")
    if method == "meet":
        pytest.skip("needs pairs, see test_control_tokens.py")
    others = frozenset().union(*map(tc.inputs.names, ("user", *fixed_collectors.OF_EXAMPLES)))
    if given := objective.required_inputs & others:
        message = f"method: expected .* whose inputs the trainer collects, got {method}, .* {min(given)}"
        with pytest.raises(ValueError, match=message):
            run(settings(method))
        return
    reward = "uniform:digest"
    if method in ("psr", "nsr", "w_reinforce", "thr", "nthr", "r3"):
        reward = "test_experiment:even"
    rows = 4 if objective.couples_rows else 3
    optimizer = OptimizerSettings(lr=1e-3, micro_batch=rows, precision="no", epochs=2, minibatches=2, schedule="linear")
    probes = ProbeSettings(continuations=2, interval=2, step_end="e", answers=2, answer_tokens=3)
    others = {"teacher": "tiny(steps=0, seed=1)", "aligned": "tiny(steps=0, seed=2)", "critic": CriticSettings("head")}
    others |= {"reward_model": "initial", "collectors": CollectorSettings(reverse_teacher="tiny(steps=0, seed=3)")}
    s = settings(method, optimizer=optimizer, steps=2, probes=probes, reward=reward, **others)
    s = only_read(s, objective)
    if "teacher_mask" in objective.required_inputs:
        s = dataclasses.replace(s, privileged=PrivilegedSettings("answer"))
    if method == "gtpo_conflict":  # an untrained model has a high entropy
        s = dataclasses.replace(s, objective=ObjectiveSettings(method, set=("limit=1000",)))
    if isinstance(objective, tc.Preference):
        message = f"group: expected 2 because of {method}, which compares the two responses to a prompt, got 4"
        with pytest.raises(ValueError, match=message):
            run(s)
        return
    run(s)
    lines = read_metrics(s.output)[1:]
    assert all(line["grad_norm"] > 0 for line in lines)
    if isinstance(objective, tc.Objective) and objective.ratio != tc.ratio.one():
        assert all(line["ratio_mean"] != 1 for line in lines), "the second pass is off policy"
    assert lines[0]["lr"] == 1e-3 and lines[1]["lr"] == 5e-4


def even(prompt, response, answer):
    return float(sum(map(ord, response)) % 2)


MIXTURES = [
    ObjectiveSettings("grpo", credit="tempo", ratio="ctpo", clip="ctpo", aggregation="ba"),
    ObjectiveSettings("dapo", terms=("kl(0.01)", "entropy(0.001)"), token_weights=("importance(high=2.0)",)),
    ObjectiveSettings("tip", aggregation="sequence_mean", filters=("top_share(0.5, score=given('forward_kl'))",)),
]


@pytest.mark.parametrize("objective", MIXTURES, ids=lambda x: x.method)
def test_mixtures_train(settings, uniform, objective):
    teacher = "tiny(steps=0, seed=1)" if distils(objective.build()) else None
    s = settings(objective=objective, steps=2, teacher=teacher)
    run(s)
    lines = read_metrics(s.output)[1:]
    assert all(line["grad_norm"] > 0 for line in lines)
    for term in objective.terms or ():
        assert {"kl": "kl", "entropy": "entropy_bonus"}[term.partition("(")[0]] in lines[0]


def test_a_kl_term_measures_the_distance_from_the_initial_model(settings, uniform):
    s = settings(objective=ObjectiveSettings("grpo", terms=("kl(0.5)",)), steps=3)
    run(s)
    kl = [line["kl"] for line in read_metrics(s.output)[1:]]
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[2] > 1e-5


def test_controllers_follow_their_metric_and_survive_a_resume(settings, uniform, tmp_path):
    # The entropy of the model is below the target, so the coefficient of a step is 0.01 more than that of the last.
    terms = ("entropy(target_entropy(target=100.0, delta=0.01))",)
    objective = ObjectiveSettings("grpo", aggregation="token_mean", terms=terms)
    whole = settings(objective=objective, steps=5, save_every=2, output=tmp_path / "whole")
    parts = dataclasses.replace(whole, output=tmp_path / "parts", steps=3)
    run(whole)
    run(parts)
    run(dataclasses.replace(parts, steps=5, resume=True))
    # A run measures the held-out reward at its last step too, which is another step here.
    lines = [[{**line, "held_out_reward_mean": 0} for line in numbers(s.output)] for s in (whole, parts)]
    assert lines[0] == lines[1]
    for n, line in enumerate(read_metrics(whole.output)[1:]):
        assert line["entropy_bonus"] == pytest.approx(line["entropy_mean"], rel=1e-5)
        assert line["loss"] - line["policy_loss"] == pytest.approx(-0.01 * n * line["entropy_mean"], rel=1e-4, abs=1e-6)


def test_a_controller_of_an_unknown_metric_is_named(settings, uniform):
    terms = ("entropy(target_entropy(metric='mood'))",)
    trainer = Trainer(resolved(settings(objective=ObjectiveSettings("grpo", terms=terms))))
    with pytest.raises(ValueError, match="metrics: expected mood because of target_entropy"):
        trainer.step(1)


def test_groups_with_equal_rewards_cost_no_pass(settings, monkeypatch):
    s = settings(reward="test_experiment:always")
    trainer = Trainer(resolved(s))
    before = [p.detach().clone() for p in trainer.model.parameters()]
    monkeypatch.setattr("tokcredit.train.collectors.predict", None)
    metrics = trainer.step(1).metrics
    assert metrics["groups_mixed_fraction"] == metrics["rows_with_gradient_fraction"] == metrics["loss"] == 0
    assert metrics["reward_mean"] == 1 and "ratio_mean" not in metrics and "entropy_mean" not in metrics
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def always(prompt, response, answer):
    return 1.0


def test_micro_batches_do_not_change_the_step(settings, uniform, gradients):
    metrics = []
    for size in (1, 3, 100):
        optimizer = OptimizerSettings(lr=0.1, micro_batch=size, precision="no")
        objective = ObjectiveSettings("ctpo", terms=("kl(0.01)", "entropy(0.01)"))
        metrics.append(Trainer(resolved(settings(objective=objective, optimizer=optimizer))).step(1).metrics)
    assert len(gradients) == 3 and gradients[0].norm() > 0.01
    for other, line in zip(gradients[1:], metrics[1:], strict=True):
        assert (other - gradients[0]).norm() < 1e-4 * gradients[0].norm()
        for name in ("loss", "policy_loss", "entropy_bonus", "entropy_mean", "tokens", "clip_high_fraction"):
            assert line[name] == pytest.approx(metrics[0][name], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("method", ["real", "dpo"])
def test_parts_of_coupled_rows_hold_whole_groups(method):
    """The parts of an optimizer step, and optimizer steps; ``test_contract.py`` adds up the gradients of such parts."""
    size = {"real": 4, "dpo": 2}[method]
    order = torch.randperm(5 * size, generator=torch.Generator().manual_seed(0))
    batch = tc.Rollouts(
        torch.arange(5 * size),
        torch.arange(5 * size + 1),
        order % 5,
        order.float(),
        ref_log_probs=-torch.ones(5 * size),
    )
    objective = tc.methods.load(method)
    prepared = objective.prepare(batch)

    def groups_of(parts):
        for rows in parts:
            prepared.select(rows)
        assert sorted(np.concatenate(parts).tolist()) == list(range(5 * size))
        return [len(set(batch.group_ids[rows].tolist())) for rows in parts]

    assert groups_of(micro_batches.units(np.arange(5 * size), batch, True)) == [1] * 5
    for rows, expected in ((1, [1] * 5), (size, [1] * 5), (2 * size + 1, [2, 2, 1]), (99, [5])):
        assert groups_of(micro_batches.micro_batches(torch.arange(5 * size), batch, rows, True)) == expected
    # Other objectives are cut anywhere.
    parts = micro_batches.micro_batches(torch.arange(5 * size), batch, 3)
    assert [len(rows) for rows in parts] == [3] * (5 * size // 3) + [5 * size % 3]


@pytest.mark.parametrize("method", ["grpo", "opsd", "ppo", "prime", "rto"])
def test_methods_that_are_compared_have_only_the_models_that_they_read(settings, method):
    others = {"teacher": "initial", "aligned": "initial", "reward_model": "initial", "critic": CriticSettings("head")}
    s = settings(method, privileged=PrivilegedSettings("answer"), **others)
    compatibility.checked(resolved(only_read(s, tc.methods.load(method))))


def test_a_group_of_coupled_rows_must_fit_a_micro_batch(settings):
    message = "micro_batch: expected at least 4, the size of a group, because the objective compares .*, got 3"
    with pytest.raises(ValueError, match=message):
        compatibility.checked(resolved(settings("real")))


def killed(settings):
    """A run that is killed inside its sixth step."""
    step = Trainer.step

    def until_six(trainer, number):
        if number == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(trainer, number)

    Trainer.step = until_six
    trainer_module.TransformersSampler = UniformSampler
    run(settings)


def test_a_killed_run_continues_with_the_same_numbers(settings, uniform, tmp_path):
    whole, cut = settings(steps=7, output=tmp_path / "whole"), settings(steps=7, output=tmp_path / "cut")
    run(whole)
    process = multiprocessing.get_context("spawn").Process(target=killed, args=(cut,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not (cut.output / "summary.json").exists()
    assert [line["step"] for line in read_metrics(cut.output)] == [0, 1, 2, 3, 4, 5]
    assert [p.name for p in cut.output.glob("checkpoint-*")] == ["checkpoint-000004"]
    with (cut.output / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "los')
    run(dataclasses.replace(cut, resume=True))
    assert numbers(cut.output) == numbers(whole.output)
    rows = [pq.read_table(s.output / "rollouts-000007.parquet").to_pylist() for s in (whole, cut)]
    assert rows[0] == rows[1]


def test_a_stop_request_saves_first(settings, uniform, tmp_path, monkeypatch):
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
    with pytest.raises(ValueError, match=r"seed: expected 0 as in the run in .*, or another output, got 1"):
        run(dataclasses.replace(s, resume=True, seed=1))
    longer = run(dataclasses.replace(s, resume=True, steps=2))
    assert longer["steps"] == 2


def test_a_correction_for_the_engine_is_added_once():
    """Without vllm installed, the objective that ``--sampler vllm`` trains is built by the same function."""
    added = compatibility._corrected(tc.methods.grpo())
    assert added == tc.mix("grpo", token_weights="tis")
    assert compatibility._corrected(added) == added
    bypass = {"bypass_mode": True, "loss_type": "reinforce", "rollout_rs": "token_k2", "rollout_rs_threshold": 0.1}
    for corrected in (
        tc.mix("grpo", ratio="token(to='rollout_log_probs')"),
        tc.mix("grpo", filters="geo_rs"),
        tc.mix("grpo", token_weights="within('ratio', 'min', 1e-4)"),
        tc.rollout_correction.from_verl(tc.methods.grpo(), bypass),
        tc.methods.dppo_tv(),
        tc.methods.dpo(),
    ):
        assert compatibility._corrected(corrected) == corrected
    regularized = tc.mix("grpo", terms="kl(0.1, to='rollout_log_probs')")
    assert compatibility._corrected(regularized).token_weights == (tc.token_weights.tis(),)


PRESETS = [
    ("--token-weights", "icepop(low=0.9, high=1.1)", tc.token_weights.icepop(low=0.9, high=1.1)),
    ("--token-weights", "mis()", tc.token_weights.mis()),
    ("--filters", "geo_rs(low=0.9, high=1.1)", tc.filters.geo_rs(low=0.9, high=1.1)),
    ("--filters", "within('k3', 'turn', high=0.01)", tc.filters.within("k3", "turn", high=0.01)),
    ("--ratio", "token(to='rollout_log_probs')", tc.ratio.token(to="rollout_log_probs")),
    ("--token-weights", None, None),
]


@pytest.mark.parametrize(("option", "text", "stage"), PRESETS)
def test_the_correction_of_the_command_line_is_applied_and_measured(tmp_path, monkeypatch, option, text, stage):
    """With ``--sampler vllm``, whose place a sampler of noisy log-probs takes."""

    class Noisy(UniformSampler):
        def sample(self, prompts, count, max_tokens, temperature, stop=()):
            made = super().sample(prompts, count, max_tokens, temperature, stop)
            g = torch.Generator().manual_seed(len(made.tokens))
            return made._replace(log_probs=made.log_probs + 0.1 * torch.randn(len(made.tokens), generator=g))

    monkeypatch.setattr(compatibility, "find_spec", lambda name: True)
    monkeypatch.setattr(Trainer, "_vllm", lambda trainer, dtype: Noisy(trainer.model, trainer.tokenizer))
    words = "train --method grpo --model tiny(steps=0) --sampler vllm --prompts 2 --group 4 --max-tokens 6 --steps 1"
    words += " --reward uniform:digest --tasks addition(digits=1) --micro-batch 4 --precision no"
    given = []
    monkeypatch.setattr(train, "run", lambda settings: given.append(settings) or {})
    cli.main([*words.split(), "--output", str(tmp_path / "run"), option, *([text] if text else [])])
    trainer = Trainer(resolved(given[0]))
    objective = trainer.objective
    plain = {"filters": (), "token_weights": (), "ratio": tc.ratio.token(), "scales": ()}
    chosen = {option[2:].replace("-", "_"): (stage,) if option != "--ratio" else stage} if stage else {}
    assert {kind: getattr(objective, kind) for kind in plain} == {**plain, **chosen}
    step = trainer.step(1)
    prepared, batch = step.update.prepared, step.update.prepared.batch
    names = {x.removeprefix("mismatch_") for x in step.metrics if x.startswith("mismatch_")}
    measured = {"kl", "k3_kl", "chi2_token", "chi2_seq", "ppl_ratio", "training_ppl", "rollout_ppl"}
    assert names >= measured and ("ess" in names) == isinstance(stage, tc.token_weights.importance)
    old = batch.old_log_probs if "old_log_probs" in objective.required_inputs else step.update.log_probs
    known = ~old.isnan()
    y = (old - batch.rollout_log_probs)[known].double()
    assert step.metrics["mismatch_kl"] == pytest.approx(-y.mean().item(), rel=1e-4)
    assert y.std() > 0.05
    if "ess" in names:
        w = per_token(prepared.multiplier, batch.spans).double()
        expected = w.sum() ** 2 / (w**2).sum() / len(w)
        assert step.metrics["mismatch_ess"] == pytest.approx(expected.item(), rel=1e-5)


def test_the_length_of_an_aggregation_is_the_limit_of_a_reply(settings):
    assert Trainer(resolved(settings("dr_grpo"))).objective.aggregation == tc.aggregation.sequence_sum(6)


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
    assert {p.name for p in folder.iterdir()} == runs | {"compare.md", "compare.png", ".lock"}
    # Runs with the same seed have the same prompts and the same first responses.
    first = [read_metrics(folder / f"{m}-seed1")[1] for m in ("grpo", "ctpo")]
    assert first[0]["reward_mean"] == first[1]["reward_mean"] and first[0]["tokens"] == first[1]["tokens"]
    assert "| `ctpo` |" in (folder / "compare.md").read_text()
    before = {p: p.stat().st_mtime_ns for p in Path(folder).glob("*/summary.json")}
    compare(("grpo", "ctpo"), s, seeds=2)
    assert before == {p: p.stat().st_mtime_ns for p in Path(folder).glob("*/summary.json")}


def test_smoothing_has_no_start_up_bias():
    assert smoothed([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert smoothed([0.0, 1.0], weight=0.5) == pytest.approx([0.0, 2 / 3])


def test_an_engine_that_is_not_installed_is_named_at_once(settings, monkeypatch):
    monkeypatch.setattr("tokcredit.train.compatibility.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="sampler: expected transformers because vllm is not installed, got vllm"):
        run(settings(sampling=dataclasses.replace(settings().sampling, sampler="vllm")))
