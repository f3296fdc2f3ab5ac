"""Run folders survive wrong starts, other processes, other people's files and other settings."""

import dataclasses
import inspect
import json
import multiprocessing
import os
import re
import shutil
import socket
from pathlib import Path

import accelerate.parallelism_config
import accelerate.utils.launch
import pyarrow as pa
import pytest
from tokcredit import analyze
from tokcredit.analyze import Divergent, Shift, StudySettings
from tokcredit.files import WriteError, whole_folder, write
from tokcredit.report import report
from tokcredit.train import ObjectiveSettings, OptimizerSettings, SamplingSettings, checkpoint, compare, run
from tokcredit.train import record as record_module
from tokcredit.train.experiment import _FILES, NEUTRAL, check_folder, read_summary, resolved
from tokcredit.train.folder import locked, plain, read_settings, write_settings
from tokcredit.train.ranks import check_launch, processes
from tokcredit.train.record import read_metrics, write_figure, write_table
from tokcredit.train.trainer import Trainer

RANDOM = "tiny(steps=0)"


def shift(folder, **changes):
    study = StudySettings(tasks=("addition(digits=1)",), problems=1, max_tokens=3, output=folder)
    names = {f.name for f in dataclasses.fields(StudySettings)} & changes.keys()
    study = dataclasses.replace(study, **{name: changes.pop(name) for name in names})
    return Shift(**{"base": RANDOM, "tuned": RANDOM, "study": study, "rollouts": 1, **changes})


def always(context, small, large):
    return 1


def divergent(folder, **changes):
    verifier = {} if "judge" in changes else {"verifier": "test_folder:always"}
    s = shift(folder, **{k: v for k, v in changes.items() if k in ("tasks", "reward", "resume")})
    mine = {k: v for k, v in changes.items() if k not in ("tasks", "reward", "resume")}
    return Divergent(**{"small": RANDOM, "large": RANDOM, "study": s.study, **verifier, **mine})


WRONG = {
    "task": {"tasks": ("nothing",)},
    "setting of a task": {"tasks": ("addition(digit=1)",)},
    "file": {"tasks": ("jsonl('nowhere.jsonl')",)},
    "module of a reward": {"reward": "nowhere:function"},
    "function of a reward": {"reward": "math:nothing"},
}
WRONG_RUNS = WRONG | {
    "model": {"model": "/nowhere/model"},
    "setting of a method": {"objective": ObjectiveSettings("grpo", set=("clip=1",))},
    "stage": {"objective": ObjectiveSettings("grpo", credit="temp")},
    "teacher that is missing": {"objective": ObjectiveSettings("tip")},
    "teacher": {"objective": ObjectiveSettings("tip"), "teacher": "/nowhere/model"},
    "share of problems": {"held_out": 1.0},
    "size of a group": {"objective": ObjectiveSettings("dpo")},
    # This is wrong only when a batch is made.
    "metric of a controller": {
        "objective": ObjectiveSettings("grpo", terms=("entropy(target_entropy(metric='mood'))",))
    },
}
WRONG_ANALYSES = [
    *((kind, changes) for kind in (shift, divergent) for changes in WRONG.values()),
    (shift, {"base": "/nowhere/model"}),
    (shift, {"tuned": "/nowhere/model"}),
    (divergent, {"small": "/nowhere/model"}),
    (divergent, {"judge": "/nowhere/model"}),
    (divergent, {"verifier": "math:nothing"}),
]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("changes", WRONG_RUNS.values(), ids=WRONG_RUNS)
def test_a_start_that_fails_leaves_no_folder(settings, uniform, changes):
    folder = settings().output
    for resume in (False, True):
        with pytest.raises(Exception):  # noqa: B017 - some errors are those of the user's own modules
            run(settings(**changes, resume=resume))
        assert not folder.exists()


