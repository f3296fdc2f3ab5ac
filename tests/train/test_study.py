"""Studies. Their runs are real in one test, and written by hand in the others."""

import dataclasses
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokcredit.train import (
    Settings,
    StudySettings,
    algorithms,
    run,
    study,
    study_plan,
    study_report,
    study_results,
    study_runs,
    tasks,
)
from tokcredit.train.experiment import resolved
from tokcredit.train.folder import plain

OPTIONS = (
    "--model tiny(steps=0) --tasks addition(digits=1) --reward uniform:digest --precision no --prompts 2 --group 4 "
    "--max-tokens 6 --steps 2 --eval-every 1 --eval-problems 4 --rollouts-every 0"
)
ONCE = {"question": "A?", "options": "", "baseline": "a", "arms": {"a": "--method grpo", "b": "--method dapo"}}
TWICE = {"question": "B?", "options": "--method grpo", "baseline": "a", "arms": {"a": "", "c": "--minibatches 2"}}
PLAN = {
    "options": OPTIONS,
    "lr": [1e-4, 1e-3],
    "tuning_seeds": [8, 9],
    "seeds": [0, 1],
    "threshold": 0.4,
    "gradient_steps": 3,
    "experiments": {"once": ONCE, "twice": TWICE},
}


class Later:
    """Runs in this process when its result is wanted."""

    def __init__(self, function, *arguments):
        self.call, self.results = (function, arguments), []

    def done(self):
        return bool(self.results)

    def result(self):
        function, arguments = self.call
        self.results = self.results or [function(*arguments)]
        return self.results[0]


