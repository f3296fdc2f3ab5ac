"""verl: every method as an advantage estimator and as a policy loss, ``tokcredit_NAME`` in both registries.

An entry point of the group ``verl.plugins`` loads this module in the driver and in every worker when verl is imported.
``algorithm.adv_estimator`` picks the credit and weights stages, ``actor.policy_loss.loss_mode`` ratio, clip and
aggregation. Estimators see token ids under :func:`rollouts`, which the trainers of
:mod:`tokcredit.adapters.verl_trainer` enter by themselves. Tested with verl 0.9.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from verl.trainer.ppo import core_algos
from verl.workers.config import ActorConfig

from tokcredit import methods
from tokcredit.stages import aggregation
from tokcredit.adapters import split
from tokcredit.adapters.capabilities import require, untouched
from tokcredit.inputs import FIELDS
from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts

PREFIX = "tokcredit_"
# What an objective may read, and the name of the field in verl.
EVIDENCE = {
    "old_log_probs": "old_log_probs",
    "rollout_log_probs": "rollout_log_probs",
    "ref_log_probs": "ref_log_prob",
    "entropies": "entropy",
    "squared_probs": "sum_pi_squared",
}
_MODES: dict[type, str] = {
    aggregation.token_mean: "token-mean",
    aggregation.token_sum: "token-sum",
    aggregation.sequence_mean: "seq-mean-token-mean",
    aggregation.sequence_sum: "seq-mean-token-sum-norm",
}
_SETTINGS = ("clip_ratio", "clip_ratio_low", "clip_ratio_high", "clip_ratio_c", "tau_pos", "tau_neg")
_DECIDED = dict.fromkeys(_SETTINGS, "the objective's clip stage bounds the ratio")
_OBJECTIVES: dict[str, Callable[..., Objective]] = {}
_ROLLOUTS: ContextVar[Mapping[str, Tensor] | None] = ContextVar("rollouts", default=None)


def register(name: str, objective: Callable[..., Objective]) -> None:
    """Adds ``tokcredit_NAME`` to verl's estimators and policy losses, in this process.

    verl's workers take no settings of a policy loss beyond its name, so a method with other settings is a name of its
    own: call this in a module of ``VERL_USE_EXTERNAL_MODULES`` or of your own ``verl.plugins`` entry point.

    Args:
        name: what follows ``tokcredit_``.
        objective: makes the objective; ``algorithm.tokcredit`` are its keyword arguments.
    """
    key = PREFIX + name
    if key in _OBJECTIVES:
        raise ValueError(f"name: expected a new one, got {name!r}")
    _OBJECTIVES[key] = objective
    core_algos.register_adv_est(key)(partial(_estimate, key))
    core_algos.register_policy_loss(key)(partial(_loss, key))


@contextmanager
def rollouts(fields: Mapping[str, Tensor]) -> Iterator[None]:
    """Lets the estimators called inside read token ids and other evidence of the batch they are called on.

    Args:
        fields: ``responses`` (token ids) and ``attention_mask`` (True on real tokens, which come first), ``(B, T)`` in
            the rows' order, and whatever else the objective reads, under verl's names.
    """
    token = _ROLLOUTS.set(fields)
    try:
        yield
    finally:
        _ROLLOUTS.reset(token)


def _made(key: str, settings: Mapping[str, Any] = MappingProxyType({})) -> Objective:
    if key not in _OBJECTIVES:
        raise ValueError(f"name: expected one of {', '.join(sorted(_OBJECTIVES))}, got {key!r}")
    return _OBJECTIVES[key](**settings)


def estimator(key: str, settings: Mapping[str, Any]) -> Objective:
    """The objective behind ``algorithm.adv_estimator``, checked.

    Raises:
        ValueError: the name is unknown, a stage cannot be carried, or a setting would not reach the loss.
    """
    objective, plain = _made(key, settings), _made(key)
    for stage in ("ratio", "clip", "gain", "aggregation", "kl"):
        if (ours := getattr(objective, stage)) != (named := getattr(plain, stage)):
            raise ValueError(
                f"algorithm.tokcredit: expected the {stage} stage of {key}, {named!r}, because verl passes no settings "
                f"to a policy loss, got {ours!r}; give it a name with tokcredit.adapters.verl.register"
            )
    return split.payer(objective, "verl")


def loss(key: str, loss_agg_mode: str, actor: Any) -> Objective:
    """The objective behind ``policy_loss.loss_mode``, checked; its credit and weights are those that verl passes.

    Args:
        key: the name.
        loss_agg_mode: how verl aggregates its own terms.
        actor: the actor's configuration.

    Raises:
        ValueError: a stage cannot be carried, or a setting contradicts the objective.
    """
    untouched(actor, ActorConfig, _DECIDED, "verl")
    objective = split.surrogate(_made(key), "verl", "use_kl_loss")
    mode = _MODES[type(objective.aggregation)]
    if loss_agg_mode != mode:
        raise ValueError(f"loss_agg_mode: expected {mode!r}, for {objective.aggregation!r}, got {loss_agg_mode!r}")
    if isinstance(objective.aggregation, aggregation.sequence_sum):
        length = objective.aggregation.length or actor.loss_scale_factor
        if length is None or actor.loss_scale_factor != length:
            expected = length or "the longest response possible"
            raise ValueError(f"loss_scale_factor: expected {expected}, got {actor.loss_scale_factor}")
        objective = replace(objective, aggregation=aggregation.sequence_sum(int(length)))
    return objective


def _estimate(
    key: str,
    token_level_rewards: Tensor,
    response_mask: Tensor,
    config: Any = None,
    index: Any = None,
    reward_baselines: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns ``(B, T)``: what the credit and weights stages pay each token."""
    batch = _ROLLOUTS.get()
    if batch is None:
        raise RuntimeError(
            f"{key}: expected token ids, which verl keeps from estimators, got none; "
            "set trainer.v1.trainer_mode=tokcredit_sync (or tokcredit_colocate_async, tokcredit_separate_async)"
        )
    if index is None:
        raise ValueError("uid: expected the prompt of each row in the batch, got None")
    objective = estimator(key, dict((config or {}).get("tokcredit") or {}))
    carried = {name: batch[field] for name, field in EVIDENCE.items() if field in batch}
    require(objective, set(carried), "this batch")
    fields: Any = {name: carried.pop(name) for name in FIELDS if name in carried}
    data = Rollouts.from_padded(
        batch["responses"],
        response_mask,
        torch.from_numpy(np.unique(np.asarray(index).astype(str), return_inverse=True)[1]),
        token_level_rewards.sum(-1),
        batch["attention_mask"],
        extras=carried,
        **fields,
    )
    paid = split.pay(objective, data, "verl")
    return paid, paid


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
    """Loss of a micro-batch ``(B, T)``, with the denominators of its mini-batch, and metrics averaged by verl."""
    if config is None:
        raise ValueError("config: expected an ActorConfig, got None")
    objective = loss(key, loss_agg_mode, config)
    denominators = {name: value for name, value in config.global_batch_info.items() if name != "loss_scale_factor"}
    out = split.evaluate(
        objective, log_prob, old_log_prob, advantages, response_mask, weights=rollout_is_weights, **denominators
    )
    metrics = split.metrics(out)
    below, above, capped = (metrics.pop(f"tokcredit/clip_{side}") for side in ("low", "high", "cap"))
    return out.loss, {"actor/pg_clipfrac": below + above, "actor/pg_clipfrac_lower": capped, **metrics}


def registered() -> dict[str, str]:
    """What verl knows of tokcredit in this process, by kind; for each plugin that failed to load, the reason."""
    known = {
        "estimators": core_algos.ADV_ESTIMATOR_REGISTRY,
        "policy losses": core_algos.POLICY_LOSS_REGISTRY,
    }
    out = {}
    for plugin in entry_points(group="verl.plugins"):
        if plugin.value.startswith("tokcredit."):
            try:
                plugin.load()
            except Exception as error:  # verl drops it without a word, whatever it is
                out[plugin.name] = f"failed to load: {error!r}"
    try:
        from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

        known["trainers"] = TRAINER_REGISTRY
    except ImportError as error:
        out["trainers"] = f"failed to load: {error!r}"
    for kind, registry in known.items():
        out[kind] = ", ".join(sorted(name for name in map(str, registry) if name.startswith(PREFIX))) or "none"
    return out


for _name in methods.names():
    register(_name, getattr(methods, _name))