@pytest.mark.parametrize("resume", [False, True])
def test_the_corrected_command_works_in_the_same_folder(settings, uniform, resume):
    s = settings("grpo", steps=1)
    s.output.mkdir()
    for changes in (WRONG_RUNS["task"], WRONG_RUNS["metric of a controller"]):
        with pytest.raises(ValueError):
            run(dataclasses.replace(s, **changes))
    assert [p.name for p in s.output.iterdir()] == [".lock"], "the user's own folder stays"
    assert run(dataclasses.replace(s, resume=resume))["steps"] == 1


@pytest.mark.parametrize(("kind", "changes"), WRONG_ANALYSES)
def test_an_analysis_that_fails_leaves_no_folder(tmp_path, kind, changes):
    folder = tmp_path / "run"
    for resume in (False, True):
        with pytest.raises(Exception):  # noqa: B017
            analyze.run(kind(folder, **changes, resume=resume))
        assert not folder.exists()


@pytest.mark.parametrize("kind", [shift, divergent])
@pytest.mark.parametrize("resume", [False, True])
def test_the_corrected_analysis_works_in_the_same_folder(tmp_path, kind, resume):
    with pytest.raises(ValueError):
        analyze.run(kind(tmp_path / "run", tasks=("nothing",)))
    analyze.run(kind(tmp_path / "run", resume=resume))
    assert (tmp_path / "run/summary.json").exists()


@pytest.mark.parametrize("changes", [WRONG_RUNS[x] for x in ("task", "model", "setting of a method")])
def test_a_comparison_that_fails_leaves_no_folder(settings, changes):
    s = settings(**changes)
    with pytest.raises((ValueError, TypeError)):
        compare(("grpo", "ctpo"), s)
    assert not s.output.exists()


@pytest.mark.parametrize("method", ["grp", "tip"])
def test_the_last_method_of_a_comparison_is_checked_before_the_first_runs(settings, method):
    s = settings()
    with pytest.raises(ValueError, match=r"grpo|teacher: expected a model"):
        compare(("grpo", method), s)
    assert not s.output.exists()


def hold(folder, connection):
    """Hold a folder until the process is killed."""
    with locked(folder):
        connection.send(os.getpid())
        connection.recv()


@pytest.fixture
def holder():
    """Starts a process that holds a folder."""
    started = []

    def start(folder):
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(target=hold, args=(folder, theirs))
        started.append((process, ours))
        process.start()
        assert ours.recv() == process.pid
        return process

    yield start
    for process, _ in started:
        process.kill()
        process.join()


@pytest.mark.slow
def test_one_process_at_a_time(settings, uniform, holder):
    s = settings(steps=1)
    users = {
        s.output / "grpo-seed0": [lambda: compare(("grpo",), s, seeds=1)],
        s.output: [
            lambda: run(s),
            lambda: run(dataclasses.replace(s, resume=True)),
            lambda: compare(("grpo",), s, seeds=1),
            lambda: analyze.run(shift(s.output)),
            lambda: analyze.run(divergent(s.output)),
        ],
    }
    for folder, starts in users.items():
        process = holder(folder)
        for start in starts:
            with pytest.raises(ValueError, match=f"process {process.pid} on {re.escape(socket.gethostname())} uses"):
                start()
        process.kill()
        process.join()
    # The owner was killed, so nobody holds the folder, though the name of the owner is still there.
    assert (s.output / ".owner").exists()
    assert run(s)["steps"] == 1
    assert not (s.output / ".owner").exists()


def test_a_folder_that_cannot_be_written_is_named(settings, tmp_path):
    (tmp_path / "file").write_text("")
    for start in (run, lambda s: compare(("grpo",), s), lambda s: analyze.run(shift(s.output))):
        with pytest.raises(
            WriteError, match=r"output: expected to write .*file/run, got Not a directory \([\d.]+ MiB free\)$"
        ):
            start(settings(output=tmp_path / "file/run"))


OF_THE_USER = [
    "checkpoint-best",
    "checkpoint-",
    "checkpoint-1",
    "checkpoint-000001.bak",
    "checkpoint-0000009",
    "latest",
]