class Pool:
    """Takes the place of a process pool."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments):
        return Later(function, *arguments)

    def shutdown(self, cancel_futures):
        assert cancel_futures


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a study and returns the settings that run it in this process."""
    monkeypatch.setattr(study_runs, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(study_runs, "as_completed", iter)
    monkeypatch.setattr(study_runs.multiprocessing, "active_children", list)

    def made(plan=PLAN):
        path = tmp_path / "plan.json"
        path.write_text(json.dumps(plan))
        return StudySettings(str(path), tmp_path / "study")

    return made


def score(settings):
    """Held-out reward of a run by hand: the larger rate is better for DAPO, the smaller one for the others."""
    large, is_dapo = settings.optimizer.lr > 5e-4, settings.objective.method == "dapo"
    return 0.5 + 0.01 * settings.seed + 0.1 * (large == is_dapo)


@pytest.fixture
def done(monkeypatch):
    """Runs that only write their files, in order."""
    found = []

    def by_hand(settings):
        found.append(settings)
        folder = settings.output
        (folder / "settings.json").write_text(json.dumps(plain(settings)))
        lines = [{"step": 0, "held_out_reward_mean": 0.1}]
        lines += [
            {"step": n, "tokens": 50.0, "grad_norm": 1.0 + n % 2, "mismatch_k3_kl": n / 8, "seconds": 1.0}
            for n in (1, 2)
        ]
        lines[-1]["held_out_reward_mean"] = score(settings)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        table = {"tokens": [[5, 6], [5, 7]], "group": [0, 0], "reward": [1.0, 0.0]}
        pq.write_table(pa.table(table), folder / "rollouts-000002.parquet")
        (folder / "checkpoint-000002").mkdir()
        torch.save({"state": {0: {"exp_avg": torch.ones(1)}}}, folder / "checkpoint-000002/optimizer.bin")
        summary = {"held_out_after": score(settings)}
        (folder / "summary.json").write_text(json.dumps(summary))
        return summary

    monkeypatch.setattr(study_runs, "run", by_hand)
    return found


def test_the_runs_of_a_study(write, done):
    folder = study(write())
    found = json.loads((folder / "results.json").read_text())
    first, second = (found["experiments"][name]["arms"] for name in ("once", "twice"))
    assert first["a"]["runs"] == second["a"]["runs"] != first["b"]["runs"], "equal arms share their runs"
    assert len(found["arms"]) == 3 and found["seeds"] == [0, 1]
    # Three arms, two rates, two seeds; the gradients of a and c are those of one update per batch.
    still = [one for one in done if one.optimizer.lr < 1e-9]
    assert len(still) == 2 and all(one.steps == 3 and one.optimizer.minibatches == 1 for one in still)
    tuning = [one for one in done if one.seed in (8, 9)]
    assert len(tuning) == 3 * 2 * 2 and len(done) == 2 + len(tuning) + 3 * 2
    assert [one.seed for one in done[-6:]] == [0, 0, 0, 1, 1, 1], "one seed after the other"
    for name, method, lr in ((first["a"]["runs"], "grpo", 1e-4), (first["b"]["runs"], "dapo", 1e-3)):
        arm = found["arms"][name]
        assert arm["lr"] == lr and {one.optimizer.lr for one in done[-6:] if one.objective.method == method} == {lr}
        assert dict(arm["tuning"])[lr] == pytest.approx(0.685)
        assert [run["held_out"] for run in arm["runs"]] == [[0.1, 0.6], [0.1, 0.61]]
        assert arm["runs"][0] | {"held_out": 0} == {
            **{"seed": 0, "steps": [0, 2], "tokens": [0, 100], "held_out": 0},
            **{"branch_fraction": 0.5, "sampler_divergence": 0.19, "seconds": 2.0},
        }
    assert (folder / "once.svg").exists() and "| `b` |" in (folder / "report.md").read_text()


def test_a_further_seed_runs_only_what_is_missing(write, done):
    study(write())
    before = len(done)
    study(write())
    assert len(done) == before
    study(write(PLAN | {"seeds": [0, 1, 2]}))
    assert len(done) == before + 3 and {one.seed for one in done[before:]} == {2}


def test_a_study_that_is_stopped_goes_on(write, done, monkeypatch):
    by_hand, stopped = study_runs.run, []

    def stopping(settings):
        if len(done) < 5:
            return by_hand(settings)
        stopped.append(settings)
        return None

    monkeypatch.setattr(study_runs, "run", stopping)
    assert study(write()) is None and len(stopped) == 1
    monkeypatch.setattr(study_runs, "run", by_hand)
    folder = study(write())
    assert len({one.output for one in done}) == len(done) == 20 and done[5].output == stopped[0].output
    assert json.loads((folder / "results.json").read_text())["seeds"] == [0, 1]


def test_real_runs(write, uniform):
    one = {"options": "", "question": "?", "baseline": "a", "arms": {"a": "--method grpo"}}
    plan = PLAN | {"experiments": {"x": one}, "lr": [1e-4], "tuning_seeds": [9], "seeds": [0], "gradient_steps": 2}
    folder = study(write(plan))
    (arm,) = json.loads((folder / "results.json").read_text())["arms"].values()
    (curve,) = arm["runs"]
    assert curve["steps"] == [0, 1, 2] and curve["tokens"][0] == 0 < curve["tokens"][1] < curve["tokens"][2]
    assert len(curve["held_out"]) == 3 and 0 < curve["branch_fraction"] <= 1 and arm["gradient"]["variance"] > 0
    logs = list(folder.glob("*/log.txt"))
    assert len(logs) == 3 and all("held-out reward before" in log.read_text() for log in logs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": []}, "seeds: expected at least one, got none"),
        ({"seeds": [9]}, "tuning_seeds: expected other seeds than those of seeds, got [9]"),
        ({"seeds": [0, 1, 0]}, "seeds: expected different seeds, got [0, 1, 0]"),
        ({"seeds": [0.5]}, "seeds: expected whole numbers at least 0, got (0.5,)"),
        ({"lr": [1e-4, 0]}, "lr: expected numbers above 0, got (0.0001, 0)"),
        ({"threshold": "high"}, "threshold: expected a number, got 'high'"),
        ({"gradient_steps": 1}, "gradient_steps: expected 0, or at least 2 for a variance, got 1"),
        ({"experiments": {"once": ONCE | {"arms": {"a": 1}}}}, "arms: expected options by name, got {'a': 1}"),
        ({"options": OPTIONS + " --pairs x"}, "once: a: expected --tasks without --pairs and --completions"),
        ({"steps": 3}, "unexpected keyword argument 'steps'"),
        ({"experiments": 3}, "study: expected the form that docs/runs.md shows"),
        ({"options": OPTIONS + " --lr 1"}, "once: a: expected no --output, --resume, --lr and --seed"),
        ({"options": OPTIONS + " --group 0"}, "once: a: group: expected a whole number at least 1, got 0"),
        ({"options": OPTIONS + " --clip nothing"}, "once: a: clip: expected a stage or a method"),
    ],
)
def test_a_malformed_study_is_refused_before_it_runs(write, changes, message, tmp_path):
    with pytest.raises(ValueError) as caught:
        study(write(PLAN | changes))
    assert message in str(caught.value)
    assert not list(tmp_path.glob("study/*"))


