"""Operations on the CPU share the threads of torch's OpenMP library, except where those are not to be had."""

import os
import subprocess
import sys
import threading

import pytest
import tokcredit as tc
import torch
from tokcredit import ops

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, forks")

SETTING = """
import os, re, threading, time
from pathlib import Path
import torch
import tokcredit as tc
from tokcredit import ops

def threads():
    return int(re.search(r"Threads:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])

def threads_left():
    # a thread that was joined may be on its way out for a moment
    counts = []
    for _ in range(20):
        time.sleep(0.05)
        counts.append(threads())
    return min(counts)

def most_during(f):
    # beyond those before and the one that counts
    before, seen, done = threads(), [], []
    def count():
        while not done:
            seen.append(threads())
    counter = threading.Thread(target=count)
    counter.start()
    for _ in range(30):
        f()
    done.append(True)
    counter.join()
    return max(seen) - before - 1

x = torch.rand(64, 20_000).flatten()
rows = ops.Rows(torch.arange(64) * 20_000, torch.arange(1, 65) * 20_000)
tc.set_num_threads(2)
"""


def run(script, **environment):
    command = [sys.executable, "-c", SETTING + script]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@linux
@pytest.mark.parametrize(("of_torch", "stay"), [("2", "1"), ("1", "0")])
def test_shares_the_threads_of_torch_where_it_has_some(of_torch, stay):
    script = "before = threads(); print(most_during(lambda: ops.scan(x, rows)), threads_left() - before)"
    assert run(script, OMP_NUM_THREADS=of_torch) == ["1", stay]


@linux
def test_few_threads_do_not_end_the_others():
    script = """
few = ops.Rows(rows.begin[:8], rows.end[:8])
torch.set_num_threads(4)
(x + 1).sum()
before = threads()
ops.scan(x[:160_000], few)
print(threads_left() - before)
"""
    assert run(script) == ["0"]


@linux
def test_never_more_than_torch_has():
    script = "(x + 1).sum(); tc.set_num_threads(6); print(most_during(lambda: ops.scan(x, rows)))"
    assert run(script, OMP_NUM_THREADS="2") == ["0"]


@linux
def test_in_other_threads_of_python_too():
    """What torch was told holds in all of them."""
    script = """
torch.set_num_threads(1)
caller = threading.Thread(target=lambda: ops.scan(x, rows))
before = threads()
caller.start()
caller.join()
print(threads_left() - before)
"""
    assert run(script, OMP_NUM_THREADS="2") == ["0"]


@linux
@pytest.mark.parametrize("before_the_fork", ["ops.scan(x, rows)", "(x + 1).sum()"])
def test_a_forked_process_starts_its_own(before_the_fork):
    script = f"""
{before_the_fork}
expected = x.numpy().reshape(64, -1).cumsum(1, dtype=float).ravel()
if os.fork() == 0:
    helped = most_during(lambda: ops.scan(x, rows)) == 1
    print(helped and abs(ops.scan(x, rows)[0].numpy() - expected).max() < 0.01, flush=True)
    os._exit(0)  # torch's own operations would wait here for threads that are not there
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    assert run(script, OMP_NUM_THREADS="2") == ["True", "0"]


@linux
def test_a_process_forked_before_the_import_starts_its_own():
    script = """
import os, torch
x = torch.rand(64 * 20_000)
(x + 1).sum()
if os.fork() == 0:
    from tokcredit import ops
    begin = torch.from_numpy(__import__("numpy").arange(64) * 20_000)
    ops.scan(x, ops.Rows(begin, begin + 20_000))
    os._exit(0)
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "2"}, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["0"], done.stderr


def test_several_callers_at_once():
    x = torch.rand(64, 20_000).flatten()
    rows = ops.Rows(torch.arange(64) * 20_000, torch.arange(1, 65) * 20_000)
    expected, same = ops.scan(x, rows)[0], []

    def call():
        same.extend(torch.equal(ops.scan(x, rows)[0], expected) for _ in range(5))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert same == [True] * 20


def test_at_least_one():
    with pytest.raises(ValueError, match="count: expected at least 1, got 0"):
        tc.set_num_threads(0)
