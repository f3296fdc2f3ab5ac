"""A disk that is full or read-only: every write says so in one line, loses nothing, and the run goes on afterwards."""

import dataclasses
import errno
import os
import re
import resource
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import accelerate
import matplotlib.figure
import pyarrow.parquet as pq
import pytest
import torch.utils.tensorboard
import transformers
from safetensors import SafetensorError
from test_folder import divergent, shift
from test_kill import numbers
from tokcredit import analyze, report
from tokcredit.files import WriteError, naming, whole_folder, write
from tokcredit.train import compare, models, run

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
OF_TORCH = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
OF_SAFETENSORS = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
OF_TOKENIZERS = Exception("Read-only file system (os error 30)")
# The functions that write the files of a folder, and the error that each raises on a full disk.
WRITERS = {
    (Path, "write_text"): FULL,
    (Path, "open"): FULL,
    (pq, "write_table"): FULL,
    (matplotlib.figure.Figure, "savefig"): FULL,
    (torch.utils.tensorboard.SummaryWriter, "flush"): FULL,
    (accelerate.Accelerator, "save_state"): OF_TORCH,
    (transformers.PreTrainedModel, "save_pretrained"): OF_SAFETENSORS,
    (transformers.PreTrainedTokenizerBase, "save_pretrained"): OF_TOKENIZERS,
}


@pytest.fixture
def full(monkeypatch):
    """Each file or folder is half written the first time, then the library that writes it raises its own error."""
    failed = []

    def place(arguments):
        paths = [Path(x) for x in arguments if isinstance(x, str | Path)]
        if not paths:
            return "tensorboard"
        if paths[0].name == "checkpoint.new":
            return f"checkpoint after {[p.name for p in paths[0].parent.glob('checkpoint-*')]}"
        return paths[0].name.removesuffix(".new")

    def failing(function, error):
        def call(*arguments, **named):
            name = place(arguments)
            reads = function is opened and "a" not in arguments
            if reads or name == ".owner" or name in failed:
                return function(*arguments, **named)
            failed.append(name)
            if "tensorboard" not in name:
                path = next(Path(x) for x in arguments if isinstance(x, str | Path))
                half = path / "half" if path.is_dir() or error is OF_TORCH else path
                half.parent.mkdir(exist_ok=True)
                with open(half, "a") as file:
                    file.write('{"step": 1, "ha')
            raise error

        return call

    models.load("tiny(steps=0)")  # into the cache, which is no run folder
    opened = Path.open
    for (owner, name), error in WRITERS.items():
        monkeypatch.setattr(owner, name, failing(getattr(owner, name), error))
    return failed


def until_done(start, folder):
    """Start again after every failed write; return the errors."""
    messages = []
    while True:
        try:
            start()
        except WriteError as error:
            messages.append(str(error))
            assert len(messages) < 40
            assert not [p for p in folder.rglob("*") if p.name.endswith((".new", ".old"))]
        else:
            return messages


FILES = ["settings.json", "tokenizer", "metrics.jsonl", "tensorboard", "rollouts-000001.parquet", "curve.png"]
FILES += ["checkpoint-000001", "rollouts-000002.parquet", "checkpoint-000002", "model", "report.html", "summary.json"]


def test_every_write_of_a_run(settings, uniform, full, tmp_path):
    s = settings("grpo", steps=2, save_every=1, rollouts_every=1, eval_every=1, eval_problems=1, resume=True)
    messages = until_done(lambda: run(s), s.output)
    names = [re.match(rf"output: expected to write {s.output}/([\w.-]+), got ", m)[1] for m in messages]
    assert set(names) == set(FILES) and max(Counter(names).values()) == 1
    for name, message in zip(names, messages, strict=True):
        reason = {"model": "No space left on device", "tokenizer": "No space left on device"}
        assert re.search(r"got .+ \(\d+\.\d MiB free\); .+, and the same command with --resume .+", message), message
        assert "\n" not in message and message.count("got ") == 1
        early = FILES.index(name) < 7
        assert re.search("no checkpoint .+ begins again" if early else "the checkpoint of step [12] is kept", message)
        assert reason.get(name, "") in message or "Read-only" in message
    assert "a file that ended early" in messages[names.index("checkpoint-000002")]
    whole = dataclasses.replace(s, output=tmp_path / "whole")
    run(whole)
    assert numbers(s.output) == numbers(whole.output)
    for name in FILES[4:9:3]:
        rows = [pq.read_table(f / name).to_pylist() for f in (s.output, whole.output)] if "rollouts" in name else [0, 0]
        assert rows[0] == rows[1]
    left = [{p.name for p in f.iterdir()} for f in (s.output, whole.output)]
    assert left[0] == left[1]