def test_a_baseline_is_an_arm(write):
    experiment = PLAN["experiments"]["once"] | {"baseline": "ppo"}
    with pytest.raises(ValueError, match="baseline: expected one of a, b, got 'ppo'"):
        study(write(PLAN | {"experiments": {"once": experiment}}))


def test_an_unknown_study_is_named(tmp_path):
    names = "smollm2, tiny, tiny_again, tiny_async"
    with pytest.raises(ValueError, match=f"study: expected {names} or a JSON file, got 'tny'"):
        study(StudySettings("tny", tmp_path / "x"))


@pytest.mark.parametrize("name", ["tiny", "smollm2"])
def test_arms_of_the_studies_of_the_package(name):
    """Each is a valid objective with at least five seeds, and is trained by the options that its names say."""
    plan = study_plan.read(name)
    arms = list(plan.arms())
    assert len(plan.seeds) >= 5 and all(isinstance(made, Settings) for _, _, made in arms)
    assert {"grpo", "dapo", "tempo", "ctpo", "ba", "hapo", "ppo"} <= {made.objective.method for _, _, made in arms}


def test_the_arms_of_the_study_of_samplers():
    """Where the sampler differs from the policy, the baseline alone is without a correction."""
    plan = study_plan.read("tiny_async")
    assert len(plan.seeds) >= 5
    for name, experiment in plan.experiments.items():
        arms = {arm: made for of, arm, made in plan.arms() if of == name}
        differs = {
            x: made.sampling.staleness > 0 or made.sampling.sampling_precision != "auto" for x, made in arms.items()
        }
        uncorrected = {
            x
            for x, made in arms.items()
            if differs[x] and "rollout_log_probs" not in made.objective.build().required_inputs
        }
        assert uncorrected == ({experiment.baseline} if any(differs.values()) else set())


def test_the_variance_of_the_gradient(settings, gradients, uniform):
    """From files of the run alone; the policy stays as it is."""
    one = settings("grpo", steps=4)
    optimizer = dataclasses.replace(one.optimizer, lr=1e-30, max_grad_norm=float("inf"))
    one = resolved(dataclasses.replace(one, optimizer=optimizer))
    run(one)
    found = torch.stack(gradients).double()
    weights = 0.1 * 0.9 ** torch.arange(4.0).flip(0).double()
    weights /= weights.sum()
    mean = weights @ found
    variance = (weights @ (found - mean).square().sum(1)) / (1 - weights.square().sum())
    expected = {"mean_squared_norm": mean.square().sum() - weights.square().sum() * variance, "variance": variance}
    assert study_results._gradient(one) == pytest.approx({k: float(v) for k, v in expected.items()}, abs=2e-3)


@pytest.mark.parametrize("stepped", [[1, 3, 4], [2]])
def test_steps_without_gradient_are_no_batches(tmp_path, settings, stepped):
    one = dataclasses.replace(settings("grpo"), output=tmp_path)
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer, gradients, lines = torch.optim.AdamW([weight], lr=1e-30), [], [{"step": 0}]
    for number in range(1, 6):
        norm = 0.0
        if number in stepped:
            weight.grad = torch.tensor([1.0, number, -2.0], dtype=torch.float64)
            gradients.append(weight.grad)
            norm = float(weight.grad.norm())
            optimizer.step()
        lines.append({"step": number, "grad_norm": norm})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "checkpoint-000005").mkdir()
    torch.save(optimizer.state_dict(), tmp_path / "checkpoint-000005" / "optimizer.bin")
    if len(stepped) < 2:
        assert study_results._gradient(one) is None
        return
    weights, found = torch.tensor([0.81, 0.9, 1.0]).double() / 2.71, torch.stack(gradients)
    mean, double = weights @ found, weights.square().sum()
    variance = (weights @ (found - mean).square().sum(1)) / (1 - double)
    expected = {"mean_squared_norm": float(mean.square().sum() - double * variance), "variance": float(variance)}
    assert study_results._gradient(one) == pytest.approx(expected, rel=1e-6)


