"""Training on pairs and completions: metrics by hand, resumed runs, and settings without effect."""

import dataclasses
import json
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import tokcredit as tc
import torch
from test_experiment import TIMES, numbers
from test_ranks import free_port, join
from tokcredit.report import report
from tokcredit.train import (
    CollectorSettings,
    ObjectiveSettings,
    OptimizerSettings,
    ProbeSettings,
    SamplingSettings,
    compare,
    example_trainer,
    run,
)
from tokcredit.train.compatibility import only_read
from tokcredit.train.example_trainer import ExampleTrainer
from tokcredit.train.experiment import resolved
from tokcredit.train.record import read_metrics
from tokcredit.train.trainer import Trainer

PAIRS = [
    {"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": "x" * (1 + (a + 2 * b) % 3) + str(a - b)}
    for a in range(6)
    for b in range(4)
]


@pytest.fixture
def on_pairs(settings, tmp_path):
    """A run of a random model on pairs, or on completions."""

    def make(method="dpo", rows=PAIRS, **changes):
        option = "pairs" if "chosen" in rows[0] else "completions"
        path = tmp_path / f"{option}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        defaults = {option: path, "tasks": (), "reward": None, "sampling": SamplingSettings(prompts=4), "steps": 4}
        return settings(method, **(defaults | {"eval_problems": 100} | changes))

    return make


def completions():
    return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]


def test_a_teacher_in_an_engine_is_let_go(on_pairs, monkeypatch):
    def in_engine(settings, objective, teacher, *others):
        teacher.model = None

    monkeypatch.setattr("tokcredit.train.teacher.scores", in_engine)
    trainer = ExampleTrainer(resolved(on_pairs("gkd", completions(), teacher="tiny(steps=0, seed=1)")))
    assert trainer._teachers == (None, None)


def test_fewer_held_out_examples_than_processes(on_pairs, monkeypatch):
    monkeypatch.setattr(example_trainer, "Ranks", lambda _: SimpleNamespace(index=0, count=2))
    with pytest.raises(
        ValueError, match=r"^eval_problems, held_out: expected at least 2 held-out examples, .* got 1 of"
    ):
        ExampleTrainer(resolved(on_pairs(eval_problems=1)))


