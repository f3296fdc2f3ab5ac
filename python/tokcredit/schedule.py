"""Settings that change during training: schedules, which know the progress, and controllers, which read a metric.

A setting of a stage that allows it may be a schedule or a controller in place of a number. ``prepare`` replaces both by
numbers before any stage runs: schedules by ``progress``, from 0 at the first step to 1 at the last, and controllers by
the :class:`State` that the caller keeps, passes to ``prepare`` and saves in its checkpoints::

    state = tokcredit.schedule.State()
    prepared = objective.prepare(batch, progress=step / (steps - 1), state=state)
    ...
    state.observe(objective, {"kl": 0.03})      # once per step: the mean KL over its tokens, without coefficient
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokcredit.settings import Adjustable as Adjustable
from tokcredit.settings import number, whole_number


class Schedule(Adjustable):
    """A number for every ``progress`` from 0 (the first step) to 1 (the last)."""

    def __call__(self, progress: float) -> float:
        """Return the number at this progress.

        Args:
            progress: From 0 to 1.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class linear(Schedule):
    """From ``start`` at the first step to ``end`` at the last.

    Args:
        start: Number at progress 0.
        end: Number at progress 1.
    """

    start: float = number()
    end: float = number()

    def __call__(self, progress: float) -> float:
        """Return ``(1 - progress) * start + progress * end``.

        Args:
            progress: From 0 to 1.
        """
        return (1 - progress) * self.start + progress * self.end


@dataclass(frozen=True)
class cosine(Schedule):
    """From ``start`` at the first step to ``end`` at the last, along half a cosine.

    Args:
        start: Number at progress 0.
        end: Number at progress 1.
    """

    start: float = number()
    end: float = number()

    def __call__(self, progress: float) -> float:
        """Return ``end + (start - end) / 2 * (1 + cos(pi * progress))``.

        Args:
            progress: From 0 to 1.
        """
        return self.end + (self.start - self.end) / 2 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class cosine_restarts(Schedule):
    """A linear warm-up from ``start`` to ``peak``, then cosine waves from ``peak`` down to ``trough`` that restart.

    With ``s = round(progress * (steps - 1))``, the number of the step::

        start + (peak - start) * (s + 1) / warmup                                        if s < warmup
        trough + (peak - trough) / 2 * (1 + cos(pi * ((s - warmup) % period) / period))  otherwise

    Args:
        start: Number before the first step.
        peak: Number at the end of the warm-up and at each restart.
        trough: Number that each wave approaches.
        steps: Steps of the training.
        warmup: Steps of the warm-up.
        period: Steps of a wave, at least 1.

    Raises:
        ValueError: ``period`` or ``steps`` is below 1.
    """

    start: float = number()
    peak: float = number()
    trough: float = number()
    steps: int = whole_number(at_least=1)
    warmup: int = whole_number(at_least=0)
    period: int = whole_number(at_least=1)

    def __call__(self, progress: float) -> float:
        """Return the number at this progress.

        Args:
            progress: From 0 to 1.
        """
        step = round(progress * (self.steps - 1))
        if step < self.warmup:
            return self.start + (self.peak - self.start) * (step + 1) / self.warmup
        phase = (step - self.warmup) % self.period / self.period
        return self.trough + (self.peak - self.trough) / 2 * (1 + math.cos(math.pi * phase))


