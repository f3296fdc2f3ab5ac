"""What a host trainer carries, what an objective requires of it, and the errors where the two do not fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass, fields
from types import MappingProxyType
from typing import Any, TypeVar

from torch import Tensor

from tokcredit import inputs, methods
from tokcredit.objective import Objective
from tokcredit.preference import Preference
from tokcredit.rollouts import FIELDS, Rollouts
from tokcredit.schedule import Schedule
from tokcredit.stages.aggregation import Aggregation
from tokcredit.stages.base import Stage, input_name
from tokcredit.stages.credit import Credit
from tokcredit.stages.token_weights import TokenWeight
from tokcredit.supervised import Supervised

T = TypeVar("T", Objective, Preference, Supervised)


@dataclass(frozen=True)
class given_advantages(Credit):
    """Advantages that the host passes on.

    Args:
        name: Input with the advantages.
    """

    name: str = input_name("advantages")

    @property
    def required_inputs(self) -> frozenset[str]:
        """The named input."""
        return frozenset({self.name})

    def __call__(self, batch: Rollouts) -> Tensor:
        """Return the named input.

        Args:
            batch: The rollouts.
        """
        return batch.input(self.name)


@dataclass(frozen=True)
class given_weights(TokenWeight):
    """Token weights that the host computed.

    Args:
        name: Input with the weights.
    """

    name: str = input_name("weights")

    @property
    def required_inputs(self) -> frozenset[str]:
        """The named input."""
        return frozenset({self.name})

    def __call__(self, batch: Rollouts, advantages: Tensor) -> Tensor:
        """Return the named input.

        Args:
            batch: The rollouts.
            advantages: Not used.
        """
        return batch.input(self.name)


def host_fields(**names: str) -> Mapping[str, str]:
    """Return the host's field of each input that it can carry.

    Args:
        names: Name of the host's field, by name of a registered input.

    Raises:
        ValueError: An input is not registered.
    """
    for name in names:
        inputs.get(name)
    return MappingProxyType(names)


def arguments(named: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return named inputs as keyword arguments of :class:`~tokcredit.Rollouts`.

    Args:
        named: Inputs by name.
    """
    own: dict[str, Any] = {name: x for name, x in named.items() if name in FIELDS}
    return own | {"extras": {name: x for name, x in named.items() if name not in FIELDS}}


def policy_methods() -> dict[str, Callable[..., Objective]]:
    """Return the published methods that are policy-gradient objectives: the function of each, by name."""
    functions = {name: getattr(methods, name) for name in methods.names()}
    return {name: function for name, function in functions.items() if isinstance(function(), Objective)}


def chosen(method: str | None, objective: Objective | None) -> Objective:
    """Return the objective that is given directly or by the name of a method.

    Args:
        method: Name of a published method, or None.
        objective: An objective, or None.

    Raises:
        TypeError: Both are given, or neither, or it is not a policy-gradient objective.
        ValueError: There is no such method.
    """
    return chosen_of(Objective, method, objective)


def chosen_of(kind: type[T], method: str | None, objective: T | None) -> T:
    """Return the objective of one kind that is given directly or by the name of a method.

    Args:
        kind: Class of the objective.
        method: Name of a published method, or None.
        objective: An objective, or None.

    Raises:
        TypeError: Both are given, or neither, or it is of another kind.
        ValueError: There is no such method.
    """
    if (method is None) == (objective is None):
        raise TypeError(
            f"method, objective: expected exactly one of them, got {'neither' if method is None else 'both'}"
        )
    found = methods.load(method) if method is not None else objective
    if not isinstance(found, kind):
        raise TypeError(f"objective: expected a tokcredit.{kind.__name__}, got {found!r}")
    return found