def test_branch_tokens(tmp_path):
    # Both rows of the first group begin with 5 and then branch; those of the second are equal.
    table = {"tokens": [[5, 6], [5, 7, 8], [1, 2], [1, 2]], "group": [0, 0, 1, 1], "reward": [1.0, 0.0, 0.0, 0.0]}
    pq.write_table(pa.table(table), tmp_path / "rollouts-000002.parquet")
    assert study_results._branch_fraction(tmp_path) == pytest.approx(2 / 9)


def arm(*finals, lr=1e-4, gradient=None):
    runs = [
        {
            "seed": n,
            "steps": [0, 5, 10],
            "tokens": [0, 50_000, 100_000],
            "held_out": [0.1, x / 2, x],
            "branch_fraction": 0.25,
            "sampler_divergence": 0.001 * (n + 1),
        }
        for n, x in enumerate(finals)
    ]
    return {"lr": lr, "tuning": [], "gradient": gradient, "runs": runs}


def test_the_table_by_hand(monkeypatch):
    results = {
        **{"threshold": 0.3, "gradient_steps": 20},
        "experiments": {
            "x": {
                "question": "?",
                "options": "",
                "baseline": "a",
                "arms": {x: {"options": "", "runs": x} for x in "abc"},
            }
        },
        "arms": {
            "a": arm(0.5, 0.5, gradient={"mean_squared_norm": 1.0, "variance": 4.0}),
            "b": arm(0.7, 0.696),
            "c": arm(0.3, 0.298),
        },
    }
    assert [row[5] for row in study_report.rows(results, "x")[1:]] == ["-", "too few seeds", "too few seeds"]
    monkeypatch.setattr(study_report, "_ENOUGH", 2)
    header, a, b, c = study_report.rows(results, "x")
    assert a == ("`a`", "0.0001", "0.500 [0.500, 0.500]", "-", "-", "-", "100k (2 of 2)", "25%", "0.25")
    assert b[3:7] == ("+0.198 [+0.173, +0.223]", "2 of 2", "better", "50k (2 of 2)")
    assert c[2:7] == ("0.299 [0.298, 0.300]", "-0.201 [-0.214, -0.188]", "0 of 2", "worse", "100k (1 of 2)")
    assert study_report.summary([header, a, b, c], "a") == "Compared with `a`: better: `b`; worse: `c`."
    assert header[-1] == "signal / noise"
    header, *rest = study_report.rows(results | {"gradient_steps": 0}, "x")
    assert header[-1] == "sampler divergence" and {row[-1] for row in rest} == {"1.5e-03"}


def test_the_interval_covers_the_mean():
    low, high = study_report.interval([0.1, 0.2, 0.3, 0.4, 0.5])
    assert 0.1 < low < 0.3 < high < 0.5 and low + high == pytest.approx(0.6, abs=0.02)
    assert study_report.interval([0.5, 0.5]) == (0.5, 0.5)
    of_differences = study_report.interval_of_differences
    margin = 2.776445 * 0.5**0.5  # the 97.5 % point of Student's t with 4 degrees of freedom, and the standard error
    assert of_differences([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx((3 - margin, 3 + margin))
    assert of_differences([-0.5, -0.5]) == of_differences([-0.5]) == (-0.5, -0.5)


@pytest.mark.parametrize("kind", ["sums", "letters"])
def test_problems_with_steps(kind):
    problems = tasks.load([f"{kind}(size=50)"], 0.3)
    assert problems.train[0] and problems.held_out
    draw, size = algorithms.DRAWS[kind], algorithms.SIZES[kind]
    solved = [draw(random.Random(n), size, algorithms.never) for n in range(20)]
    for x in solved:
        steps, _, result = x.response.rpartition(">")
        assert result == x.answer and steps
        value = eval(x.question[:-1]) if kind == "sums" else x.question[:-3].count(x.question[-2])
        assert str(value) == x.answer
    wrong = [draw(random.Random(n), size, lambda: True) for n in range(20)]
    assert any(not x.response.endswith(f">{x.answer}") for x in wrong)
    assert all(x.response.count(">") == 1 for x in (*solved, *wrong))