@pytest.mark.parametrize("kind", ["compare", "shift", "divergent"])
def test_every_write_of_other_folders(settings, uniform, full, kind):
    s = settings("grpo", steps=1, eval_problems=1, eval_every=0, resume=True)
    start, names = {
        "compare": (lambda: compare(("grpo",), s, seeds=1), {"compare.png", "compare.md", "summary.json", "model"}),
        "shift": (
            lambda: analyze.run(shift(s.output, resume=True)),
            {"settings.json", "problem-000000.parquet", "summary.json", "summary.png"},
        ),
        "divergent": (
            lambda: analyze.run(divergent(s.output, resume=True)),
            {"settings.json", "problem-000000.parquet", "summary.json", "summary.png"},
        ),
    }[kind]
    messages = until_done(start, s.output)
    assert names <= {re.match(r"output: expected to write \S+?([\w.-]+), got ", m)[1] for m in messages}
    assert all(re.search(r"MiB free\); .+ kept, .+ the same command|begins again", m) for m in messages), messages


def test_the_report_that_a_user_asks_for(settings, uniform, full, tmp_path):
    s = settings("grpo", steps=1, eval_problems=1, resume=True)
    until_done(lambda: run(s), s.output)
    with pytest.raises(WriteError, match=r"^output: expected to write .*/page.html, got No space left on device \("):
        report.run(s.output, output=tmp_path / "page.html")
    assert not list(tmp_path.glob("page.html*"))


@contextmanager
def largest(size):
    """The system refuses larger files, as it does on a full disk; also those that pytest writes its output to."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_torch_says_when_the_system_refuses(settings, uniform):
    s = settings("grpo", steps=2, save_every=1, eval_every=0, eval_problems=1)
    run(dataclasses.replace(s, steps=1))
    kept = r"write .*checkpoint-000002, got .* the checkpoint of step 1 is kept, and"
    with largest(200_000), pytest.raises(WriteError, match=kept):
        run(dataclasses.replace(s, resume=True))
    assert {p.name for p in s.output.glob("checkpoint*")} == {"checkpoint-000001"}
    assert run(dataclasses.replace(s, resume=True))["steps"] == 2


def test_what_safetensors_says_when_the_system_refuses(tmp_path):
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    )
    message = r"output: expected to write .*/model, got File too large \("
    with largest(10_000), pytest.raises(WriteError, match=message), whole_folder(tmp_path / "model") as folder:
        model.save_pretrained(folder)
    assert not list(tmp_path.iterdir())


def test_the_cache_of_the_embedded_models(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    message = r"model: expected to write .*/tiny-0-0.5-1, got File too large \("
    with largest(10_000), pytest.raises(WriteError, match=message):
        models.tiny(steps=0, noise=0.5, seed=1)
    assert [p.name for p in (tmp_path / "tokcredit").iterdir() if p.suffix != ".lock"] == []


def test_a_lock_that_cannot_be_written_is_released(tmp_path, monkeypatch, settings, uniform):
    s = settings("grpo", steps=1, eval_problems=1)
    with monkeypatch.context() as patch:

        def refuse(path, text, **others):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        patch.setattr(Path, "write_text", refuse)
        with pytest.raises(WriteError, match=r"output: expected to write .*, got Read-only file system \("):
            run(s)
    assert not s.output.exists()
    assert run(s)["steps"] == 1


@pytest.mark.parametrize("error", [ValueError("no"), RuntimeError("CUDA error: out of memory"), KeyError("x")])
def test_other_errors_stay_as_they_are(error, tmp_path):
    with pytest.raises(type(error)) as caught, naming(tmp_path):
        raise error
    assert caught.value is error


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(path, text, **others):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a", "x")
    assert not list(tmp_path.iterdir())
