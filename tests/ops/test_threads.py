"""Operations on the CPU start threads of their own: results do not depend on how many, on who calls, or on a fork."""

import os
import subprocess
import sys
import threading

import pytest
import tokcredit as tc
import torch
from tokcredit import Spans, ops
from tokcredit.blocks import segment

ROWS, LENGTH = 64, 20_000


def batch():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS * LENGTH, generator=generator)
    begin = torch.arange(ROWS) * LENGTH
    return x, Spans(begin, begin + LENGTH, len(x), x > -1)


def results(x, spans):
    values, stats = ops.policy_loss(x, spans, "k3", reference=x.roll(1))
    return ops.scan(x, spans)[0], segment.moments(x, spans).var, values, stats


@pytest.mark.parametrize("count", [2, 3, 50])
def test_any_number_of_threads_gives_the_same_bits(count, monkeypatch):
    x, spans = batch()
    monkeypatch.setattr(ops.call, "_threads", 1)
    expected = results(x, spans)
    monkeypatch.setattr(ops.call, "_threads", count)
    assert all(torch.equal(one, other) for one, other in zip(results(x, spans), expected, strict=True))


@pytest.mark.parametrize("count", [2, 5])
def test_any_number_of_threads_makes_the_same_choices(count, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    score, vectors = torch.rand(2000, generator=generator), torch.randn(2000, 1500, generator=generator)
    spans = Spans(torch.arange(0, 2000, 50), torch.arange(50, 2050, 50), 2000)
    chosen = []
    for threads in (1, count):
        monkeypatch.setattr(ops.call, "_threads", threads)
        chosen.append(tc.select.diverse(score, vectors, 5, spans))
    assert torch.equal(*chosen) and (chosen[0] >= 0).sum() == 200


def test_several_callers_at_once():
    x, spans = batch()
    expected, same = ops.scan(x, spans)[0], []

    def call():
        same.extend(torch.equal(ops.scan(x, spans)[0], expected) for _ in range(5))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert same == [True] * 20


FORKED = """
import os
import numpy, torch
{before}
if os.fork() == 0:
    import tokcredit as tc
    tc.set_num_threads(3)
    # Made by numpy: torch's own operations would wait here for threads that only the parent has.
    x = torch.from_numpy(numpy.arange(1_280_000) % 7.0)
    begin = torch.from_numpy(numpy.arange(64) * 20_000)
    spans = tc.Spans.trusted(begin, torch.from_numpy(numpy.arange(1, 65) * 20_000), 1_280_000)
    y = tc.scan.cumulative(x, spans).numpy()
    os._exit(0 if (y == x.numpy().reshape(64, -1).cumsum(1).ravel()).all() else 1)
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize(
    "before",
    [
        "(torch.rand(1_280_000) + 1).sum()",
        "import tokcredit as tc; tc.scan.cumulative(torch.rand(1_280_000), tc.Spans.single(1_280_000))",
    ],
)
def test_a_forked_process_computes_as_its_parent(before):
    command = [sys.executable, "-c", FORKED.format(before=before)]
    run = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "2"}, capture_output=True, text=True, timeout=120
    )
    assert run.stdout.split() == ["0"], run.stderr


def test_at_least_one():
    with pytest.raises(ValueError, match="count: expected at least 1, got 0"):
        tc.set_num_threads(0)
