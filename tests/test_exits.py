"""How a command ends: one line, a traceback, or 128 + n."""

import importlib
import os
import re
import signal
import subprocess
import sys
import traceback

import pytest
import tokcredit as tc
from tokcredit import exits, train
from tokcredit.cli import main

RUN = ["train", "--model", "tiny"]
COMMANDS = {
    "tokcredit.train.run": RUN,
    "tokcredit.train.compare": ["compare"],
    "tokcredit.analyze.run": ["analyze", "shift", "--base", "a", "--tuned", "b"],
}


def stands_for(monkeypatch, place, function):
    """A function of the package is replaced by one that behaves as if it stood there."""
    source = compile(function, tc.__file__, "exec")
    scope = {"__name__": "tokcredit", "os": os, "signal": signal, "importlib": importlib, "tc": tc}
    exec(source, scope)
    monkeypatch.setattr(place, scope["f"])


@pytest.mark.parametrize(("place", "words"), COMMANDS.items(), ids=[x.split(".")[1] for x in COMMANDS])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_any_time(place, words, number, monkeypatch, capsys):
    stands_for(monkeypatch, place, f"def f(*_):\n os.kill(os.getpid(), {int(number)})\n while True: signal.pause()")
    before = [signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 128 + number
    assert capsys.readouterr().err == f"tokcredit: stopped by {number.name}\n"
    assert [signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("place", list(COMMANDS)[:2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_a_run_answers_itself(place, number, monkeypatch):
    """A run that saves after the step returns None. The first of two signals counts."""
    others = ", ".join(str(int(x)) for x in (number, signal.SIGINT))
    handled = f"def f(*_):\n for n in ({others}):\n  signal.signal(n, lambda *_: None)\n  os.kill(os.getpid(), n)"
    before = signal.getsignal(signal.SIGINT)
    stands_for(monkeypatch, place, handled)
    try:
        with pytest.raises(SystemExit) as stopped:
            main(COMMANDS[place])
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.value.code == 128 + number


def test_a_rank_that_stops_with_the_others(monkeypatch):
    stands_for(monkeypatch, "tokcredit.train.run", "def f(*_): return None")
    with pytest.raises(SystemExit) as stopped:
        main(RUN)
    assert stopped.value.code == 128 + signal.SIGTERM


def test_a_finished_run_exits_with_0(monkeypatch):
    finished = "def f(*_):\n signal.signal(15, lambda *_: None)\n os.kill(os.getpid(), 15)\n return {'steps': 1}"
    stands_for(monkeypatch, "tokcredit.train.run", finished)
    main(RUN)


KNOWN = [
    "raise ValueError('tasks: expected jsonl, got 3')",
    "raise TypeError('set: grpo: scale: expected a bool, got 3')",
    "raise RuntimeError('model: expected the wheel of a model')",
    "raise RuntimeError('step 12: expected a finite loss and gradient')",
    "raise OSError('output: expected to write a, got No space left on device')",
    "raise ModuleNotFoundError('jinja2: expected to be installed')",
    "importlib.import_module('no_such_module')",
    "open('no_such_file')",
]
UNKNOWN = [
    "{}['key']",
    "[].pop()",
    "None.attribute",
    "1 / 0",
    "'a' + 1",
    "int('x')",
    "import math; math.log(-1)",
    "raise RuntimeError('CUDA error: an illegal memory access')",
    "a, b = (1, 2, 3)",
    "tc.clip.ppo(1, 2, 3, 4)",
]


@pytest.mark.parametrize("error", KNOWN)
def test_known_errors_are_one_line(error, monkeypatch):
    stands_for(monkeypatch, "tokcredit.train.run", f"def f(*_): {error}")
    with pytest.raises(SystemExit) as stopped:
        main(RUN)
    assert re.fullmatch(r"tokcredit: .+", str(stopped.value.code))


@pytest.mark.parametrize("error", UNKNOWN)
def test_errors_that_were_not_foreseen_keep_their_traceback(error, monkeypatch):
    stands_for(monkeypatch, "tokcredit.train.run", f"def f(*_): {error}")
    with pytest.raises(Exception) as caught:
        main(RUN)
    assert not isinstance(caught.value, SystemExit)


@pytest.mark.parametrize("error", [*KNOWN, *UNKNOWN])
def test_debug_keeps_every_traceback(error, monkeypatch):
    stands_for(monkeypatch, "tokcredit.train.run", f"def f(*_): {error}")
    for words in (["--debug", *RUN], [*RUN, "--debug"]):
        with pytest.raises(Exception) as caught:
            main(words)
        assert not isinstance(caught.value, SystemExit)


def test_debug_shows_where_a_setting_was_refused():
    with pytest.raises(Exception, match="steps: expected a whole number at least 0, got -1") as caught:
        main(["train", "--steps", "-1", "--debug"])
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize("error", ["ValueError('reward: expected 1, got 2')", "OSError('gone')", "KeyError('x')"])
@pytest.mark.parametrize(
    "call", ["user.reward()", "try:\n  user.reward()\n except Exception as e: raise ValueError('reward: {}') from e"]
)
@pytest.mark.parametrize("installed", [False, True])
def test_tracebacks_of_the_user_are_never_lost(error, call, installed, tmp_path, monkeypatch):
    folder = tmp_path / "site-packages" if installed else tmp_path
    folder.mkdir(exist_ok=True)
    (folder / "users_rewards.py").write_text(f"def reward(): raise {error}\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "users_rewards", raising=False)
    code = f"def f(*_):\n user = importlib.import_module('users_rewards')\n {call}"
    stands_for(monkeypatch, "tokcredit.train.run", code)
    with pytest.raises(Exception) as caught:
        main([*RUN, "--reward", "users_rewards:reward"] if installed else RUN)
    assert not isinstance(caught.value, SystemExit)
    frames = [f for one in exits._chain(caught.value) for f in traceback.extract_tb(one.__traceback__)]
    assert any(f.filename.endswith("users_rewards.py") for f in frames)


def test_the_traceback_of_a_file_of_the_user_is_printed(tmp_path):
    """A mistake in the module of a reward function, in a process of its own."""
    pytest.importorskip("transformers")
    (tmp_path / "mine.py").write_text("def reward(prompt, response, answer):\n    return 1.0\n\n\nundefined_name\n")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    words = ["train", "--model", "tiny(steps=0)", "--reward", "mine:reward", "--output", str(tmp_path / "run")]
    command = [sys.executable, "-m", "tokcredit", *words]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 1
    assert "mine.py" in done.stderr and "line 5" in done.stderr
    assert done.stderr.rstrip().endswith("NameError: name 'undefined_name' is not defined")


def test_an_objective_is_checked_before_anything_is_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokcredit.train.experiment", None)
    monkeypatch.setitem(sys.modules, "tokcredit.train.comparison", None)
    wrong = train.ObjectiveSettings("grpo", ("clip_low=-1",))
    for start in (train.run, lambda s: train.compare(("grpo",), s)):
        with pytest.raises(ValueError, match="set: grpo: clip_low: expected a number at least 0"):
            start(train.Settings(wrong))
    with pytest.raises(ValueError, match="seeds: expected a whole number at least 1, got 0"):
        train.compare(("grpo",), train.Settings(), 0)
