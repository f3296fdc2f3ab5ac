"""The learning rate of each step."""

from __future__ import annotations

import math

from tokcredit.train.settings import OptimizerSettings


def learning_rate(settings: OptimizerSettings, number: int, steps: int) -> float:
    """Return the learning rate of a step. It rises over the warm-up, then stays, or falls to 0 after the last step.

    Args:
        settings: Settings of the optimizer.
        number: Number of the step, from 1.
        steps: Number of steps of the run.
    """
    if number <= settings.warmup:
        return settings.lr * number / settings.warmup
    left = (steps - number + 1) / max(steps - settings.warmup, 1)
    factor = {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}[settings.schedule]
    return settings.lr * factor
