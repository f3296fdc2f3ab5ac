"""A run: a trainer whose progress is shown, recorded in a folder, and resumed."""

from __future__ import annotations

import dataclasses
import json
import platform
import resource
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from tokcredit import __version__
from tokcredit.report import report
from tokcredit.train import checkpoint, models
from tokcredit.train.trainer import Step, Trainer
from tokcredit.train.record import Record, claim, read_metrics, write
from tokcredit.train.settings import Settings


def run(settings: Settings) -> dict[str, float] | None:
    """Trains as the settings say and returns the summary; None when stopped before the end (resume continues).

    The folder holds ``settings.json``, ``metrics.jsonl``, ``tensorboard/``, ``rollouts-*.parquet``, ``curve.png``,
    ``tokenizer/``, the last ``checkpoint-*`` and, at the end, ``model/``, ``report.html`` and ``summary.json``.

    Raises:
        ValueError: the folder holds another run, or one made with other settings.
    """
    disable_progress_bar()
    settings = resolved(settings)
    folder = settings.output or Path()
    ranks = PartialState()
    if ranks.is_main_process:
        chosen = dataclasses.asdict(settings)
        claim(folder, chosen, chosen.pop("resume"), free=("steps", "output"))
    ranks.wait_for_everyone()
    trainer = Trainer(settings)
    main = trainer.accelerator.is_main_process
    done = checkpoint.load(trainer.accelerator, folder)
    record = Record(folder, done + 1 if done else 0, _header(settings, trainer)) if main else None
    steps = settings.steps
    if main and not done:
        _introduce(settings, trainer)
        trainer.tokenizer.save_pretrained(folder / "tokenizer")
    with _stop_requests() as stopping, tqdm(total=steps, initial=done, unit="step", disable=not main) as bar:
        if not done:
            _note(record, {"step": 0, "held_out": trainer.evaluate()})
        for number in range(done + 1, steps + 1):
            step = trainer.step(number)
            last = number == steps
            line = {"step": number, **step.metrics}
            if last or number % settings.eval_every == 0:
                line["held_out"] = trainer.evaluate()
            _note(record, line)
            if record and (last or number % settings.rollouts_every == 0):
                record.rollouts(number, _columns(number, step))
            if record and "held_out" in line:
                record.curve()
            bar.update()
            bar.set_postfix(_shown(line))
            stop = trainer.ranks.any(bool(stopping))
            if last or stop or number % settings.save_every == 0:
                checkpoint.save(trainer.accelerator, folder, number)
            if stop and not last:
                bar.write(f"stopped after step {number}; --resume continues")
                return None
    if record:
        record.close()
        trainer.model.save_pretrained(folder / "model")
        trainer.tokenizer.save_pretrained(folder / "model")
        report(folder, trainer.objective)
        write(folder / "summary.json", json.dumps(_summary(folder), indent=2) + "\n")
        _print_summary(folder)
    ranks.wait_for_everyone()
    return read_summary(folder)


def read_summary(folder: Path) -> dict[str, float] | None:
    """What a finished run came to; None where it is not finished."""
    path = folder / "summary.json"
    return json.loads(path.read_text()) if path.exists() else None


def resolved(settings: Settings) -> Settings:
    """The settings with the recipe of the model where nothing was chosen."""
    recipe = models.recipe(settings.model)
    sampling, optimizer = settings.sampling, settings.optimizer
    name = f"{models.short_name(settings.model)}-{settings.objective.method}"
    return dataclasses.replace(
        settings,
        sampling=dataclasses.replace(
            sampling,
            prompts=sampling.prompts or recipe.prompts,
            max_tokens=sampling.max_tokens or recipe.max_tokens,
        ),
        optimizer=dataclasses.replace(
            optimizer,
            lr=optimizer.lr or recipe.lr,
            precision=recipe.precision if optimizer.precision == "auto" else optimizer.precision,
        ),
        tasks=settings.tasks or recipe.tasks,
        steps=settings.steps or recipe.steps,
        output=settings.output or Path("runs") / name,
    )


def _header(settings: Settings, trainer: Trainer) -> dict[str, Any]:
    return {
        "version": __version__,
        "method": settings.objective.method,
        "objective": repr(trainer.objective),
        "model": settings.model,
        "tokenizer": "tokenizer",
    }


