import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tokcredit.rewards import answers
from tokcredit.rewards.bounded import BoundedCalls, Failure

FILE = Path(__file__).with_name("hostile_function.py")


@pytest.fixture
def bounded():
    """Makes bounded calls that end with the test."""
    made = []

    def make(function="act", file=FILE, **limits):
        made.append(BoundedCalls(file, function, **limits))
        return made[-1]

    yield make
    for calls in made:
        calls.close()


def gone(pid):
    """Whether a process has ended and was reaped; a zombie still has its number."""
    for _ in range(3000):
        try:
            os.kill(int(pid), 0)
        except OSError as error:
            assert error.errno == errno.ESRCH
            return True
        time.sleep(0.01)
    return False


def ended(pid):
    """Whether a process that is no child of this one's children has ended; nobody may have reaped it here."""
    for _ in range(3000):
        try:
            if (Path("/proc") / pid / "stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


def test_results_are_in_order(bounded):
    calls = bounded(processes=3)
    assert calls([("value", float(i)) for i in range(500)]) == [float(i) for i in range(500)]
    assert calls([]) == []
    assert calls([("value", 1.0), ("value", 2.0), ("value", 1.0)]) == [1.0, 2.0, 1.0]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        *((kind, "no result within 0.2 s of processor time") for kind in ("power", "loop", "swallow")),
        *(("memory", "MemoryError"), ("recursion", "RecursionError"), ("crash", "the process died of SIG")),
        *(("exit", "the process ended"), ("raise", "ValueError: a reason")),
        *(("text", "ValueError"), ("none", "TypeError")),
    ],
)
def test_a_hostile_call_costs_only_its_own_result(bounded, kind, reason):
    calls = bounded(seconds=0.2, processes=2)
    rest = [("value", float(i)) for i in range(8)]
    results = calls([*rest[:4], (kind,), *rest[4:], (kind, 1.0)])
    assert results[:4] + results[5:9] == [float(i) for i in range(8)]
    for failure in (results[4], results[9]):
        assert isinstance(failure, Failure) and reason in failure.reason
    assert calls(rest) == [float(i) for i in range(8)]


@pytest.mark.parametrize("kind", ["sleep", "stopped"])
def test_a_call_that_uses_no_processor_time_ends_too(bounded, monkeypatch, kind):
    calls = bounded(seconds=0.1)
    monkeypatch.setattr(calls, "_limits", (0.1, 0.3, 1 << 30, 1))
    assert calls([(kind,), ("value", 2.0)]) == [Failure("no result within 0.3 s"), 2.0]


def test_no_process_is_left(bounded):
    calls = bounded(seconds=0.1, processes=1)
    before, _, after, worker = calls([("process",), ("loop",), ("process", 1.0), ("worker",)])
    assert before != after and gone(before) and not isinstance(worker, Failure)
    calls.close()
    assert gone(worker) and gone(after)
    assert calls([("value", 3.0)]) == [3.0]


def test_a_killed_worker_is_replaced(bounded):
    calls = bounded(processes=1)
    process, worker = calls([("process",), ("worker",)])
    os.kill(int(worker), signal.SIGKILL)
    assert calls([("value", 1.0)]) == [1.0]
    assert gone(process) and calls([("worker",)]) != [worker]


def test_a_worker_that_is_killed_during_a_call(bounded):
    calls = bounded(seconds=0.2, processes=1)
    (worker,) = calls([("worker",)])
    results = []
    waiting = threading.Thread(target=lambda: results.append(calls([("loop",), ("value", 2.0)])))
    waiting.start()
    os.kill(int(worker), signal.SIGKILL)
    waiting.join()
    assert results == [[Failure("no result within 0.2 s of processor time"), 2.0]] and gone(worker)


