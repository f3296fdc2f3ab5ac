"""A run that is killed while it writes goes on with the numbers of a run that was not."""

import dataclasses
import json
import multiprocessing
import os
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tokcredit.train import run
from tokcredit.train import trainer as trainer_module
from tokcredit.train.record import Record, read_metrics
from uniform import UniformSampler

TIMES = {"seconds", "sample_seconds", "train_seconds", "credit_seconds"}


def kill_at(moment):
    """Kill this process before or after one of the moves of files to their names, or of the lines of metrics."""
    seen = 0

    def counted(function):
        def call(*arguments):
            nonlocal seen
            for after in (False, True):
                seen += 1
                if seen == moment:
                    if function is metrics:
                        with (arguments[0].folder / "metrics.jsonl").open("a") as file:
                            file.write('{"step": 1, "lo')
                    os.kill(os.getpid(), signal.SIGKILL)
                if not after:
                    result = function(*arguments)
            return result

        return call

    metrics = Record.metrics
    Path.rename, Path.replace = counted(Path.rename), counted(Path.replace)
    Record.metrics = counted(metrics)


def alone(function):
    """Call a function in a process of its own, a copy of this one, and return how that ended."""
    if (pid := os.fork()) == 0:
        try:
            function()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def sweep(settings, moments):
    """Kill a run at each of these moments and resume it. How each process ended is written beside the folders."""
    trainer_module.TransformersSampler = UniformSampler
    ends = {}

    def killed(s, moment):
        kill_at(moment)
        run(s)

    for moment in moments:
        s = dataclasses.replace(settings, output=settings.output / str(moment))
        first = alone(lambda s=s, moment=moment: killed(s, moment))
        if first == 0:
            break  # there is no such moment any more
        ends[moment] = [first, alone(lambda s=s: run(dataclasses.replace(s, resume=True)))]
    (settings.output / "ends.json").write_text(json.dumps(ends))


def numbers(folder):
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(folder)]


@pytest.mark.slow
def test_a_run_killed_while_it_writes(settings, uniform, tmp_path):
    # `TOKCREDIT_KILL_ALL=1` takes every moment.
    moments = range(1, 40) if os.environ.get("TOKCREDIT_KILL_ALL") else (2, 6, 13, 24, 29)
    s = settings("grpo", steps=2, save_every=1, rollouts_every=1, eval_problems=1, output=tmp_path / "cut")
    whole = dataclasses.replace(s, output=tmp_path / "whole")
    run(whole)
    s.output.mkdir()
    process = multiprocessing.get_context("spawn").Process(target=sweep, args=(s, moments))
    process.start()
    process.join()
    assert process.exitcode == 0
    ends = json.loads((s.output / "ends.json").read_text())
    assert len(ends) >= 4
    for moment, end in ends.items():
        folder = s.output / moment
        assert end == [-signal.SIGKILL, 0], moment
        assert numbers(folder) == numbers(whole.output), moment
        for name in ("rollouts-000001.parquet", "rollouts-000002.parquet"):
            rows = [pq.read_table(f / name).to_pylist() for f in (folder, whole.output)]
            assert rows[0] == rows[1], moment
        names = [
            {p.relative_to(f) for p in f.rglob("*") if "tensorboard" not in p.parts} for f in (folder, whole.output)
        ]
        assert names[0] - {Path(".owner")} == names[1], moment