def require_inputs(objective: Preference | Supervised, carries: Collection[str], host: str) -> None:
    """Check that a host carries everything that a preference or supervised objective reads, and passes log-probs only.

    Args:
        objective: The objective.
        carries: Names of the inputs that the host carries.
        host: Name of the host for the error.

    Raises:
        ValueError: It reads another input, or differentiates something else than log-probs.
    """
    if missing := sorted(objective.required_inputs - set(carries)):
        raise ValueError(
            f"objective: expected one that reads no more inputs than {host} carries "
            f"({', '.join(sorted(carries)) or 'none'}), got {objective!r}, which requires {', '.join(missing)}"
        )
    if objective.variables != ("log_probs",):
        raise ValueError(
            f"objective: expected one that differentiates log_probs only, because {host} passes nothing else to the "
            f"loss, got {objective!r}, which differentiates {', '.join(objective.variables)}"
        )


def require(
    objective: Objective, carries: Collection[str], host: str, variables: Collection[str] = ("log_probs",)
) -> None:
    """Check that a host carries everything that an objective reads.

    Args:
        objective: The objective.
        carries: Names of the inputs that the host carries.
        host: Name of the host for the error.
        variables: What the host passes to the loss.

    Raises:
        ValueError: A stage reads an input that the host does not carry, or differentiates what it does not pass to the
            loss. The message names the stage.
    """
    for term in objective.terms:
        if further := term.variables - set(variables):
            raise ValueError(
                f"objective: expected terms that differentiate {', '.join(variables)} only, because {host} passes "
                f"nothing else to the loss, got {term!r}, which differentiates {', '.join(sorted(further))}"
            )
    for setting in fields(objective):
        value = getattr(objective, setting.name)
        for stage in value if isinstance(value, tuple) else (value,):
            for name in sorted(stage.required_inputs - set(carries)):
                raise ValueError(
                    f"objective: expected a {stage.kind} stage that reads no more inputs than {host} carries "
                    f"({', '.join(sorted(carries)) or 'none'}), got {stage!r}, which requires {name}"
                )


def require_independent_rows(objective: Objective, host: str) -> None:
    """Check that an objective does not need whole groups in every micro-batch.

    Args:
        objective: The objective.
        host: Name of the host for the error.

    Raises:
        ValueError: A scale compares the rows of a group.
    """
    for stage in objective.scales:
        if stage.couples_rows:
            raise ValueError(
                f"objective: expected scales that do not compare the rows of a group, because {host} cuts its "
                f"micro-batches without regard to groups, got {stage!r}"
            )


def require_constant(objective: Stage, host: str, *, schedules: bool = False) -> None:
    """Check that no setting of an objective changes in a way that a host cannot follow.

    Args:
        objective: The objective.
        host: Name of the host for the error.
        schedules: Whether the host knows the progress of training, so that schedules are allowed.

    Raises:
        ValueError: A setting is a schedule or a controller.
    """
    for setting in objective.adjustables:
        if isinstance(setting, Schedule):
            if not schedules:
                raise ValueError(
                    f"objective: expected constant settings, because {host} does not pass on the progress of training, "
                    f"got {setting!r}"
                )
        else:
            raise ValueError(
                f"objective: expected no controller, because {host} does not keep its state, got {setting!r}"
            )


def require_defaults(settings: Any, kind: type, decided: Mapping[str, str], host: str) -> None:
    """Check that the settings of a host have their defaults where the objective decides.

    Args:
        settings: Configuration of the host.
        kind: The dataclass that holds the defaults.
        decided: The reason by name of setting. Names that this version of the host does not have are skipped.
        host: Name of the host for the error.

    Raises:
        ValueError: A setting was changed that would have no effect.
    """
    for setting in fields(kind):
        if setting.name not in decided:
            continue
        default = setting.default if setting.default_factory is MISSING else setting.default_factory()
        if (value := getattr(settings, setting.name)) != default:
            raise ValueError(
                f"{setting.name}: expected {host}'s default {default!r}, because {decided[setting.name]}, got {value!r}"
            )


def with_length(aggregation: Aggregation, length: int) -> Aggregation:
    """Return an aggregation with ``length`` in place of the width of the batch, if it depends on that.

    Args:
        aggregation: The aggregation.
        length: Tokens of the longest response that the host allows.
    """
    return dataclasses.replace(aggregation, length=length) if aggregation.reads_width else aggregation  # type: ignore[type-var]
