"""verl's V1 trainers with token ids for the estimators: ``trainer.v1.trainer_mode=tokcredit_sync`` and two others.

The second ``verl.plugins`` entry point loads this module. It imports packages that verl's trainers need and that verl
does not install by itself, ``TransferQueue`` among others. ``tokcredit info`` shows whether it loaded.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import transfer_queue as tq
from omegaconf import DictConfig, OmegaConf, open_dict
from verl.trainer.ppo.v1 import PPOTrainerColocateAsync, PPOTrainerSeparateAsync, PPOTrainerSync, register_trainer

from tokcredit.adapters import two_phase
from tokcredit.adapters import verl as adapter
from tokcredit.adapters.capabilities import require
from tokcredit.objective import Objective


def checked(config: DictConfig) -> Objective | None:
    """Return the advantage part of the objective that a configuration names, or None for an estimator of verl's own.

    Args:
        config: verl's configuration.

    Raises:
        ValueError: The configuration asks for what verl cannot carry, or contradicts the objective.
    """
    actor, algorithm = config.actor_rollout_ref.actor, config.algorithm
    mode = actor.policy_loss.loss_mode
    if mode.startswith(adapter.PREFIX):
        adapter.policy_loss(mode, actor.loss_agg_mode, actor)
    if not algorithm.adv_estimator.startswith(adapter.PREFIX):
        return None
    if not mode.startswith(adapter.PREFIX):
        raise ValueError(
            f"actor.policy_loss.loss_mode: expected one of tokcredit's, as algorithm.adv_estimator is, got {mode!r}"
        )
    settings: Any = OmegaConf.to_container(algorithm.get("tokcredit") or OmegaConf.create())
    objective = adapter.estimator(algorithm.adv_estimator, settings)
    carries = {"token_rewards"} if adapter.row_settings(algorithm)[1] == "sum" else set()
    correction = algorithm.get("rollout_correction") or {}
    if not correction.get("bypass_mode", False):
        carries |= {"old_log_probs", "entropies"}
    elif rejection := correction.get("rollout_rs"):
        raise ValueError(
            "algorithm.rollout_correction.rollout_rs: expected null with bypass_mode, in which verl's trainers do not "
            f"reject, got {rejection!r}; a loss with scale.within(to='old_log_probs') does"
        )
    if config.actor_rollout_ref.rollout.calculate_log_probs:
        carries.add("rollout_log_probs")
    if actor.use_kl_loss or algorithm.use_kl_in_reward:
        carries.add("ref_log_probs")
    require(objective, carries, "verl with this configuration")
    if "rollout_log_probs" in objective.required_inputs and correction.get("rollout_is"):
        raise ValueError(
            "algorithm.rollout_correction.rollout_is: expected null, because the objective's token weights correct "
            f"for the engine, got {correction.get('rollout_is')!r}"
        )
    return objective


def fetched(batch: tq.KVBatchMeta, objective: Objective, trajectory_field: str | None = None) -> dict[str, Any]:
    """Return the arguments of :func:`tokcredit.adapters.verl.rollouts` from verl's queue.

    Args:
        batch: The batch in the queue, whose keys are ``UID_SESSION_INDEX``.
        objective: From :func:`checked`.
        trajectory_field: Field of the queue that names the trajectory of a row, whose rows are then in order. None for
            verl's session, whose rows are in the order of their index.

    Raises:
        RuntimeError: The queue lacks a field.
    """
    names = ["responses"]
    names += [field for name, field in adapter.FIELDS.items() if name in objective.required_inputs]
    wanted = names if trajectory_field is None else [*names, trajectory_field]
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=wanted)
    for name in wanted:
        if name not in data:
            raise RuntimeError(f"{name}: expected in verl's queue, got {', '.join(map(str, data.keys()))}")
    trajectories: list[Any] = [key.rsplit("_", 1)[0] for key in batch.keys]
    places: list[int] | None = [int(key.rsplit("_", 1)[1]) for key in batch.keys]
    if trajectory_field is not None:
        given = data.pop(trajectory_field)
        trajectories, places = list(given.tolist() if hasattr(given, "tolist") else given), None
    responses = data["responses"]
    lengths = responses.offsets().diff() if responses.is_nested else None
    whole = data.to_padded_tensor()
    fields = {name: whole[name] for name in names}
    width = fields["responses"].shape[1]
    if lengths is None:
        lengths = torch.full((len(batch.keys),), width)
    fields["attention_mask"] = torch.arange(width) < lengths[:, None]
    return {"fields": fields, "trajectories": trajectories, "places": places}


class Credit:
    """Mixed into a V1 trainer: check the configuration, and let the estimators read the rollouts.

    Args:
        config: verl's configuration.

    Raises:
        ValueError: The configuration asks for what verl cannot carry, or contradicts the objective.
    """

    mode: ClassVar[str]
    config: DictConfig

    def __init__(self, config: DictConfig) -> None:
        self.objective = checked(config)
        with open_dict(config):
            config.trainer.v1.trainer_mode = self.mode  # verl looks this name up and knows only its own
        super().__init__(config)  # type: ignore[call-arg]

    def _compute_advantage(self, batch: tq.KVBatchMeta, metrics: dict[str, Any]) -> tq.KVBatchMeta:
        compute = super()._compute_advantage  # type: ignore[misc]
        if self.objective is None:
            return compute(batch, metrics)
        algorithm = self.config.algorithm
        rows = fetched(batch, self.objective, adapter.row_settings(algorithm)[0])
        if len(set(rows["trajectories"])) < len(batch.keys):
            actor = self.config.actor_rollout_ref.actor
            loss = adapter.policy_loss(actor.policy_loss.loss_mode, actor.loss_agg_mode, actor)
            two_phase.require_rows_cut(loss, "verl")
        with adapter.rollouts(**rows):
            return compute(batch, metrics)


@register_trainer("tokcredit_sync")
class CreditSync(Credit, PPOTrainerSync):  # type: ignore[misc]
    """verl's synchronous trainer with token ids for the estimators."""

    mode = "sync"


@register_trainer("tokcredit_colocate_async")
class CreditColocateAsync(Credit, PPOTrainerColocateAsync):  # type: ignore[misc]
    """verl's trainer that shares its GPUs with the rollouts, with token ids for the estimators."""

    mode = "colocate_async"


@register_trainer("tokcredit_separate_async")
class CreditSeparateAsync(Credit, PPOTrainerSeparateAsync):  # type: ignore[misc]
    """verl's trainer that has other GPUs for the rollouts, with token ids for the estimators."""

    mode = "separate_async"
