"""Two models, the problems they are asked, and a folder with a file per problem."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from tokcredit.analyze.settings import StudySettings
from tokcredit.train import models, tasks
from tokcredit.train.record import claim, write, write_figure, write_table
from tokcredit.train.sampler import end_tokens


class Pair(NamedTuple):
    """Two models with the same tokens.

    Attributes:
        first: a causal language model.
        second: another.
        words: tokenizer of the second, whose chat template, if it has one, wraps the questions.
        vocabulary: tokens that both predict; further logits, which are padding, are not read.
        ends: int64 ``[*]``, tokens with which either ends a reply.
    """

    first: Any
    second: Any
    words: Any
    vocabulary: int
    ends: Tensor


def load_pair(first: tuple[str, str], second: tuple[str, str], precision: str = "no") -> Pair:
    """Both models on the device of this process.

    Args:
        first: the name of the setting, for errors, and its model as :func:`tokcredit.train.models.load` takes it.
        second: likewise.
        precision: ``bf16``, or ``no`` for float32.

    Raises:
        ValueError: their tokens differ.
    """
    (a, words_a), (b, words_b) = (models.load(model) for _, model in (first, second))
    if words_a.get_vocab() != words_b.get_vocab():
        raise ValueError(f"{second[0]}: expected the tokens of {first[1]}, got {second[1]}")
    device, dtype = PartialState().device, torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (x.to(device, dtype) for x in (a, b))
    ends = sorted({*end_tokens(a, words_a), *end_tokens(b, words_b)})
    vocabulary = min(len(words_b), a.config.vocab_size, b.config.vocab_size)
    return Pair(a, b, words_b, vocabulary, torch.tensor(ends, device=device))


def resolved(settings: StudySettings, analysis: str, first: str, second: str) -> StudySettings:
    """The settings with the recipe of the first model that has tasks where nothing was chosen.

    Raises:
        ValueError: no task, or a count below 1.
    """
    recipes = [models.recipe(model) for model in (first, second)]
    recipe = next((r for r in recipes if r.tasks), recipes[0])
    if settings.problems < 1:
        raise ValueError(f"problems: expected at least 1, got {settings.problems}")
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
    """A folder with what was found about each of some problems; what is there already is not made again.

    Args:
        settings: of the analysis, its ``study`` resolved.

    Raises:
        ValueError: no such task, or the folder holds another analysis.
        RuntimeError: several processes.
    """

    def __init__(self, settings: Any) -> None:
        if (count := PartialState().num_processes) != 1:
            raise RuntimeError(f"analyze: expected one process, got {count}")
        disable_progress_bar()
        asked: StudySettings = settings.study
        self._problems = tasks.load(asked.tasks, asked.held_out, asked.reward, asked.seed).measured(asked.problems)
        self.folder = asked.output or Path()
        chosen = dataclasses.asdict(settings)
        chosen |= {"analysis": type(settings).__name__, **chosen.pop("study")}
        claim(self.folder, chosen, chosen.pop("resume"), free=("output",))

    def tables(self, make: Callable[[int, tasks.Problem], pa.Table]) -> pa.Table:
        """What ``make`` finds about each problem by its number, one table after another."""
        files = [self.folder / f"problem-{number:06}.parquet" for number in range(len(self._problems))]
        for number, problem in enumerate(tqdm(self._problems, unit="problem")):
            if not files[number].exists():
                write_table(files[number], make(number, problem))
        return pa.concat_tables(pq.read_table(file) for file in files)


def report(folder: Path, summary: dict[str, Any], figure: Any, table: Table) -> dict[str, Any]:
    """Writes summary and picture, prints the table, and returns the summary."""
    write(folder / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
    write_figure(folder / "summary.png", figure)
    Console().print(table)
    Console().print(f"{folder / 'summary.png'}", highlight=False)
    return summary
