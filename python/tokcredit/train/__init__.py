"""A small trainer for causal language models: any objective of the library on tasks with verifiable answers.

Needs ``pip install "tokcredit[train]"``. From Python::

    from tokcredit.train import Settings, run

    summary = run(Settings(model="tiny", steps=100))
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tokcredit.train.settings import (
    ChatSettings,
    CollectorSettings,
    ComparisonSettings,
    CriticSettings,
    MergeSettings,
    ObjectiveSettings,
    OptimizerSettings,
    PrivilegedSettings,
    ProbeSettings,
    ReplaySettings,
    SamplingSettings,
    Settings,
    StudySettings,
    ToolSettings,
)

__all__ = [
    "ChatSettings",
    "CollectorSettings",
    "ComparisonSettings",
    "CriticSettings",
    "MergeSettings",
    "ObjectiveSettings",
    "OptimizerSettings",
    "PrivilegedSettings",
    "ProbeSettings",
    "ReplaySettings",
    "SamplingSettings",
    "Settings",
    "StudySettings",
    "ToolSettings",
    "compare",
    "merge",
    "run",
    "study",
]


def run(settings: Settings) -> dict[str, float] | None:
    """Train as the settings say and return the summary; see :func:`tokcredit.train.experiment.run`.

    Args:
        settings: Settings of the run.

    Returns:
        Numbers by name, or None if the run was stopped before its end.
    """
    settings.objective.build()  # A wrong setting of a stage is an error before anything is loaded.
    from tokcredit.train import experiment

    return experiment.run(settings)


def compare(methods: tuple[str, ...], settings: Settings, seeds: int = 3) -> Path | None:
    """Train several methods on the same prompts; see :func:`tokcredit.train.comparison.compare`.

    Args:
        methods: Names of methods.
        settings: Settings of every run.
        seeds: Number of runs per method.

    Returns:
        The folder with the comparison, or None if it was stopped before its end.
    """
    chosen = ComparisonSettings(methods, seeds)
    for method in chosen.methods:
        dataclasses.replace(settings.objective, method=method).build()
    from tokcredit.train import comparison

    return comparison.compare(methods, settings, seeds)


def study(settings: StudySettings) -> Path | None:
    """Run what is missing of a study and write its results; see :func:`tokcredit.train.study_runs.study`.

    Args:
        settings: Which study, in which folder, and how many runs at a time.

    Returns:
        The folder, or None if the study was stopped before its end.
    """
    from tokcredit.train import study_runs

    return study_runs.study(settings)


def merge(settings: MergeSettings) -> None:
    """Write a model with its adapter in its weights; see :func:`tokcredit.train.models.merge`.

    Args:
        settings: Folders.
    """
    from tokcredit.train import models

    models.merge(settings.run, settings.output)
