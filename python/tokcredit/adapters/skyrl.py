"""SkyRL: every method as an advantage estimator and as a policy loss, ``tokcredit_NAME`` in both registries.

SkyRL passes no settings to either, so a method with other settings gets a name of its own with :func:`register`. SkyRL
multiplies the advantages by what ``loss_reduction`` says before its workers sum the loss; that setting must be the
aggregation of the objective. Estimators read token ids inside :func:`rollouts`, which :class:`Credit`, mixed into
SkyRL's trainer, enters by itself::

    class CreditTrainer(Credit, RayPPOTrainer): ...

    class CreditExp(BasePPOExp):
        def get_trainer(self, *parts, **named):
            return CreditTrainer(*parts, **named)

Tested with SkyRL 0.3.0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from skyrl.backends.skyrl_train.utils import ppo_utils
from skyrl.train.config import AlgorithmConfig
from torch import Tensor

from tokcredit.adapters import two_phase
from tokcredit.adapters.capabilities import host_fields, policy_methods, require_defaults
from tokcredit.objective import Objective
from tokcredit.stages import aggregation

PREFIX = "tokcredit_"
FIELDS = host_fields(
    old_log_probs="action_log_probs", rollout_log_probs="rollout_logprobs", ref_log_probs="base_action_log_probs"
)
"""SkyRL's field of each input that it can carry."""
_REDUCTIONS: dict[type[aggregation.Aggregation], str] = {
    aggregation.token_mean: "token_mean",
    aggregation.sequence_mean: "sequence_mean",
    aggregation.sequence_sum: "seq_mean_token_sum_norm",
}
_CLIP = "the objective's clip stage bounds the ratio"
_DECIDED = {
    "eps_clip_low": _CLIP,
    "eps_clip_high": _CLIP,
    "clip_ratio_c": _CLIP,
    "grpo_norm_by_std": "the objective's credit stage normalizes rewards",
    "advantage_batch_normalize": "the objective's credit stage normalizes rewards",
    "gamma": "the objective's credit stage discounts",
    "lambd": "the objective's credit stage discounts",
}
_OBJECTIVES: dict[str, Objective] = {}
_BATCH: ContextVar[Mapping[str, Any] | None] = ContextVar("batch", default=None)


def register(name: str, objective: Objective) -> None:
    """Add ``tokcredit_NAME`` to SkyRL's estimators and policy losses, which SkyRL sends to its workers.

    Args:
        name: A new name.
        objective: The objective.

    Raises:
        ValueError: The name is taken.
    """
    key = PREFIX + name
    if key in _OBJECTIVES:
        raise ValueError(f"name: expected a new name, got {name!r}")
    _OBJECTIVES[key] = objective
    ppo_utils.register_advantage_estimator(key)(partial(_estimate, key, objective))
    ppo_utils.register_policy_loss(key)(partial(_loss, objective))


@contextmanager
def rollouts(batch: Mapping[str, Any]) -> Iterator[None]:
    """Let the estimators that are called inside read token ids and log-probs.

    Args:
        batch: SkyRL's training batch.
    """
    token = _BATCH.set(batch)
    try:
        yield
    finally:
        _BATCH.reset(token)


def check(config: Any) -> None:
    """Check SkyRL's configuration where it names an objective.

    Args:
        config: The configuration, with ``trainer`` and ``generator``.

    Raises:
        ValueError: SkyRL cannot carry a stage, or a setting contradicts the objective.
    """
    algorithm = config.trainer.algorithm
    estimator, loss = algorithm.advantage_estimator, algorithm.policy_loss_type
    if estimator not in _OBJECTIVES and loss not in _OBJECTIVES:
        return
    for name, value in (("advantage_estimator", estimator), ("policy_loss_type", loss)):
        if value not in _OBJECTIVES:
            raise ValueError(f"{name}: expected one of {', '.join(sorted(_OBJECTIVES))}, got {value!r}")
    require_defaults(algorithm, AlgorithmConfig, _DECIDED, "SkyRL")
    if config.generator.step_wise_trajectories:
        raise ValueError(
            "generator.step_wise_trajectories: expected False, because several rows of one trajectory are not "
            "supported yet, got True"
        )
    two_phase.advantage_part(_OBJECTIVES[estimator], "SkyRL")
    summed_part(_OBJECTIVES[loss], algorithm)