def test_a_call_that_kills_the_worker_ends_too(bounded, monkeypatch, tmp_path):
    """So does its process, which hangs afterwards and which nobody watches."""
    calls = bounded()
    monkeypatch.setattr(calls, "_limits", (0.1, 0.5, 1 << 30, 1))
    file = tmp_path / "pids"
    assert calls([("kill the worker", str(file))]) == [Failure("the worker died")]
    pids = file.read_text().split()
    assert len(pids) == 3 and all(map(ended, pids))
    assert calls([("value", 2.0)]) == [2.0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_program_can_be_stopped_while_a_call_hangs(tmp_path, number):
    script = f"""
import signal, sys
from pathlib import Path
from tokcredit.rewards.bounded import BoundedCalls
def stop(*_):
    raise KeyboardInterrupt
signal.signal(signal.SIGTERM, stop)
calls = BoundedCalls(Path({str(FILE)!r}), "act", seconds=1e6, processes=2)
process, worker = calls([("process",), ("worker",)])
print(int(process), int(worker), flush=True)
calls([("sleep",), ("loop",)])
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    program = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert program.stdout is not None
    pids = program.stdout.readline().split()
    assert len(pids) == 2
    program.send_signal(number)
    _, errors = program.communicate(timeout=120)
    assert "KeyboardInterrupt" in errors and program.returncode != 0
    assert all(map(gone, pids))


def test_it_works_beside_many_threads_and_open_files(bounded, tmp_path):
    stop = threading.Event()
    threads = [threading.Thread(target=stop.wait) for _ in range(64)]
    files = [open(tmp_path / str(i), "w") for i in range(64)]  # noqa: SIM115
    for thread in threads:
        thread.start()
    try:
        assert bounded()([("value", 1.0)] * 9) == [1.0] * 9
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        for file in files:
            file.close()


def test_several_threads_and_a_fork_can_call(bounded):
    calls = bounded()
    results = {}

    def call(thread):
        results[thread] = calls([("value", float(thread)), ("value", 7.0)])

    threads = [threading.Thread(target=call, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: [float(i), 7.0] for i in range(8)}
    (worker,) = calls([("worker",)])
    script = f"""
import os
from pathlib import Path
from tokcredit.rewards.bounded import BoundedCalls
calls = BoundedCalls(Path({str(FILE)!r}), "act")
(before,) = calls([("worker",)])
child = os.fork()
(after,) = calls([("worker",)])
calls.close()
if child:
    assert os.waitpid(child, 0)[1] == 0 and after == before
else:
    os._exit(int(after == before))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert calls([("worker",)]) == [worker]


def test_the_worker_does_not_import_torch(bounded):
    calls = bounded("modules")
    assert calls([("torch",), ("numpy",), ("pickle",)]) == [0.0, 0.0, 1.0]


def test_the_worker_of_mathematics_imports_no_torch(bounded, tmp_path):
    pytest.importorskip("math_verify")
    file = tmp_path / "probe.py"
    file.write_text(f"{Path(answers.__file__).with_name('mathematics.py').read_text()}\n\n{FILE.read_text()}")
    torch_modules, package_modules, sympy_modules = bounded("modules", file)([("torch",), ("tokcredit",), ("sympy",)])
    # The package, its folder of rewards, and the module that mathematics imports.
    assert (torch_modules, package_modules) == (0.0, 3.0) and sympy_modules > 0


@pytest.mark.parametrize(
    ("text", "function", "message"),
    [
        ("import no_such_module", "f", "No module named 'no_such_module'"),
        ("def f(): pass", "g", "has no attribute 'g'"),
        ("import os; os._exit(1)", "f", "its process ended"),
    ],
)
def test_a_file_that_does_not_import_is_named(bounded, tmp_path, text, function, message):
    file = tmp_path / "broken.py"
    file.write_text(text)
    with pytest.raises(RuntimeError, match=message) as caught:
        bounded(function, file)([()])
    assert "worker: expected" in str(caught.value) and "broken.py" in str(caught.value)
