"""Numbers that change during training.

A setting of a stage choice may be a schedule in place of a number. The host passes ``progress``, 0 at the first step
and 1 at the last, to :meth:`~tokcredit.objective.Objective.prepare`; before any stage runs, schedules become numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


class Schedule:
    """A number for every ``progress`` from 0 (the first step) to 1 (the last)."""

    def __call__(self, progress: float) -> float:
        raise NotImplementedError


@dataclass(frozen=True)
class linear(Schedule):
    """From ``start`` at the first step to ``end`` at the last."""

    start: float
    end: float

    def __call__(self, progress: float) -> float:
        return (1 - progress) * self.start + progress * self.end


@dataclass(frozen=True)
class cosine_restarts(Schedule):
    """A linear rise (or fall) to ``peak``, then cosine waves from ``peak`` to ``trough`` that jump back.

    With ``s = round(progress * (steps - 1))``, the step: ``start + (peak - start) (s + 1) / warmup`` while it is below
    warmup, then ``trough + (peak - trough) / 2 (1 + cos(pi ((s - warmup) mod period) / period))``.
    """

    start: float
    peak: float
    trough: float
    steps: int
    warmup: int
    period: int

    def __call__(self, progress: float) -> float:
        step = round(progress * (self.steps - 1))
        if step < self.warmup:
            return self.start + (self.peak - self.start) * (step + 1) / self.warmup
        phase = (step - self.warmup) % self.period / self.period
        return self.trough + (self.peak - self.trough) / 2 * (1 + math.cos(math.pi * phase))


def number(x: float | Schedule) -> float:
    """The setting as a number.

    Raises:
        ValueError: it is a schedule, and nobody said how far training is.
    """
    if isinstance(x, Schedule):
        raise ValueError(f"progress: expected a number from 0 to 1 because of {x}, got None")
    return float(x)
