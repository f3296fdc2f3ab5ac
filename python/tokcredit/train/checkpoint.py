"""Checkpoints of a run, written so that each is whole or absent."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from accelerate import Accelerator

from tokcredit.files import naming
from tokcredit.train.ranks import Ranks


def save(accelerator: Accelerator, folder: Path, step: int) -> None:
    """Save the model, the optimizer, registered objects and random states, and then remove earlier checkpoints.

    Args:
        accelerator: Accelerator that holds them.
        folder: Folder of the run.
        step: Number of the step after which this is.

    Raises:
        WriteError: It could not be written. Earlier checkpoints are kept.
    """
    target, work = folder / _name(step), folder / "checkpoint.new"
    if target.exists():
        return
    if accelerator.is_main_process:
        shutil.rmtree(work, ignore_errors=True)
    accelerator.wait_for_everyone()
    ranks = Ranks(accelerator)
    with naming(target):
        try:
            ranks.together(lambda: accelerator.save_state(str(work), safe_serialization=False))
            ranks.on_main(lambda: work.rename(target))
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        ranks.on_main(lambda: _keep_only(folder, step))


def last(folder: Path) -> int:
    """Return the step of the last checkpoint of a run, or 0 if there is none.

    Args:
        folder: Folder of the run.
    """
    return max(_steps(folder), default=0)


def load(accelerator: Accelerator, folder: Path) -> int:
    """Restore the last checkpoint of a run and return its step, or 0 if there is none.

    Args:
        accelerator: Accelerator that holds what is restored.
        folder: Folder of the run.
    """
    step, ranks = last(folder), Ranks(accelerator)
    if step:
        ranks.together(lambda: accelerator.load_state(str(folder / _name(step))))
        # A process that was killed may have left an earlier one.
        ranks.on_main(lambda: _keep_only(folder, step))
    return step


def _keep_only(folder: Path, step: int) -> None:
    for other in _steps(folder):
        if other != step:
            shutil.rmtree(folder / _name(other))


def _name(step: int) -> str:
    return f"checkpoint-{step:06}"


def _steps(folder: Path) -> list[int]:
    """Return the steps of the checkpoints; other folders, such as ``checkpoint-best``, belong to the user."""
    numbers = [int(path.name[11:]) for path in folder.glob("checkpoint-*") if re.fullmatch(r"\d{6,}", path.name[11:])]
    return [step for step in numbers if (folder / _name(step)).is_dir()]
