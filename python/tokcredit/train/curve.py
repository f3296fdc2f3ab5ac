"""Which metrics the learning curve of a run shows."""

from __future__ import annotations

from typing import NamedTuple

from tokcredit.train.settings import Settings


class Curve(NamedTuple):
    """Which metrics a learning curve shows.

    Attributes:
        training: Metric of every step.
        held_out: Metric of the steps that measure.
        titles: What the two are called.
        higher: Whether more of the held-out metric is better.
        together: Whether both are the same quantity, and have one axis.
    """

    training: str
    held_out: str
    titles: tuple[str, str]
    higher: bool
    together: bool


REWARDS = Curve("reward_mean", "held_out_reward_mean", ("reward of the rollouts", "held-out reward"), True, True)
PAIRS = Curve("loss", "held_out_accuracy_mean", ("loss", "held-out accuracy"), True, False)
COMPLETIONS = Curve("loss", "held_out_loss", ("loss", "held-out loss"), False, True)


def curve_of(settings: Settings) -> Curve:
    """Return the learning curve of a run.

    Args:
        settings: Its settings.
    """
    return PAIRS if settings.pairs else COMPLETIONS if settings.completions else REWARDS
