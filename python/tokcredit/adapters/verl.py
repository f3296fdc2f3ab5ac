"""verl: every method as an advantage estimator and as a policy loss, ``tokcredit_NAME`` in both registries.

An entry point of the group ``verl.plugins`` loads this module in the driver and in every worker when verl is imported.
``algorithm.adv_estimator`` names the method whose credit and token weights make the advantages.
``actor.policy_loss.loss_mode`` names the method whose ratio, clip, scales and aggregation make the loss. Estimators
read token ids inside :func:`rollouts`, which the trainers of :mod:`tokcredit.adapters.verl_trainer` enter by
themselves. Tested with verl 0.9.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor
from verl.trainer.ppo import core_algos
from verl.workers.config import ActorConfig

from tokcredit.adapters import two_phase
from tokcredit.adapters.capabilities import (
    host_fields,
    policy_methods,
    require_defaults,
    with_length,
)
from tokcredit.adapters.rows import Fields, host_rows, known_rule
from tokcredit.objective import Objective
from tokcredit.stages import aggregation

PREFIX = "tokcredit_"
FIELDS = host_fields(
    old_log_probs="old_log_probs",
    rollout_log_probs="rollout_log_probs",
    ref_log_probs="ref_log_prob",
    entropies="entropy",
    squared_probs="sum_pi_squared",
)
"""verl's field of each input that it can carry."""
_MODES: dict[type[aggregation.Aggregation], str] = {
    aggregation.token_mean: "token-mean",
    aggregation.token_sum: "token-sum",
    aggregation.sequence_mean: "seq-mean-token-mean",
    aggregation.sequence_sum: "seq-mean-token-sum-norm",
}
_LOSS_STAGES = ("ratio", "clip", "scales", "aggregation", "terms")
_SETTINGS = ("clip_ratio", "clip_ratio_low", "clip_ratio_high", "clip_ratio_c", "tau_pos", "tau_neg")
_DECIDED = dict.fromkeys(_SETTINGS, "the objective's clip stage bounds the ratio")
_OBJECTIVES: dict[str, Callable[..., Objective]] = {}


class _Batch(NamedTuple):
    fields: Mapping[str, Tensor]
    trajectories: Sequence[Any] | None
    places: Sequence[int] | None


_ROLLOUTS: ContextVar[_Batch | None] = ContextVar("rollouts", default=None)


def register(name: str, objective: Callable[..., Objective]) -> None:
    """Add ``tokcredit_NAME`` to verl's estimators and policy losses, in this process.

    verl's workers take no settings of a policy loss but its name, so a method with other settings gets a name of its
    own. Call this in a module of ``VERL_USE_EXTERNAL_MODULES``, or of a ``verl.plugins`` entry point of your own.

    Args:
        name: A new name.
        objective: Function that returns the objective. ``algorithm.tokcredit`` gives its keyword arguments.

    Raises:
        ValueError: The name is taken.
    """
    key = PREFIX + name
    if key in _OBJECTIVES:
        raise ValueError(f"name: expected a new name, got {name!r}")
    _OBJECTIVES[key] = objective
    core_algos.register_adv_est(key)(partial(_estimate, key))
    core_algos.register_policy_loss(key)(partial(_loss, key))


@contextmanager
def rollouts(
    fields: Mapping[str, Tensor], trajectories: Sequence[Any] | None = None, places: Sequence[int] | None = None
) -> Iterator[None]:
    """Let the estimators that are called inside read token ids and other inputs of the batch.

    Args:
        fields: ``(B, T)`` tensors in the order of the rows: ``responses`` (token ids), ``attention_mask`` (True on real
            tokens, which come first), and other inputs under verl's names.
        trajectories: Name of the trajectory of each row, or None if each row is one.
        places: Place of each row in its trajectory, or None if the rows of each trajectory are in order.
    """
    token = _ROLLOUTS.set(_Batch(fields, trajectories, places))
    try:
        yield
    finally:
        _ROLLOUTS.reset(token)


def _made(key: str, settings: Mapping[str, Any] = MappingProxyType({})) -> Objective:
    if key not in _OBJECTIVES:
        raise ValueError(f"name: expected one of {', '.join(sorted(_OBJECTIVES))}, got {key!r}")
    return _OBJECTIVES[key](**settings)


def estimator(key: str, settings: Mapping[str, Any]) -> Objective:
    """Return the advantage part of the objective that ``algorithm.adv_estimator`` names.

    Args:
        key: The name, with its prefix.
        settings: ``algorithm.tokcredit``.

    Raises:
        ValueError: The name is unknown, verl cannot carry a stage, or a setting would not reach the loss.
    """
    objective, plain = _made(key, settings), _made(key)
    for stage in _LOSS_STAGES:
        if (ours := getattr(objective, stage)) != (named := getattr(plain, stage)):
            raise ValueError(
                f"algorithm.tokcredit: expected the {stage} of {key}, {named!r}, because verl passes no settings "
                f"to a policy loss, got {ours!r}; give it a name with tokcredit.adapters.verl.register"
            )
    return two_phase.advantage_part(objective, "verl")


