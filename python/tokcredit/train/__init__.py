"""A thin GRPO-style trainer for causal language models: any method, any verifiable task.

Needs ``pip install "tokcredit[train]"``. From Python::

    from tokcredit.train import Settings, run

    summary = run(Settings(model="tiny", steps=100))
"""

from __future__ import annotations

from pathlib import Path

from tokcredit.train.settings import (
    ObjectiveSettings,
    OptimizerSettings,
    ProbeSettings,
    ReplaySettings,
    SamplingSettings,
    Settings,
    ToolSettings,
)

__all__ = [
    "ObjectiveSettings",
    "OptimizerSettings",
    "ProbeSettings",
    "ReplaySettings",
    "SamplingSettings",
    "Settings",
    "ToolSettings",
    "compare",
    "run",
]


def run(settings: Settings) -> dict[str, float] | None:
    """As :func:`tokcredit.train.experiment.run`."""
    from tokcredit.train import experiment

    return experiment.run(settings)


def compare(methods: tuple[str, ...], settings: Settings, seeds: int = 3) -> Path | None:
    """As :func:`tokcredit.train.comparison.compare`."""
    from tokcredit.train import comparison

    return comparison.compare(methods, settings, seeds)