@torch.no_grad()
def log_prob(trainer, prompt, response, model=None):
    """Log-prob of a response, one row at a time, without the code of the trainer."""
    ids = torch.tensor([prompt + response])
    rows = (model or trainer.model)(ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
    return float(rows.double().gather(1, ids[0, len(prompt) :, None]).sum())


def test_metrics_are_those_of_the_formula(on_pairs):
    trainer = ExampleTrainer(resolved(on_pairs()))
    before = [[log_prob(trainer, e.prompt, x.tokens) for x in e.responses] for e in trainer._examples]
    found = trainer.measure()
    assert found["held_out_loss"] == pytest.approx(0.693147, abs=1e-5)
    trainer.step(1)
    trainer.step(2)
    margins = []
    for i in trainer._held_out:
        e = trainer._examples[i]
        now = [log_prob(trainer, e.prompt, x.tokens) for x in e.responses]
        margins.append((now[0] - before[i][0]) - (now[1] - before[i][1]))
    margins = torch.tensor(margins)
    found = trainer.measure()
    assert found["held_out_margin_mean"] == pytest.approx(float(margins.mean()), abs=1e-4)
    assert found["held_out_accuracy_mean"] == pytest.approx(float((margins > 0).double().mean()))
    assert found["held_out_loss"] == pytest.approx(float(torch.nn.functional.softplus(-0.1 * margins).mean()), abs=1e-5)
    assert len({len(x.tokens) for e in trainer._examples for x in e.responses}) > 1, "means are not over tokens"


def test_reversed_pairs(on_pairs):
    """The margin of the same pairs then falls."""
    rows = [{"prompt": f"{a}=", "chosen": "ab", "rejected": "cd"} for a in range(8)]
    trainer = ExampleTrainer(resolved(on_pairs(rows=rows, reverse_pairs=True)))
    assert {tuple(x.text for x in e.responses) for e in trainer._examples} == {("cd", "ab")}
    trainer.step(1)
    e = trainer._examples[trainer._held_out[0]]
    first = ExampleTrainer(resolved(on_pairs(rows=rows)))
    rise = [log_prob(trainer, e.prompt, x.tokens) - log_prob(first, e.prompt, x.tokens) for x in e.responses]
    assert rise[0] > rise[1]
    with pytest.raises(ValueError, match="reverse_pairs: expected False because there are no pairs, got True"):
        on_pairs(rows=completions(), reverse_pairs=True)


def test_training_prefers_the_chosen_responses(on_pairs):
    """Of pairs that do not contradict each other, every step raises the margin."""
    rows = [{"prompt": f"{a}=", "chosen": "ab", "rejected": "cd"} for a in range(8)]
    trainer = ExampleTrainer(resolved(on_pairs(rows=rows)))
    margins = []
    for number in range(1, 4):
        trainer.step(number)
        margins.append(trainer.measure()["held_out_margin_mean"])
    assert 0 < margins[0] < margins[1] < margins[2]


OF_EXAMPLES = [name for name in tc.methods.names() if not isinstance(tc.methods.load(name), tc.Objective)]
OF_EXAMPLES.remove("meet")  # see test_control_tokens.py


OTHER = [f"tiny(steps=0, seed={seed})" for seed in (1, 2)]


@pytest.mark.parametrize("method", OF_EXAMPLES)
def test_every_method_trains_by_name(method, on_pairs):
    objective = tc.methods.load(method)
    rows = PAIRS if isinstance(objective, tc.Preference) else completions()
    others = {
        "teacher": "tiny(steps=0, seed=1)",
        "aligned": OTHER[0],
        "collectors": CollectorSettings(*OTHER, reverse_teacher=OTHER[1]),
    }
    s = resolved(only_read(on_pairs(method, rows, **others), objective))
    of_rollouts = frozenset().union(*map(tc.inputs.names, example_trainer._SAMPLED)) - {"prompt_tokens"}
    if objective.required_inputs & of_rollouts:
        with pytest.raises(ValueError, match=f"method: expected one that reads no inputs of rollouts .* got {method}"):
            ExampleTrainer(s)
        return
    trainer = ExampleTrainer(s)
    assert trainer.step(1).metrics["grad_norm"] > 0
    assert torch.tensor(list(trainer.measure().values())).isfinite().all()


def test_held_out_prompts_are_not_trained(on_pairs):
    rows = [row | {"rejected": f"x{i}"} for row in PAIRS for i in range(2)]
    trainer = ExampleTrainer(resolved(on_pairs(rows=rows)))
    sides = [{trainer._examples[i].question for i in side} for side in (trainer._train, trainer._held_out)]
    assert all(sides) and not sides[0] & sides[1]
    assert len(trainer._train) + len(trainer._held_out) == 48


def test_micro_batches_do_not_change_the_step(on_pairs, gradients):
    for size in (1, 3, 64):
        optimizer = OptimizerSettings(lr=1e-3, micro_batch=size, precision="no")
        ExampleTrainer(resolved(on_pairs(optimizer=optimizer))).step(1)
    assert len(gradients) == 3
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-3, atol=1e-6)


def test_pairs_of_rollouts_are_never_cut(settings, uniform):
    """Optimizer steps and micro-batches of the two responses to each prompt have whole pairs, for any size."""
    optimizer = OptimizerSettings(lr=1e-3, micro_batch=3, minibatches=2, precision="no")
    sampling = SamplingSettings(prompts=5, group=2, max_tokens=6)
    metrics = Trainer(resolved(settings("dpo", sampling=sampling, optimizer=optimizer))).step(1).metrics
    assert metrics["pairs"] == 5 and 0 <= metrics["accuracy_mean"] <= 1 and metrics["grad_norm"] > 0