class Controller(Adjustable):
    """A rule that moves a number after each step, depending on a metric of that step.

    Attributes:
        metric: Name of the metric it reads: one of ``objective.loss``, or one of the host.
    """

    metric: str

    def initial(self) -> tuple[float, ...]:
        """Return the state before the first step."""
        raise NotImplementedError

    def value(self, state: tuple[float, ...]) -> float:
        """Return the number to use.

        Args:
            state: From :meth:`initial` or :meth:`updated`.
        """
        raise NotImplementedError

    def updated(self, state: tuple[float, ...], observed: float) -> tuple[float, ...]:
        """Return the state after a step.

        Args:
            state: State before the step.
            observed: Metric of the whole step, over all ranks.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class target_entropy(Controller):
    """Coefficient of an entropy bonus that is used while entropy is below a target, and moved towards it.

    After a step with mean entropy H the coefficient grows by ``delta`` if ``H <= target`` and falls by ``delta``
    otherwise, held in ``[low, high]``. The bonus of a step is on only if the entropy of the previous step was at most
    the target. It is off at the first step.

    Args:
        target: Wanted mean entropy, nats.
        delta: Change per step.
        start: Coefficient before the first step.
        low: Smallest coefficient.
        high: Largest coefficient.
        metric: Name of the metric to read.

    References:
        Skywork-OR1, arXiv 2505.22312.
    """

    target: float = number(0.2, at_least=0)
    delta: float = number(0.005, at_least=0)
    start: float = number(0.0, at_least=0)
    low: float = number(0.0, at_least=0)
    high: float = number(1.0, at_least=0)
    metric: str = "entropy_mean"

    def initial(self) -> tuple[float, ...]:
        """Return the coefficient, and an entropy above any target."""
        return self.start, math.inf

    def value(self, state: tuple[float, ...]) -> float:
        """Return the coefficient if the last entropy did not exceed the target, else 0.

        Args:
            state: Coefficient and last entropy.
        """
        return state[0] if state[1] <= self.target else 0.0

    def updated(self, state: tuple[float, ...], observed: float) -> tuple[float, ...]:
        """Return the moved coefficient and the observed entropy.

        Args:
            state: Coefficient and last entropy.
            observed: Mean entropy of the step, nats.
        """
        moved = state[0] + (self.delta if observed <= self.target else -self.delta)
        return min(max(moved, self.low), self.high), observed


@dataclass(frozen=True)
class target_kl(Controller):
    """Coefficient of a KL term that keeps the KL to the reference near a target.

    After a step with KL k over ``rows`` rows: ``value *= 1 + clip(k / target - 1, -0.2, 0.2) * rows / horizon``.

    Args:
        target: Wanted KL, nats.
        start: Coefficient before the first step.
        horizon: Rows over which the coefficient adapts.
        rows: Rows of a step.
        metric: Name of the metric to read.

    References:
        Ziegler et al., arXiv 1909.08593.
    """

    target: float = number(0.1, above=0)
    start: float = number(0.001, at_least=0)
    horizon: float = number(10_000.0, above=0)
    rows: float = number(512.0, above=0)
    metric: str = "kl"

    def initial(self) -> tuple[float, ...]:
        """Return the first coefficient."""
        return (self.start,)

    def value(self, state: tuple[float, ...]) -> float:
        """Return the coefficient.

        Args:
            state: The coefficient.
        """
        return state[0]

    def updated(self, state: tuple[float, ...], observed: float) -> tuple[float, ...]:
        """Return the moved coefficient.

        Args:
            state: The coefficient.
            observed: Mean KL of the step, nats.
        """
        error = min(max(observed / self.target - 1, -0.2), 0.2)
        return (state[0] * (1 + error * self.rows / self.horizon),)


class State:
    """The states of an objective's controllers, kept by whoever trains. It starts empty."""

    def __init__(self) -> None:
        self._of: dict[str, tuple[float, ...]] = {}

    def __call__(self, controller: Controller) -> float:
        """Return the number of a controller.

        Args:
            controller: A controller among an objective's settings. Two settings with equal controllers share one state.
        """
        return controller.value(self._of.get(repr(controller), controller.initial()))

    def observe(self, objective: Any, metrics: Mapping[str, float]) -> None:
        """Move every controller of an objective by the metrics of a step.

        Args:
            objective: The objective.
            metrics: Numbers by name, of the whole step over all ranks.

        Raises:
            ValueError: A controller's metric is missing.
        """
        for controller in {repr(x): x for x in objective.adjustables if isinstance(x, Controller)}.values():
            if controller.metric not in metrics:
                raise ValueError(
                    f"metrics: expected {controller.metric} because of {controller}, got {sorted(metrics)}"
                )
            name = repr(controller)
            before = self._of.get(name, controller.initial())
            self._of[name] = controller.updated(before, float(metrics[controller.metric]))

    def state_dict(self) -> dict[str, tuple[float, ...]]:
        """Return the states by controller, for a checkpoint."""
        return dict(self._of)

    def load_state_dict(self, state: Mapping[str, tuple[float, ...]]) -> None:
        """Take the states of a checkpoint.

        Args:
            state: From :meth:`state_dict`.
        """
        self._of = {name: tuple(values) for name, values in state.items()}


def resolver(progress: float | None, state: State | None) -> Any:
    """Return a function that gives the number of a schedule or a controller.

    Args:
        progress: From 0 to 1, or None if unknown.
        state: State of the controllers, or None.

    Raises:
        ValueError: ``progress`` is outside of ``[0, 1]``.
    """
    if progress is not None and not 0 <= progress <= 1:
        raise ValueError(f"progress: expected a number from 0 to 1, got {progress}")

    def number(x: Adjustable) -> float:
        if isinstance(x, Schedule):
            if progress is None:
                raise ValueError(f"progress: expected a number from 0 to 1 because of {x}, got None")
            return x(progress)
        if isinstance(x, Controller):
            if state is None:
                raise ValueError(f"state: expected a tokcredit.schedule.State because of {x}, got None")
            return state(x)
        raise TypeError(f"expected a schedule or a controller, got {x!r}")

    return number