def test_folders_of_the_user_stay(settings, uniform):
    s = settings("grpo", steps=2, save_every=1)
    for name in OF_THE_USER:
        (s.output / name).mkdir(parents=True)
        (s.output / name / "model.bin").write_text(name)
    run(s)
    (s.output / "checkpoint-000099").write_text("a file")
    shutil.copytree(s.output / "checkpoint-000002", s.output / "checkpoint-second")
    run(dataclasses.replace(s, steps=3, resume=True))
    assert [line["step"] for line in read_metrics(s.output)] == [0, 1, 2, 3]
    assert (s.output / "checkpoint-000003").is_dir() and not (s.output / "checkpoint-000002").exists()
    assert (s.output / "checkpoint-000099").read_text() == "a file"
    assert sorted(p.name for p in (s.output / "checkpoint-second").iterdir()) == sorted(
        p.name for p in (s.output / "checkpoint-000003").iterdir()
    )
    for name in OF_THE_USER:
        assert (s.output / name / "model.bin").read_text() == name


def test_the_last_checkpoint_is_that_of_the_largest_step(tmp_path):
    for name in ("checkpoint-999999", "checkpoint-1000000", "checkpoint-000007", "checkpoint-z"):
        (tmp_path / name).mkdir()
    assert checkpoint.last(tmp_path) == 1_000_000


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", [pattern.replace("[0-9]", "7") for pattern in _FILES])
def test_files_of_someone_else_are_not_overwritten(settings, name, resume):
    s = settings(resume=resume)
    (s.output / name).mkdir(parents=True)
    with pytest.raises(ValueError, match=f"output: expected a folder without {name}, which a run would overwrite"):
        run(s)
    assert sorted(p.name for p in s.output.iterdir()) == [".lock", name]


def test_fewer_steps_than_were_done_are_refused(settings, uniform):
    s = settings("grpo", steps=2)
    run(s)
    with pytest.raises(ValueError, match=r"steps: expected at least 2, which the run in .* has done, got 1"):
        run(dataclasses.replace(s, steps=1, resume=True))


def leaves(settings):
    """Paths to all single settings."""
    for name, value in settings.items():
        yield from ([name, *path] for path in leaves(value)) if isinstance(value, dict) else [[name]]


def test_every_setting_belongs_to_the_results(settings):
    """A run is continued, and a result is shown, only under its own settings; each setting is named alone."""
    s = resolved(settings(resume=True))
    folder, stored = s.output, plain(s)
    folder.mkdir()
    found = set()
    for path in leaves(stored):
        changed = json.loads(json.dumps(stored))
        group = changed
        for name in path[:-1]:
            group = group[name]
        group[path[-1]] = "another"
        write_settings(folder, changed)
        if path[-1] in NEUTRAL:
            check_folder(s, NEUTRAL)
        else:
            with pytest.raises(
                ValueError, match=rf"^{path[-1]}: expected another as in the run in .*, or another output"
            ):
                check_folder(s, NEUTRAL)
        found.add(path[-1])
    assert found > NEUTRAL and len(found) == len(list(leaves(stored))), "names of settings are unique"
    assert "resume" not in found


CHANGES = [
    {"steps": 2},
    {"eval_problems": 3},
    {"tasks": ("addition(digits=2)",)},
    {"sampling": SamplingSettings(prompts=2, group=3, max_tokens=6)},
    {"optimizer": OptimizerSettings(lr=2e-3, micro_batch=3, precision="no")},
    {"objective": ObjectiveSettings(credit="tempo")},
]


def test_a_comparison_never_shows_results_of_other_settings(settings, uniform):
    s = settings(steps=1)
    folder = compare(("grpo",), s, seeds=1)
    before = (folder / "compare.md").read_text()
    for changes in CHANGES:
        with pytest.raises(ValueError, match=r"expected .* as in the run in .*grpo-seed0, or another output, got"):
            compare(("ctpo", "grpo"), dataclasses.replace(s, **changes), seeds=1)
    assert (folder / "compare.md").read_text() == before
    assert not (folder / "ctpo-seed0").exists(), "nothing runs before all folders are checked"


