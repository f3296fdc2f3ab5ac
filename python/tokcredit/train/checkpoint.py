"""Checkpoints of a run, written so that each is whole or absent."""

from __future__ import annotations

import shutil
from pathlib import Path

from accelerate import Accelerator


def save(accelerator: Accelerator, folder: Path, step: int) -> None:
    """Save the model, the optimizer, registered objects and random states, and then remove earlier checkpoints.

    Args:
        accelerator: Accelerator that holds them.
        folder: Folder of the run.
        step: Number of the step after which this is.
    """
    target, work = folder / f"checkpoint-{step:06}", folder / "checkpoint.new"
    if target.exists():
        return
    if accelerator.is_main_process:
        shutil.rmtree(work, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(work), safe_serialization=False)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        work.rename(target)
        for old in folder.glob("checkpoint-*"):
            if old != target:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


def load(accelerator: Accelerator, folder: Path) -> int:
    """Restore the last checkpoint of a run and return its step, or 0 if there is none.

    Args:
        accelerator: Accelerator that holds what is restored.
        folder: Folder of the run.
    """
    found = sorted(folder.glob("checkpoint-*"))
    if not found:
        return 0
    accelerator.load_state(str(found[-1]))
    return int(found[-1].name.rpartition("-")[2])