def summed_part(objective: Objective, algorithm: Any) -> Objective:
    """Return the loss part of an objective as a sum, because SkyRL has divided the advantages.

    Args:
        objective: The objective.
        algorithm: SkyRL's ``trainer.algorithm``.

    Raises:
        ValueError: ``loss_reduction`` is not the aggregation of the objective, or SkyRL cannot carry a stage.
    """
    part = two_phase.loss_part(objective, "SkyRL", "use_kl_loss")
    stage = part.aggregation
    two_phase.denominator(part, "SkyRL")
    reduction = two_phase.host_aggregation(stage, _REDUCTIONS, "SkyRL")
    if algorithm.loss_reduction != reduction:
        raise ValueError(f"loss_reduction: expected {reduction!r}, for {stage!r}, got {algorithm.loss_reduction!r}")
    if isinstance(stage, aggregation.sequence_sum) and algorithm.max_seq_len != stage.length:
        raise ValueError(f"max_seq_len: expected {stage.length}, for {stage!r}, got {algorithm.max_seq_len}")
    correction = algorithm.off_policy_correction
    if correction != type(correction)():
        raise ValueError(
            "off_policy_correction: expected SkyRL's default, because the objective's token weights correct for the "
            f"engine, got {correction!r}"
        )
    return replace(part, aggregation=aggregation.token_sum())


class Credit:
    """Mixed into SkyRL's trainer: check the configuration, and let the estimators read the rollouts.

    Args:
        cfg: SkyRL's configuration.
        arguments: As in SkyRL's trainer.
        parts: As in SkyRL's trainer.

    Raises:
        ValueError: SkyRL cannot carry a stage, or a setting contradicts the objective.
    """

    def __init__(self, cfg: Any, *arguments: Any, **parts: Any) -> None:
        check(cfg)
        super().__init__(cfg, *arguments, **parts)  # type: ignore[call-arg]

    def compute_advantages_and_returns(self, data: Any) -> Any:
        """Return SkyRL's training batch with advantages.

        Args:
            data: The training batch.
        """
        with rollouts(data):
            return super().compute_advantages_and_returns(data)  # type: ignore[misc]


def _estimate(
    key: str, objective: Objective, token_level_rewards: Tensor, response_mask: Tensor, index: Any, **host: Any
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns ``(B, T)``, right-aligned as SkyRL's responses are."""
    batch = _BATCH.get()
    if batch is None:
        raise RuntimeError(
            f"{key}: expected token ids, which SkyRL does not pass to estimators, got none; "
            "mix tokcredit.adapters.skyrl.Credit into the trainer"
        )
    for name in ("sequences", "loss_mask"):
        if batch.get(name) is None:
            raise RuntimeError(f"{name}: expected in SkyRL's batch, got {', '.join(map(str, batch.keys()))}")
    advantages = two_phase.advantages_padded(
        two_phase.advantage_part(objective, "SkyRL"),
        batch["sequences"][:, -response_mask.shape[1] :],
        response_mask,
        batch["loss_mask"],
        two_phase.group_ids(index).to(response_mask.device),
        token_level_rewards.sum(-1),
        "SkyRL",
        **{name: batch[field] for name, field in FIELDS.items() if batch.get(field) is not None},
    )
    return advantages, advantages


def _loss(
    objective: Objective,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    config: Any,
    loss_mask: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Return the sum over the tokens of a micro-batch ``(B, T)``, and metrics."""
    part = summed_part(objective, config)
    mask = torch.ones_like(advantages) if loss_mask is None else loss_mask
    out = two_phase.loss(part, log_probs, old_log_probs, advantages, mask)
    found = two_phase.metrics(out)
    clipped = sum(found.pop(f"tokcredit/clip_{side}_fraction") for side in ("low", "high", "cap"))
    return out.loss, {"clip_ratio": clipped, **found}


for _name, _method in policy_methods().items():
    register(_name, _method())