def test_a_run_on_pairs(on_pairs):
    s = on_pairs(rollouts_every=3)
    summary = run(s)
    lines = read_metrics(s.output)
    assert [line["step"] for line in lines if "held_out_accuracy_mean" in line] == [0, 2, 4]
    assert summary["held_out_before"] == lines[0]["held_out_accuracy_mean"]
    assert summary["held_out_loss_after"] == lines[4]["held_out_loss"] and summary["tokens_per_second"] > 0
    names = {path.name for path in s.output.iterdir()}
    assert {"model", "tokenizer", "curve.png", "report.html", "summary.json", "fixed_inputs.parquet"} <= names
    rows = pq.read_table(s.output / "rollouts-000003.parquet").to_pylist()
    assert [row["reward"] for row in rows] == [1.0, 0.0] * 4 and rows[0]["completion"] != rows[1]["completion"]
    reference = pq.read_table(s.output / "fixed_inputs.parquet").to_pylist()
    kept = {tuple(row["ref_log_probs"]) for row in reference}
    for chosen, rejected in zip(rows[::2], rows[1::2], strict=True):
        assert (*chosen["ref_log_probs"], *rejected["ref_log_probs"]) in kept
    text = report(s.output, s.objective.build()).read_text()
    assert '"with_margin": ["dpo"]' in text and '"notes": []' in text


def test_a_resumed_run_gives_the_numbers_of_a_whole_one(on_pairs, tmp_path, monkeypatch):
    whole = on_pairs(output=tmp_path / "whole", eval_every=0)
    run(whole)
    parts = dataclasses.replace(whole, output=tmp_path / "parts", steps=2)
    run(parts)
    monkeypatch.setattr(example_trainer.FixedCollectors, "__call__", None)  # everything is in the folder
    with pytest.raises(TypeError):
        run(dataclasses.replace(parts, steps=200, resume=True))
    monkeypatch.undo()
    run(dataclasses.replace(parts, steps=4, resume=True))
    a, b = (
        [{k: v for k, v in line.items() if "held_out" not in k} for line in numbers(s.output)] for s in (whole, parts)
    )
    assert a == b and len(a) == 5
    assert read_metrics(whole.output)[-1]["held_out_loss"] == read_metrics(parts.output)[-1]["held_out_loss"]
    rows = [row | {"chosen": "9"} for row in PAIRS]
    with pytest.raises(ValueError, match=r"pairs: expected those of the run in .*, got others in the file"):
        run(dataclasses.replace(on_pairs(rows=rows), output=parts.output, steps=6, resume=True, eval_every=0))


def test_completions(on_pairs):
    s = on_pairs("sft", completions())
    summary = run(s)
    lines = read_metrics(s.output)
    assert (
        summary["held_out_before"] == lines[0]["held_out_loss"] > summary["held_out_after"] == summary["held_out_best"]
    )
    trainer = ExampleTrainer(resolved(dataclasses.replace(s, output=s.output.parent / "new")))
    values = [
        (log_prob(trainer, e.prompt, e.responses[0].tokens), len(e.responses[0].tokens)) for e in held_out(trainer)
    ]
    expected = -sum(x for x, _ in values) / sum(n for _, n in values)
    assert trainer.measure()["held_out_loss"] == pytest.approx(expected, abs=1e-5) == summary["held_out_before"]
    assert not (s.output / "fixed_inputs.parquet").exists()


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_one_side_of_pairs(on_pairs, side):
    """The models that cdpo contrasts are trained in this way."""
    pairs = on_pairs()
    trainer = ExampleTrainer(
        resolved(dataclasses.replace(on_pairs("sft"), pairs=None, completions=pairs.pairs, imitate=side))
    )
    assert [x.responses[0].text for x in trainer._examples] == [row[side] for row in PAIRS]
    assert trainer.step(1).metrics["grad_norm"] > 0


def held_out(trainer):
    return [trainer._examples[i] for i in trainer._held_out]


def test_tasks_are_measured(on_pairs):
    s = resolved(on_pairs(tasks=("addition(digits=1)",), reward="uniform:digest", eval_problems=3))
    trainer = ExampleTrainer(s)
    assert s.sampling.max_tokens == 0 and trainer._tasks[0].settings.sampling.max_tokens == 28
    assert 0 < trainer.measure()["held_out_reward_mean"] < 1


