"""What both analyses share: two models, the problems they are asked, and a folder with one file per problem."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from tokcredit.analyze.settings import StudySettings
from tokcredit.files import WriteError, write
from tokcredit.train import models, tasks
from tokcredit.train.folder import check, locked, plain, write_settings
from tokcredit.train.problems import Problem
from tokcredit.train.ranks import check_launch, processes
from tokcredit.train.record import write_figure, write_table
from tokcredit.train.sampler import end_tokens

_FILES = ("problem-" + "[0-9]" * 6 + ".parquet", "summary.json", "summary.png")


class Pair(NamedTuple):
    """Two models with the same vocabulary.

    Attributes:
        first: A causal language model.
        second: A causal language model.
        tokenizer: Tokenizer of the second. If it has a chat template, questions are wrapped in it.
        vocabulary: Number of tokens that both models predict. Further logits are padding and are not read.
        ends: int64 ``[E]``, tokens with which one of the models ends a response.
    """

    first: Any
    second: Any
    tokenizer: Any
    vocabulary: int
    ends: Tensor


def load_pair(first: tuple[str, str], second: tuple[str, str], precision: str = "no") -> Pair:
    """Return both models on the device of this process.

    Args:
        first: Name of the setting, for errors, and its model as :func:`tokcredit.train.models.load` takes it.
        second: The same for the second model.
        precision: ``bf16``, or ``no`` for float32.

    Raises:
        ValueError: Their vocabularies differ.
    """
    (a, tokenizer_a), (b, tokenizer_b) = (models.load(model) for _, model in (first, second))
    if tokenizer_a.get_vocab() != tokenizer_b.get_vocab():
        raise ValueError(f"{second[0]}: expected the tokens of {first[1]}, got {second[1]}")
    device, dtype = processes().device, torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (x.to(device, dtype) for x in (a, b))
    ends = sorted({*end_tokens(a, tokenizer_a), *end_tokens(b, tokenizer_b)})
    vocabulary = min(max(tokenizer_b.get_vocab().values()) + 1, a.config.vocab_size, b.config.vocab_size)
    return Pair(a, b, tokenizer_b, vocabulary, torch.tensor(ends, device=device))


def resolved(settings: StudySettings, analysis: str, first: str, second: str) -> StudySettings:
    """Return the settings with the recipe of a model where nothing was chosen.

    The recipe is that of the first of the two models that has tasks.

    Args:
        settings: Settings from the user.
        analysis: Name of the analysis, for the folder.
        first: First model, as in :func:`load_pair`.
        second: Second model.

    Raises:
        ValueError: There is no task.
    """
    recipes = [models.recipe(model) for model in (first, second)]
    recipe = next((r for r in recipes if r.tasks), recipes[0])
    if not (settings.tasks or recipe.tasks):
        raise ValueError(f"tasks: expected at least one because neither {first} nor {second} has a recipe, got none")
    names = [models.short_name(model) for model in (first, second)]
    return dataclasses.replace(
        settings,
        tasks=settings.tasks or recipe.tasks,
        max_tokens=settings.max_tokens or recipe.max_tokens,
        precision=recipe.precision if settings.precision == "auto" else settings.precision,
        output=settings.output or Path("runs") / "-".join([analysis, *names]),
    )


class Study:
    """A folder with one table per problem. Tables that exist are not made again.

    Nothing is written before the first table is made.

    Args:
        settings: Settings of the analysis, its ``study`` from :func:`resolved`.
        problems: The problems.

    Attributes:
        folder: The folder.
    """

    def __init__(self, settings: Any, problems: Sequence[Problem]) -> None:
        study: StudySettings = settings.study
        self.folder, self._problems = study.output or Path(), problems
        self._settings = {"analysis": type(settings).__name__, **plain(settings)}
        check(self.folder, self._settings, study.resume, {"output"}, _FILES)

    def tables(self, make: Callable[[int, Problem], pa.Table]) -> pa.Table:
        """Return the tables of all problems, one after another.

        Args:
            make: Returns the table of a problem, from its number and the problem.
        """
        files = [self.folder / f"problem-{number:06}.parquet" for number in range(len(self._problems))]
        for number, problem in enumerate(tqdm(self._problems, unit="problem")):
            if not files[number].exists():
                table = make(number, problem)
                write_settings(self.folder, self._settings)
                write_table(files[number], table)
        return pa.concat_tables(pq.read_table(file) for file in files)


@contextmanager
def opened(settings: Any) -> Iterator[Study]:
    """Hold the folder of an analysis.

    Args:
        settings: Settings of the analysis, its ``study`` from :func:`resolved`.

    Raises:
        ValueError: There is no such task, another process uses the folder, or it holds another analysis.
        RuntimeError: There are several processes.
        WriteError: The folder cannot be written, for example because the disk is full.
    """
    check_launch()
    if (count := processes().num_processes) != 1:
        raise RuntimeError(f"analyze: expected one process, got {count}")
    disable_progress_bar()
    asked: StudySettings = settings.study
    problems = tasks.load(asked.tasks, asked.held_out, asked.reward, asked.seed).measured(asked.problems)
    folder = asked.output or Path()
    with locked(folder):
        try:
            yield Study(settings, problems)
        except WriteError as error:
            done = len(list(folder.glob(_FILES[0])))
            kept = f"{done} of {len(problems)} problems are kept, and the same command with --resume continues"
            raise WriteError(f"{error}; {kept}") from error


def report(folder: Path, summary: dict[str, Any], figure: Any, table: Table) -> dict[str, Any]:
    """Write summary and picture, print the table, and return the summary.

    Args:
        folder: Folder of the analysis.
        summary: Numbers by name.
        figure: A matplotlib figure.
        table: Table for the terminal.
    """
    write(folder / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
    write_figure(folder / "summary.png", figure)
    Console().print(table)
    Console().print(f"{folder / 'summary.png'}", highlight=False)
    return summary
