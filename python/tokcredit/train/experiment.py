"""A run: a trainer whose progress is shown, recorded in a folder and resumed."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import resource
import signal
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from tokcredit import __version__
from tokcredit.files import WriteError, read_json, whole_folder, write
from tokcredit.report import report
from tokcredit.train import adapter, checkpoint, compatibility, example_trainer, models, teacher_scores, virtual_tokens
from tokcredit.train.curve import Curve
from tokcredit.train.example_trainer import ExampleStep, ExampleTrainer
from tokcredit.train.folder import check, locked, plain, write_settings
from tokcredit.train.learner import Update
from tokcredit.train.ranks import check_launch, on_main
from tokcredit.train.record import OF_TURNS, Record, read_metrics
from tokcredit.train.settings import Settings, is_due
from tokcredit.train.trainer import Step, Trainer

_NUMBER = "[0-9]" * 6
_FILES = (
    *("metrics.jsonl", "tensorboard", f"rollouts-{_NUMBER}.parquet", "curve.png", "tokenizer"),
    *("fixed_inputs.parquet", teacher_scores.FOLDER),
    *(f"checkpoint-{_NUMBER}", "model", "report.html", "summary.json"),
)
NEUTRAL = frozenset({"output", "save_every", "micro_batch"})
"""Settings that change no result."""


def run(settings: Settings) -> dict[str, float] | None:
    """Train as the settings say and return the summary.

    The folder holds ``settings.json``, ``metrics.jsonl``, ``tensorboard/``, ``rollouts-*.parquet``, ``curve.png``,
    ``tokenizer/``, the last ``checkpoint-*`` and, at the end, ``model/``, ``report.html`` and ``summary.json``.

    Args:
        settings: Settings of the run.

    Returns:
        Numbers by name, or None if the run was stopped before its end; ``resume`` continues it.

    Raises:
        TypeError: A setting of the method has the wrong type.
        ValueError: A setting is wrong, or the folder holds another run, or one with other settings.
        WriteError: The folder cannot be written, for example because the disk is full.
    """
    disable_progress_bar()
    check_launch()
    settings = resolved(settings)
    folder = settings.output or Path()
    with locked(folder):
        on_main(lambda: check_folder(settings, NEUTRAL | {"steps", "on_nonfinite"}))
        try:
            return _run(settings, folder)
        except WriteError as error:
            raise WriteError(f"{error}; {_kept(folder)}") from error


def _kept(folder: Path) -> str:
    """Return what a run that cannot write has kept, and how it continues."""
    done = checkpoint.last(folder)
    kept = f"the checkpoint of step {done} is kept" if done else "no checkpoint was saved yet"
    return f"{kept}, and the same command with --resume {'continues from it' if done else 'begins again'}"


def check_folder(settings: Settings, free: Collection[str]) -> None:
    """Check that a run may write into its folder.

    Args:
        settings: Settings without open defaults.
        free: Names of settings that may differ from those of the run in the folder.

    Raises:
        ValueError: The folder holds another run, or one with other settings or more steps, or files of someone else.
    """
    folder = settings.output or Path()
    check(folder, plain(settings), settings.resume, free, _FILES)
    if (done := checkpoint.last(folder)) > settings.steps:
        raise ValueError(f"steps: expected at least {done}, which the run in {folder} has done, got {settings.steps}")


def checked(settings: Settings) -> None:
    """Check what can be checked before a model is loaded.

    Args:
        settings: Settings without open defaults.

    Raises:
        TypeError: A setting of the method has the wrong type.
        ValueError: A setting is wrong.
    """
    (example_trainer.checked if settings.trains_on_examples else compatibility.checked)(settings)


def _run(settings: Settings, folder: Path) -> dict[str, float] | None:
    trainer: Trainer | ExampleTrainer = ExampleTrainer(settings) if settings.trains_on_examples else Trainer(settings)
    steps, ranks, main = settings.steps, trainer.ranks, trainer.accelerator.is_main_process
    done = checkpoint.load(trainer.accelerator, folder)
    if main and not done:
        _introduce(settings, trainer)
    record: Record | None = None
    with _stop_requests() as stopping, tqdm(total=steps, initial=done, unit="step", disable=not main) as bar:
        new = [] if done else [{"step": 0, **trainer.measure()}]
        for number in range(done + 1, steps + 1):
            step = trainer.step(number)
            last = number == steps
            line = {"step": number, **step.metrics}
            if last or is_due(number, settings.eval_every):
                line |= trainer.measure()
            new.append(line)
            # A run that cannot take its first step has written nothing, and its folder is free.
            record = ranks.on_main(partial(_recorded, record, trainer, done, new, step))
            new = []
            for text in step.update.skipped if main else ():
                bar.write(f"step {number}: skipped an update because of {text}")
            bar.update()
            bar.set_postfix(_shown(line, trainer))
            stop = ranks.any(bool(stopping))
            if last or stop or is_due(number, settings.save_every):
                checkpoint.save(trainer.accelerator, folder, number)
            if stop and not last:
                bar.write(f"stopped after step {number}; --resume continues")
                return None
    ranks.on_main(lambda: _finish(record or _begin(trainer, done), trainer))
    return read_summary(folder)


def _begin(trainer: Trainer | ExampleTrainer, done: int) -> Record:
    """Write the settings, from when on the folder has a run, and return the record of its further steps."""
    settings = trainer.settings
    folder = settings.output or Path()
    write_settings(folder, plain(settings))
    with whole_folder(folder / "tokenizer") as words:
        trainer.tokenizer.save_pretrained(words)
    trainer.write(folder)
    return Record(folder, done + 1 if done else 0, _header(settings, trainer))


def _recorded(
    record: Record | None,
    trainer: Trainer | ExampleTrainer,
    done: int,
    lines: Sequence[Mapping[str, float]],
    step: Step | ExampleStep,
) -> Record:
    """Write metrics and, where they are due, the rollouts of a step and the learning curve; return the record.

    Args:
        record: The record so far, or None before the first step.
        trainer: The trainer.
        done: Number of steps before this run was continued.
        lines: Metrics, the last of which are those of the step.
        step: The step.
    """
    record, settings, number = record or _begin(trainer, done), trainer.settings, int(lines[-1]["step"])
    for line in lines:
        record.metrics(line)
    if number == settings.steps or is_due(number, settings.rollouts_every):
        record.rollouts(number, _columns(number, step.update, trainer.model) | step.columns)
    if trainer.curve.held_out in lines[-1]:
        record.curve(trainer.curve)
    return record


def _finish(record: Record, trainer: Trainer | ExampleTrainer) -> None:
    """Write what a run leaves at its end, and print the summary."""
    record.close()
    with whole_folder(record.folder / "model") as model:
        adapter.save(trainer.model, model)
        trainer.tokenizer.save_pretrained(model)
    report(record.folder, trainer.objective)
    write(record.folder / "summary.json", json.dumps(_summary(record.folder, trainer.curve), indent=2) + "\n")
    _print_summary(record.folder, trainer.curve)


def read_summary(folder: Path) -> dict[str, float] | None:
    """Return the summary of a run, or None if it has not finished.

    Args:
        folder: Folder of the run.
    """
    return read_json(folder / "summary.json")


def resolved(settings: Settings) -> Settings:
    """Return the settings with the values that suit the model where nothing was chosen.

    Args:
        settings: Settings of a run.
    """
    recipe = models.recipe(settings.model)
    sampling, optimizer, critic = settings.sampling, settings.optimizer, settings.critic
    lr = optimizer.lr or recipe.lr
    critic_lr = critic.critic_lr or (10 * lr if critic.critic else 0.0)
    name = f"{models.short_name(settings.model)}-{settings.objective.method}"
    return dataclasses.replace(
        settings,
        sampling=dataclasses.replace(
            sampling,
            prompts=sampling.prompts or recipe.prompts,
            max_tokens=sampling.max_tokens or (0 if settings.trains_on_examples else recipe.max_tokens),
        ),
        optimizer=dataclasses.replace(
            optimizer,
            lr=lr,
            precision=recipe.precision if optimizer.precision == "auto" else optimizer.precision,
        ),
        critic=dataclasses.replace(critic, critic_lr=critic_lr),
        reward_model_lr=settings.reward_model_lr or (lr if settings.reward_model else 0.0),
        tasks=settings.tasks or (() if settings.trains_on_examples else recipe.tasks),
        steps=settings.steps or recipe.steps,
        output=settings.output or Path("runs") / name,
    )


def _header(settings: Settings, trainer: Trainer | ExampleTrainer) -> dict[str, Any]:
    return {
        "version": __version__,
        "method": settings.objective.method,
        "objective": repr(trainer.objective),
        "model": settings.model,
        "tokenizer": "tokenizer",
    }


def _introduce(settings: Settings, trainer: Trainer | ExampleTrainer) -> None:
    sizes = [(p.numel(), p.requires_grad) for p in trainer.model.parameters()]
    parameters, trained = sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)
    of_adapter = f" ({trained / 1e6:.2f} M in {settings.adapter})" if settings.adapter else ""
    Console().print(
        f"[bold]{settings.model}[/bold], {parameters / 1e6:.1f} M parameters{of_adapter}, "
        f"on {trainer.accelerator.device}\n"
        f"{trainer.introduction}\n{trainer.objective}",
        highlight=False,
    )


def _shown(line: Mapping[str, float], trainer: Trainer | ExampleTrainer) -> dict[str, str]:
    shown = trainer.shown(line) | {"tok/s": f"{line['tokens'] / line['seconds']:.0f}"}
    return shown | ({"held out": f"{line[trainer.curve.held_out]:.2f}"} if trainer.curve.held_out in line else {})


def _columns(number: int, update: Update, model: Any) -> dict[str, Any]:
    batch = update.prepared.batch
    lengths = (batch.end - batch.begin).tolist()

    def per_row(x: torch.Tensor | None) -> list[Any] | None:
        if x is None:
            return None
        rows = x.cpu().split(lengths)
        # Numbers that were not computed (NaN) are null.
        return [None if row.isnan().any() else row.tolist() for row in rows]

    def with_nan(x: torch.Tensor) -> list[Any]:
        return [row.tolist() for row in x.cpu().split(lengths)]

    with adapter.switched_off(model):
        prompts = virtual_tokens.known(model, batch.input("prompt_tokens"))
    return {
        "step": [number] * batch.num_rows,
        "group": batch.group_ids.tolist(),
        "reward": batch.outcome_rewards.tolist(),
        "prompt_tokens": [row[row >= 0].tolist() for row in prompts.cpu()],
        "tokens": per_row(batch.tokens),
        "response_mask": per_row(batch.response_mask),
        "rollout_log_probs": per_row(batch.rollout_log_probs),
        "old_log_probs": per_row(batch.old_log_probs),
        "ref_log_probs": per_row(batch.ref_log_probs),
        "log_probs": per_row(update.log_probs),
        "entropies": per_row(batch.entropies),
        "prompt_pairs": batch.input("prompt_pairs").tolist() if batch.has_input("prompt_pairs") else None,
        "advantages": per_row(update.prepared.advantages),
        "trajectory": None if batch.trajectory_ids is None else batch.trajectory_ids.tolist(),
        "context_keys": batch.input("context_keys").tolist() if batch.has_input("context_keys") else None,
        **{name: with_nan(batch.input(name)) for name in OF_TURNS if batch.has_input(name)},
    }


def _summary(folder: Path, curve: Curve) -> dict[str, float]:
    lines = read_metrics(folder)
    measured = [line for line in lines if curve.held_out in line]
    main = [line[curve.held_out] for line in measured]
    others = sorted(name for name in measured[0] if name.startswith("held_out_") and name != curve.held_out)
    steps = lines[1:]

    def total(name: str) -> float:
        return sum(line.get(name, 0.0) for line in steps)

    seconds = total("seconds") or 1.0
    if torch.cuda.is_available():
        memory = torch.cuda.max_memory_allocated()
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
    return {
        "held_out_before": main[0],
        "held_out_after": main[-1],
        "held_out_best": max(main) if curve.higher else min(main),
        **{f"{name}_{when}": measured[at][name] for name in others for when, at in (("before", 0), ("after", -1))},
        "steps": len(steps),
        "skipped_updates": sum(line.get("skipped_updates", 0) for line in steps),
        "seconds": seconds,
        "tokens_per_second": total("tokens") / seconds,
        "sampling_fraction": total("sample_seconds") / seconds,
        "credit_fraction": total("credit_seconds") / seconds,
        "peak_memory_gib": memory / 2**30,
    }


def _print_summary(folder: Path, curve: Curve) -> None:
    summary = read_summary(folder) or {}
    table = Table(title=str(folder), show_header=False, title_justify="left")
    table.add_row(f"{curve.titles[1]} before", f"{summary['held_out_before']:.3f}")
    table.add_row(f"{curve.titles[1]} after", f"{summary['held_out_after']:.3f}")
    for name in sorted(name for name in summary if name.startswith("held_out_") and name.count("_") > 2):
        table.add_row(name.replace("held_out", "held-out").replace("_", " "), f"{summary[name]:.3f}")
    table.add_row("steps", f"{summary['steps']}")
    if summary["skipped_updates"]:
        table.add_row("updates skipped", f"{summary['skipped_updates']:.0f}")
    table.add_row("seconds of training", f"{summary['seconds']:.0f}")
    table.add_row("tokens per second", f"{summary['tokens_per_second']:.0f}")
    if summary["sampling_fraction"]:
        table.add_row("time spent sampling", f"{summary['sampling_fraction']:.1%}")
    table.add_row("time spent on credit", f"{summary['credit_fraction']:.2%}")
    table.add_row("peak memory", f"{summary['peak_memory_gib']:.1f} GiB")
    table.add_row("curve", str(folder / "curve.png"))
    table.add_row("advantages of the tokens", str(folder / "report.html"))
    Console().print(table)


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Yield a list that grows on Ctrl-C or SIGTERM; the second signal interrupts at once."""
    received: list[int] = []

    def receive(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        os.write(2, b"\nstopping after this step; the same signal again stops at once\n")

    before = {s: signal.signal(s, receive) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
