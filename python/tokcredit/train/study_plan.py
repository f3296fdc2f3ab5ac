"""Studies: arms that are compared with a baseline, each with its own tuned learning rate and with several seeds.

A study is a JSON file, in which an arm is a text of options of ``tokcredit train``::

    {
      "options": "--model tiny --steps 100",
      "lr": [1e-4, 3e-4], "tuning_seeds": [100], "seeds": [0, 1, 2, 3, 4],
      "threshold": 0.6, "gradient_steps": 20,
      "experiments": {
        "reuse": {
          "question": "Ratios, four updates per batch",
          "options": "--minibatches 4", "baseline": "grpo",
          "arms": {"grpo": "--method grpo", "ctpo": "--method ctpo"}
        }
      }
    }

An arm has the options of the study, then those of its experiment, then its own. If an option occurs twice, the last one
counts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

from tokcredit import options
from tokcredit.files import read_json
from tokcredit.settings import Declared, number, whole_number
from tokcredit.train.compatibility import only_read
from tokcredit.train.experiment import resolved
from tokcredit.train.folder import plain
from tokcredit.train.settings import Settings

NAMED = Path(__file__).parent / "studies"
"""Folder of the studies that come with the package."""


@dataclass(frozen=True)
class Experiment(Declared):
    """Arms that answer one question.

    Attributes:
        question: The question.
        options: Options of all its arms.
        baseline: Name of the arm that the others are compared with.
        arms: Options of each arm by its name.
    """

    question: str
    options: str
    baseline: str
    arms: dict[str, str]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.arms, dict) or not all(isinstance(text, str) for text in self.arms.values()):
            raise TypeError(f"arms: expected options by name, got {self.arms!r}")
        if self.baseline not in self.arms:
            raise ValueError(f"baseline: expected one of {', '.join(self.arms)}, got {self.baseline!r}")


@dataclass(frozen=True)
class Study(Declared):
    """What is compared, and how.

    Attributes:
        options: Options of all runs.
        experiments: Experiments by name.
        lr: Learning rates, of which each arm takes the best.
        tuning_seeds: Seeds of the runs that choose it.
        seeds: Seeds of the runs that are compared.
        threshold: Held-out reward whose cost in tokens is reported.
        gradient_steps: Number of batches from which the variance of the gradient is estimated; 0 for none.
    """

    options: str
    experiments: dict[str, Experiment]
    lr: tuple[float, ...] = number(above=0, several=True)
    tuning_seeds: tuple[int, ...] = whole_number(at_least=0, several=True)
    seeds: tuple[int, ...] = whole_number(at_least=0, several=True)
    threshold: float = number(infinite=True)
    gradient_steps: int = whole_number(at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gradient_steps == 1:
            raise ValueError("gradient_steps: expected 0, or at least 2 for a variance, got 1")
        for name in ("lr", "tuning_seeds", "seeds", "experiments"):
            if not getattr(self, name):
                raise ValueError(f"{name}: expected at least one, got none")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: expected different seeds, got {list(self.seeds)}")
        if both := set(self.seeds) & set(self.tuning_seeds):
            raise ValueError(f"tuning_seeds: expected other seeds than those of seeds, got {sorted(both)}")

    def arms(self) -> Iterator[tuple[str, str, Settings]]:
        """Yield the name of each experiment and of each of its arms, with the settings of the arm."""
        for name, experiment in self.experiments.items():
            for arm, text in experiment.arms.items():
                yield name, arm, _settings(f"{self.options} {experiment.options} {text}", f"{name}: {arm}")


def _settings(text: str, where: str) -> Settings:
    try:
        made = tyro.cli(
            Settings, args=shlex.split(text), config=(tyro.conf.OmitArgPrefixes,), registry=options.registry
        )
    except options.RejectedError as error:
        raise ValueError(f"experiments: {where}: {error}") from None
    if made.output or made.resume or made.optimizer.lr or made.seed:
        raise ValueError(f"experiments: {where}: expected no --output, --resume, --lr and --seed, got {text}")
    if made.trains_on_examples:
        raise ValueError(f"experiments: {where}: expected --tasks without --pairs and --completions, got {text}")
    try:
        objective = made.objective.build()
    except (TypeError, ValueError) as error:
        raise ValueError(f"experiments: {where}: {error}") from error
    return only_read(made, objective)


def read(study: str) -> Study:
    """Return a study.

    Args:
        study: Name of one that comes with the package, or path of a JSON file.

    Raises:
        ValueError: There is no such study, or it is malformed.
    """
    path = NAMED / f"{study}.json"
    path = path if path.exists() else Path(study)
    if not path.is_file():
        names = sorted(x.stem for x in NAMED.glob("*.json"))
        raise ValueError(f"study: expected {', '.join(names)} or a JSON file, got {study!r}")
    found = read_json(path)
    try:
        experiments = {name: Experiment(**x) for name, x in found["experiments"].items()}
        return Study(**(found | {"experiments": experiments}))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"study: expected the form that docs/runs.md shows in {path}, got {error}") from error


def with_rate(arm: Settings, lr: float, seed: int, folder: Path) -> Settings:
    """Return the settings of one run, whose folder is named after the method, a digest of the settings and the seed.

    Args:
        arm: Settings of the arm.
        lr: Learning rate.
        seed: Seed.
        folder: Folder of the study.
    """
    one = resolved(dataclasses.replace(arm, optimizer=dataclasses.replace(arm.optimizer, lr=lr), seed=seed))
    text = json.dumps(plain(dataclasses.replace(one, output=None)), sort_keys=True)
    name = f"{one.objective.method}-{hashlib.sha256(text.encode()).hexdigest()[:10]}-seed{seed}"
    return dataclasses.replace(one, output=folder / name, resume=True)