def test_a_comparison_runs_only_what_is_missing(settings, uniform, monkeypatch):
    s, started = settings(steps=1, eval_problems=1), []

    def counted(one):
        started.append(one.output.name)
        return run(one)

    monkeypatch.setattr("tokcredit.train.comparison.run", counted)
    for methods, seeds, missing in (
        (("grpo",), 1, ["grpo-seed0"]),
        (("grpo", "ctpo"), 1, ["ctpo-seed0"]),
        (("grpo", "ctpo"), 2, ["grpo-seed1", "ctpo-seed1"]),
        (("grpo", "ctpo"), 2, []),
    ):
        started.clear()
        folder = compare(methods, s, seeds=seeds)
        assert started == missing
        shown = re.findall(r"^\| `(\w+)`", (folder / "compare.md").read_text(), re.M)
        assert shown == list(methods)
    # An unfinished run is finished.
    (folder / "ctpo-seed1/summary.json").unlink()
    compare(("grpo", "ctpo"), s, seeds=2)
    assert started == ["ctpo-seed1"]


PLUGINS = {
    "FSDP": {"ACCELERATE_USE_FSDP": "true"},
    "DeepSpeed": {"ACCELERATE_USE_DEEPSPEED": "true"},
    "Megatron-LM": {"ACCELERATE_USE_MEGATRON_LM": "1"},
    "tensor parallelism of size 2": {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"},
    "context parallelism of size 4": {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_SIZE": "4"},
    "sequence parallelism of size 2": {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_SP_SIZE": "2"},
    "FSDP parallelism of size 8": {
        **{"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "8"},
        "PARALLELISM_CONFIG_TP_SIZE": "1",
    },
}


@pytest.mark.parametrize("name", PLUGINS)
def test_launches_that_cut_the_model_are_refused_by_name(settings, monkeypatch, name):
    for key, value in PLUGINS[name].items():
        monkeypatch.setenv(key, value)
    # Nothing may be loaded, and accelerate may not even be asked for its state, which would start the plugin.
    for part in ("train.models.load", "train.tasks.load", "train.ranks.PartialState", "train.trainer.Accelerator"):
        monkeypatch.setattr(f"tokcredit.{part}", None)
    s = settings()
    starts = (run, Trainer, lambda s: compare(("grpo",), s), lambda s: analyze.run(shift(s.output)))
    for start in (*starts, lambda s: analyze.run(divergent(s.output))):
        with pytest.raises(ValueError, match=rf"got {name}; .*tokcredit.adapters.trl or tokcredit.adapters.verl"):
            start(s)
    assert not s.output.exists()


def test_no_plugin_of_accelerate_is_forgotten():
    text = inspect.getsource(accelerate.utils.launch)
    known = {key for plugin in PLUGINS.values() for key in plugin}
    assert set(re.findall(r"ACCELERATE_USE_\w+", text)) - known == {"ACCELERATE_USE_CPU", "ACCELERATE_USE_SAGEMAKER"}
    sizes = {f.name for f in dataclasses.fields(accelerate.parallelism_config.ParallelismConfig) if f.init}
    sizes = {f"PARALLELISM_CONFIG_{name.upper()}" for name in sizes if name.endswith("_size")}
    assert len(sizes) >= 4 and sizes - known == {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE"}


def test_whole_models_in_every_process_are_accepted(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_TP_SIZE", "1")
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "2")
    check_launch()


def test_processes_that_are_not_connected_are_refused(settings, monkeypatch):
    """Each of them would take itself for the main process."""
    processes()
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    s = settings()
    for start in (run, lambda s: compare(("grpo",), s), lambda s: analyze.run(shift(s.output))):
        with pytest.raises(ValueError, match="accelerate: expected 2 connected processes as WORLD_SIZE says, got 1"):
            start(s)
    assert not s.output.exists()


LOGS = {"metrics.jsonl", "tensorboard", ".lock"}


@pytest.mark.parametrize("kind", ["run", "compare", "shift", "divergent"])
def test_every_file_is_written_under_another_name(settings, uniform, monkeypatch, kind):
    """A file or folder that is not a log gets its name when it is whole."""
    s, named = settings("grpo", steps=1), set()
    for how in ("rename", "replace"):
        move = getattr(Path, how)
        monkeypatch.setattr(Path, how, lambda old, new, move=move: named.add(new) or move(old, new))
    start = {
        "run": lambda: run(s),
        "compare": lambda: compare(("grpo",), s, seeds=1),
        "shift": lambda: analyze.run(shift(s.output)),
        "divergent": lambda: analyze.run(divergent(s.output)),
    }[kind]
    start()
    files = [path for path in s.output.rglob("*") if path.is_file()]
    assert len(files) >= 4
    for path in files:
        inside = [path, *path.parents]
        assert any(p in named or p.name in LOGS for p in inside), f"{path} is written in place"
    assert not [path for path in s.output.rglob("*") if path.name.endswith((".new", ".old"))]


def test_every_name_that_a_run_writes_is_known(settings, uniform):
    s = settings("grpo", steps=1)
    run(s)
    known = {path.name for pattern in _FILES for path in s.output.glob(pattern)}
    assert {path.name for path in s.output.iterdir()} == known | {"settings.json", ".lock"}


class Half:
    """A figure that cannot be saved."""

    def savefig(self, path, **others):
        path.write_bytes(b"half")
        raise OSError("disk full")


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    text, table, figure, folder = (tmp_path / name for name in ("a.json", "a.parquet", "a.png", "model"))
    text.write_text("whole")
    write_table(table, pa.table({"x": [1]}))
    figure.write_bytes(b"whole")
    folder.mkdir()
    (folder / "weights").write_text("whole")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def fill():
        with whole_folder(folder) as work:
            (work / "weights").write_text("half")
            raise OSError("disk full")

    def half(path, text, **others):
        path.write_bytes(b"half")
        raise OSError("disk full")

    def half_table(table, path, **others):
        half(path, table)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", half)
        patch.setattr(record_module.pq, "write_table", half_table)
        for start in (
            lambda: write(text, "new"),
            lambda: write_table(table, pa.table({"x": [2]})),
            lambda: write_figure(figure, Half()),
        ):
            with pytest.raises(OSError, match="disk full"):
                start()
    with pytest.raises(OSError, match="disk full"):
        fill()
    assert {path: path.read_bytes() for path in before} == before
    # What was left half written does not stop the next attempt.
    write(text, "new")
    with whole_folder(folder) as work:
        (work / "other").write_text("new")
    assert text.read_text() == "new" and [path.name for path in folder.iterdir()] == ["other"]


def test_half_written_files_break_neither_the_report_nor_resuming(settings, uniform):
    s = settings("grpo", steps=2, rollouts_every=1, save_every=1)
    run(s)
    lines = read_metrics(s.output)
    with (s.output / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "los')
    for name in ("rollouts-000003.parquet.new", "summary.json.new", "settings.json.new", "report.html.new"):
        (s.output / name).write_bytes(b"half")
    for name in ("checkpoint.new", "model.new", "model.old", "tokenizer.new"):
        (s.output / name).mkdir()
        (s.output / name / "half").write_bytes(b"half")
    assert read_metrics(s.output) == lines
    report(s.output)
    assert run(dataclasses.replace(s, steps=3, resume=True))["steps"] == 3
    assert [line["step"] for line in read_metrics(s.output)] == [0, 1, 2, 3]
    assert read_settings(s.output)["steps"] == 3 and read_summary(s.output)["steps"] == 3
    assert not [p for p in s.output.iterdir() if p.name.endswith((".new", ".old"))]
