"""A run that is killed while it writes goes on with the numbers of a run that was not."""

import dataclasses
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import matplotlib.figure  # noqa: F401 - forks start sooner when all is imported
import pyarrow.parquet as pq
import pytest
import torch.utils.tensorboard  # noqa: F401
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


def alone(function, seconds=None):
    """Call a function in a process of its own, a copy of this one, and return how that ended.

    The process is killed after these seconds.
    """
    if (pid := os.fork()) == 0:
        try:
            function()
            os._exit(0)
        finally:
            os._exit(1)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def sweep(settings, moments, times):
    """Kill a run at each of these moments and resume it. How each process ended is written beside the folders.

    Args:
        settings: Settings of the run.
        moments: Numbers of moments; see :func:`kill_at`.
        times: Number of random times at which a run is killed from outside, as well.
    """
    trainer_module.TransformersSampler = UniformSampler
    ends = {}

    def killed(s, moment):
        kill_at(moment)
        run(s)

    def resumed(s):
        return alone(lambda: run(dataclasses.replace(s, resume=True)))

    for moment in moments:
        s = dataclasses.replace(settings, output=settings.output / str(moment))
        first = alone(lambda s=s, moment=moment: killed(s, moment))
        if first == 0:
            break  # there is no such moment any more
        ends[moment] = [first, resumed(s)]
    generator, begin = random.Random(0), time.monotonic()
    if times:
        alone(lambda: run(dataclasses.replace(settings, output=settings.output / "timed")))
    seconds = time.monotonic() - begin
    for number in range(times):
        s = dataclasses.replace(settings, output=settings.output / f"random-{number}")
        first = alone(lambda s=s: run(s), generator.uniform(0, seconds))
        ends[s.output.name] = [first, resumed(s)]
    (settings.output / "ends.json").write_text(json.dumps(ends))


def numbers(folder):
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(folder)]


@pytest.mark.slow
def test_a_run_killed_while_it_writes(settings, uniform, tmp_path):
    # `TOKCREDIT_KILL_ALL=1` takes every moment, and `TOKCREDIT_KILLS=100` adds 100 random times.
    moments = range(1, 80) if os.environ.get("TOKCREDIT_KILL_ALL") else (2, 6, 13, 24, 29)
    times = int(os.environ.get("TOKCREDIT_KILLS", "0"))
    s = settings("grpo", steps=2, save_every=1, rollouts_every=1, eval_problems=1, output=tmp_path / "cut")
    whole = dataclasses.replace(s, output=tmp_path / "whole")
    run(whole)
    s.output.mkdir()
    process = multiprocessing.get_context("spawn").Process(target=sweep, args=(s, moments, times))
    process.start()
    process.join()
    assert process.exitcode == 0
    ends = json.loads((s.output / "ends.json").read_text())
    assert len(ends) >= 4
    print(f"{len(ends)} moments, {sum(end[0] == 0 for end in ends.values())} of them after the end of the run")
    for moment, end in ends.items():
        folder = s.output / moment
        # A run may have ended before its random time.
        assert end[0] == -signal.SIGKILL or (end[0] == 0 and moment.startswith("random")), moment
        assert end[1] == 0, moment
        assert numbers(folder) == numbers(whole.output), moment
        for name in ("rollouts-000001.parquet", "rollouts-000002.parquet"):
            rows = [pq.read_table(f / name).to_pylist() for f in (folder, whole.output)]
            assert rows[0] == rows[1], moment
        names = [
            {p.relative_to(f) for p in f.rglob("*") if "tensorboard" not in p.parts} for f in (folder, whole.output)
        ]
        assert names[0] - {Path(".owner")} == names[1], moment