def row_settings(algorithm: Mapping[str, Any]) -> tuple[str | None, str]:
    """Return the field that names the trajectory of a row, or None for verl's session, and the reward rule.

    Args:
        algorithm: verl's ``algorithm``, of which ``tokcredit_rows`` may have ``trajectory_field`` and ``reward_rule``.

    Raises:
        ValueError: A setting is unknown, or the rule is.
    """
    given = dict(algorithm.get("tokcredit_rows") or {})
    field, rule = given.pop("trajectory_field", None), given.pop("reward_rule", "same")
    if given:
        raise ValueError(
            f"algorithm.tokcredit_rows: expected trajectory_field or reward_rule, got {', '.join(map(str, given))}"
        )
    return field, known_rule(rule)


def policy_loss(key: str, loss_agg_mode: str, actor: Any) -> Objective:
    """Return the loss part of the objective that ``policy_loss.loss_mode`` names.

    Args:
        key: The name, with its prefix.
        loss_agg_mode: How verl aggregates its own terms.
        actor: Configuration of the actor.

    Raises:
        ValueError: The name is unknown, verl cannot carry a stage, or a setting contradicts the objective.
    """
    require_defaults(actor, ActorConfig, _DECIDED, "verl")
    part = two_phase.loss_part(_made(key), "verl", "use_kl_loss")
    stage = part.aggregation
    mode = two_phase.host_aggregation(stage, _MODES, "verl")
    if loss_agg_mode != mode:
        raise ValueError(f"loss_agg_mode: expected {mode!r}, for {stage!r}, got {loss_agg_mode!r}")
    if isinstance(stage, aggregation.sequence_sum):
        given = actor.loss_scale_factor
        if given is None or given != int(given) or stage.length not in (None, given):
            expected = stage.length or "the number of tokens of the longest possible response"
            raise ValueError(f"loss_scale_factor: expected {expected}, for {stage!r}, got {given}")
        part = replace(part, aggregation=with_length(stage, int(given)))
    return part


def _estimate(
    key: str,
    token_level_rewards: Tensor,
    response_mask: Tensor,
    config: Any = None,
    index: Any = None,
    reward_baselines: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns ``(B, T)``."""
    batch = _ROLLOUTS.get()
    if batch is None:
        raise RuntimeError(
            f"{key}: expected token ids, which verl does not pass to estimators, got none; "
            "set trainer.v1.trainer_mode=tokcredit_sync (or tokcredit_colocate_async, tokcredit_separate_async)"
        )
    if index is None:
        raise ValueError("uid: expected the prompt of each row in the batch, got None")
    settings = config or {}
    objective = estimator(key, dict(settings.get("tokcredit") or {}))
    field, rule = row_settings(settings)
    prompts, fields = list(map(str, index)), batch.fields
    trajectories = range(len(prompts)) if batch.trajectories is None else batch.trajectories
    names = Fields(field or "session", "uid", "token_level_rewards", "index")
    advantages = two_phase.advantages_padded(
        objective,
        fields["responses"],
        fields["attention_mask"],
        response_mask,
        two_phase.group_ids(prompts),
        host_rows(trajectories, prompts, token_level_rewards, response_mask, rule, names, batch.places),
        "verl",
        **{name: fields[field] for name, field in FIELDS.items() if field in fields},
    )
    return advantages, advantages


def _loss(
    key: str,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: ActorConfig | None = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Return the loss of a micro-batch ``(B, T)`` with the denominators of its mini-batch, and metrics."""
    if config is None:
        raise ValueError("config: expected an ActorConfig, got None")
    part = policy_loss(key, loss_agg_mode, config)
    denominators = {name: value for name, value in config.global_batch_info.items() if name != "loss_scale_factor"}
    out = two_phase.loss(
        part, log_prob, old_log_prob, advantages, response_mask, weights=rollout_is_weights, **denominators
    )
    metrics = two_phase.metrics(out)
    low, high, cap = (metrics.pop(f"tokcredit/clip_{side}_fraction") for side in ("low", "high", "cap"))
    return out.loss, {"actor/pg_clipfrac": low + high, "actor/pg_clipfrac_lower": cap, **metrics}


def registered() -> dict[str, str]:
    """Return what verl knows of tokcredit in this process, by kind, and why a plugin did not load, by plugin."""
    known = {
        "estimators": core_algos.ADV_ESTIMATOR_REGISTRY,
        "policy losses": core_algos.POLICY_LOSS_REGISTRY,
    }
    out = {}
    for plugin in entry_points(group="verl.plugins"):
        if plugin.value.startswith("tokcredit."):
            try:
                plugin.load()
            except Exception as error:  # verl ignores it silently, whatever it is
                out[plugin.name] = f"failed to load: {error!r}"
    try:
        from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

        known["trainers"] = TRAINER_REGISTRY
    except ImportError as error:
        out["trainers"] = f"failed to load: {error!r}"
    for kind, registry in known.items():
        out[kind] = ", ".join(sorted(name for name in map(str, registry) if name.startswith(PREFIX))) or "none"
    return out


for _name, _method in policy_methods().items():
    register(_name, _method)
