"""Runs of a study, some at a time; each is an ordinary run folder."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tokcredit.train.experiment import NEUTRAL, check_folder, checked, read_summary, run
from tokcredit.train.folder import locked
from tokcredit.train.settings import Settings, StudySettings
from tokcredit.train.study_plan import read
from tokcredit.train.study_report import write_report
from tokcredit.train.study_results import Results


def study(settings: StudySettings) -> Path | None:
    """Run what is missing of a study, and write its results and its report.

    First each arm is trained with each learning rate on the tuning seeds, and the rate with the best mean held-out
    reward at the end is chosen. Then all arms are trained with their rates on one seed after the other, and
    ``results.json``, ``report.md`` and a plot of each experiment are written after each seed. Finished runs are not
    repeated, and interrupted ones are resumed.

    Args:
        settings: Which study, in which folder, and how many runs at a time.

    Returns:
        The folder, or None if the study was stopped before its end.

    Raises:
        ValueError: The study or a setting of an arm is wrong.
        WriteError: The folder cannot be written, for example because the disk is full.
    """
    plan = read(settings.study)
    folder = settings.output or Path("runs") / f"study-{Path(settings.study).stem}"
    with locked(folder):
        found = Results(plan, folder)
        for arm in found.arms:
            checked(found.run(arm, plan.lr[0], plan.seeds[0]))
        first = [*found.gradient_runs(), *found.tuning_runs()]
        total = len(first) + len(found.arms) * len(plan.seeds)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(settings.jobs, context, _apart) as pool, tqdm(total=total, unit="run") as bar:
            if not _finish(pool, first, bar):
                return None
            for count, seed in enumerate(plan.seeds, 1):
                if not _finish(pool, [found.tuned_run(arm, seed) for arm in found.arms], bar):
                    return None
                write_report(folder, found.collected(plan.seeds[:count]))
    return folder


def _apart() -> None:
    """Leave Ctrl-C to the parent, which ends this process after its step; end it too if the parent is killed."""
    os.setsid()
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _one(settings: Settings) -> bool:
    """Return whether a run has finished. What it prints goes to ``log.txt`` in its folder."""
    folder = settings.output or Path()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("a") as log, redirect_stdout(log), redirect_stderr(log):
        finished = run(settings) is not None
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        os._exit(1)  # nobody reads the result
    return finished


def _finish(pool: ProcessPoolExecutor, runs: Sequence[Settings], bar: Any) -> bool:
    """Run those that have not finished and return whether all have."""
    for one in runs:
        check_folder(one, NEUTRAL)
    missing = [one for one in runs if read_summary(one.output or Path()) is None]
    bar.update(len(runs) - len(missing))
    running = [pool.submit(_one, one) for one in missing]
    try:
        for done in as_completed(running):
            if not done.result():
                return False
            bar.update()
    except KeyboardInterrupt:
        return False
    finally:
        if not all(future.done() for future in running):
            for child in multiprocessing.active_children():
                child.terminate()  # it stops after the step, and the run is resumed next time
            pool.shutdown(cancel_futures=True)
    return True