def _introduce(settings: Settings, trainer: Trainer) -> None:
    parameters = sum(p.numel() for p in trainer.model.parameters())
    problems = trainer.problems
    Console().print(
        f"[bold]{settings.model}[/bold], {parameters / 1e6:.1f} M parameters, on {trainer.accelerator.device}\n"
        f"{' + '.join(settings.tasks)}: {sum(map(len, problems.train))} problems to train on, "
        f"{len(problems.held_out)} held out\n{trainer.objective}",
        highlight=False,
    )


def _note(record: Record | None, line: Mapping[str, float]) -> None:
    if record:
        record.metrics(line)


def _shown(line: Mapping[str, float]) -> dict[str, str]:
    shown = {
        "reward": f"{line['reward']:.2f}",
        "length": f"{line['length']:.0f}",
        "tok/s": f"{line['tokens'] / line['seconds']:.0f}",
    }
    return shown | ({"held out": f"{line['held_out']:.2f}"} if "held_out" in line else {})


def _columns(number: int, step: Step) -> dict[str, Any]:
    explored, learnt = step.explored, step.learnt
    batch = learnt.prepared.batch
    lengths = (batch.end - batch.begin).tolist()

    def per_row(x: torch.Tensor | None) -> list[Any] | None:
        if x is None:
            return None
        rows = x.cpu().split(lengths)
        # Numbers nobody computed (NaN) are null.
        return [None if row.isnan().any() else row.tolist() for row in rows]

    prompts = batch.extras["prompt_tokens"]
    return {
        "step": [number] * batch.num_rows,
        "group": batch.group_ids.tolist(),
        "task": [p.task for p in explored.problems],
        "prompt": [p.question for p in explored.problems],
        "completion": explored.replies,
        "reward": batch.rewards.tolist(),
        "prompt_tokens": [row[row >= 0].tolist() for row in prompts.cpu()],
        "tokens": per_row(batch.tokens),
        "response_mask": per_row(batch.response_mask),
        "rollout_log_probs": per_row(batch.rollout_log_probs),
        "old_log_probs": per_row(batch.old_log_probs),
        "log_probs": per_row(learnt.log_probs),
        "entropies": per_row(batch.entropies),
        "advantages": per_row(learnt.prepared.advantages),
    }


def _summary(folder: Path) -> dict[str, float]:
    lines = read_metrics(folder)
    measured = [line["held_out"] for line in lines if "held_out" in line]
    steps = lines[1:]

    def total(name: str) -> float:
        return sum(line[name] for line in steps)

    seconds = total("seconds") or 1.0
    if torch.cuda.is_available():
        memory = torch.cuda.max_memory_allocated()
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
    return {
        "held_out_before": measured[0],
        "held_out_after": measured[-1],
        "held_out_best": max(measured),
        "steps": len(steps),
        "seconds": seconds,
        "tokens_per_second": total("tokens") / seconds,
        "share_sampling": total("sample_seconds") / seconds,
        "share_tokcredit": total("credit_seconds") / seconds,
        "peak_memory_gib": memory / 2**30,
    }


def _print_summary(folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    table = Table(title=str(folder), show_header=False, title_justify="left")
    table.add_row("held-out accuracy before", f"{summary['held_out_before']:.3f}")
    table.add_row("held-out accuracy after", f"{summary['held_out_after']:.3f}")
    table.add_row("steps", f"{summary['steps']}")
    table.add_row("seconds of training", f"{summary['seconds']:.0f}")
    table.add_row("tokens per second", f"{summary['tokens_per_second']:.0f}")
    table.add_row("share of sampling", f"{summary['share_sampling']:.1%}")
    table.add_row("share of credit and loss", f"{summary['share_tokcredit']:.2%}")
    table.add_row("peak memory", f"{summary['peak_memory_gib']:.1f} GiB")
    table.add_row("curve", str(folder / "curve.png"))
    table.add_row("which tokens were paid", str(folder / "report.html"))
    Console().print(table)


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """A list that fills on Ctrl-C or SIGTERM; a second one interrupts at once."""
    received: list[int] = []

    def receive(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = {s: signal.signal(s, receive) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