def on_rank(settings):
    """What is measured before and after a step, and the gradient of the step."""
    trainer, gradients = ExampleTrainer(resolved(settings)), []

    def keep(parameters, norm):
        gradients.append(torch.cat([p.grad.reshape(-1) for p in trainer.model.parameters()]))
        return gradients[-1].norm()

    trainer.accelerator.clip_grad_norm_ = keep
    before = trainer.measure()
    metrics = trainer.step(1).metrics
    return before, {k: v for k, v in metrics.items() if k not in TIMES}, trainer.measure(), gradients[0]


def one_rank(rank, runs, port, folder):
    join(rank, port)
    torch.save([on_rank(s) for s in runs], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_equal_one(on_pairs, tmp_path):
    """Also where their shares of the pairs differ in length, and one has more held-out pairs."""
    learned = ObjectiveSettings("sparse_po", set=("learned=true", "l1_reward=0.1"))
    runs = [on_pairs(objective=learned), on_pairs("sft", completions())]
    torch.multiprocessing.spawn(one_rank, (runs, free_port(), tmp_path), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for s, first, second in zip(runs, *ranks, strict=True):
        whole = on_rank(s)
        for one, a, b in zip(whole[:3], first[:3], second[:3], strict=True):
            assert a == b and a.keys() == one.keys()
            # Before the update all scores are 0 up to rounding, and their signs mean nothing.
            compared = [name for name in a if "accuracy" not in name or one is whole[2]]
            assert [a[x] for x in compared] == pytest.approx([one[x] for x in compared], rel=1e-4, abs=1e-5)
        assert torch.equal(first[3], second[3])
        torch.testing.assert_close(first[3], whole[3], rtol=1e-3, atol=1e-6)


WRONG = {
    "grpo": (
        {"objective": ObjectiveSettings("grpo")},
        "method: expected a preference method because of pairs, got grpo",
    ),
    "sft": ({"objective": ObjectiveSettings("sft")}, "method: expected a preference method because of pairs, got sft"),
    "group": ({"sampling": SamplingSettings(group=4)}, "group: expected 8 because of pairs, got 4"),
    "sampler": (
        {"sampling": SamplingSettings("vllm"), "tasks": ("addition(digits=1)",)},
        "sampler: expected transformers because of pairs, got vllm",
    ),
    "probes": ({"probes": ProbeSettings(interval=3)}, "interval: expected 5 because of pairs, got 3"),
    "epochs": ({"optimizer": OptimizerSettings(epochs=2)}, "epochs: expected 1 because of pairs, got 2"),
    "reward": (
        {"reward": "uniform:digest"},
        "reward: expected None because of pairs without tasks, got uniform:digest",
    ),
    "held out": ({"held_out": 1e-9}, "held_out: expected a share that leaves prompts on both sides, got 1e-09 of"),
}


@pytest.mark.parametrize("name", WRONG)
def test_settings_that_do_not_fit(name, on_pairs):
    changes, message = WRONG[name]
    s = on_pairs(**changes)
    with pytest.raises(ValueError, match=f"^{message}"):
        run(s)
    assert not s.output.exists()


def test_methods_are_compared(on_pairs, tmp_path):
    folder = compare(("dpo",), on_pairs(output=tmp_path / "compared", steps=1), seeds=1)
    table = (folder / "compare.md").read_text().splitlines()
    summary = json.loads((folder / "dpo-seed0" / "summary.json").read_text())
    assert table[2].startswith(
        f"| `dpo` | {summary['held_out_before']:.3f} ± 0.000 | {summary['held_out_after']:.3f} ±"
    )
    assert (folder / "compare.png").exists()


def test_one_kind_of_examples(on_pairs):
    with pytest.raises(ValueError, match="imitate: expected completion because there are no completions, got chosen"):
        on_pairs(imitate="chosen")
    with pytest.raises(ValueError, match="pairs, completions: expected one of them, got"):
        dataclasses.replace(on_pairs(), completions=on_pairs("sft", completions()).completions)
    with pytest.raises(ValueError, match="method: expected a supervised method because of completions, got dpo"):
        run(on_pairs("dpo", completions()))
