"""SkyRL: every method as an advantage estimator and as a policy loss, ``tokcredit_NAME`` in both registries.

SkyRL passes settings of neither, so a method with other settings is a name of its own: :func:`register`. It folds
``loss_reduction`` into the advantages before its workers sum the loss, and that must be what the objective does.
Estimators see token ids under :func:`rollouts`, which :class:`Credit`, mixed into SkyRL's trainer, enters by itself::

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

from tokcredit import methods
from tokcredit.stages import aggregation
from tokcredit.adapters import split
from tokcredit.adapters.capabilities import untouched
from tokcredit.objective import Objective

PREFIX = "tokcredit_"
EVIDENCE = {
    "old_log_probs": "action_log_probs",
    "rollout_log_probs": "rollout_logprobs",
    "ref_log_probs": "base_action_log_probs",
}
_REDUCTIONS: dict[type, str] = {
    aggregation.token_mean: "token_mean",
    aggregation.sequence_mean: "sequence_mean",
    aggregation.sequence_sum: "seq_mean_token_sum_norm",
}
_CLIP = "the objective's clip stage bounds the ratio"
_DECIDED = {
    "eps_clip_low": _CLIP,
    "eps_clip_high": _CLIP,
    "clip_ratio_c": _CLIP,
    "grpo_norm_by_std": "the objective's credit stage scales rewards",
    "advantage_batch_normalize": "the objective's credit stage scales rewards",
    "gamma": "the objective's credit stage discounts",
    "lambd": "the objective's credit stage discounts",
}
_OBJECTIVES: dict[str, Objective] = {}
_BATCH: ContextVar[Mapping[str, Any] | None] = ContextVar("batch", default=None)


def register(name: str, objective: Objective) -> None:
    """Adds ``tokcredit_NAME`` to SkyRL's estimators and policy losses; SkyRL hands both to its workers.

    Raises:
        ValueError: the name is taken.
    """
    key = PREFIX + name
    if key in _OBJECTIVES:
        raise ValueError(f"name: expected a new one, got {name!r}")
    _OBJECTIVES[key] = objective
    ppo_utils.register_advantage_estimator(key)(partial(_estimate, key, objective))
    ppo_utils.register_policy_loss(key)(partial(_loss, objective))


@contextmanager
def rollouts(batch: Mapping[str, Any]) -> Iterator[None]:
    """Lets the estimators called inside read token ids and log-probs of SkyRL's training batch."""
    token = _BATCH.set(batch)
    try:
        yield
    finally:
        _BATCH.reset(token)


def checked(config: Any) -> None:
    """Checks ``trainer`` and ``generator`` of SkyRL's configuration, where it names an objective.

    Raises:
        ValueError: a stage cannot be carried, or a setting contradicts the objective.
    """
    algorithm = config.trainer.algorithm
    estimator, loss = algorithm.advantage_estimator, algorithm.policy_loss_type
    if estimator not in _OBJECTIVES and loss not in _OBJECTIVES:
        return
    for name, value in (("advantage_estimator", estimator), ("policy_loss_type", loss)):
        if value not in _OBJECTIVES:
            raise ValueError(f"{name}: expected one of {', '.join(sorted(_OBJECTIVES))}, got {value!r}")
    untouched(algorithm, AlgorithmConfig, _DECIDED, "SkyRL")
    if config.generator.step_wise_trajectories:
        raise ValueError("generator.step_wise_trajectories: expected False, because a row is a rollout, got True")
    split.payer(_OBJECTIVES[estimator], "SkyRL")
    reduced(_OBJECTIVES[loss], algorithm)


def reduced(objective: Objective, algorithm: Any) -> Objective:
    """The objective that sums what SkyRL's ``loss_reduction`` has scaled.

    Raises:
        ValueError: the reduction is not the objective's, or a stage cannot be carried.
    """
    objective = split.surrogate(objective, "SkyRL", "use_kl_loss")
    aggregate = objective.aggregation
    split.counted(objective, "SkyRL")
    reduction = _REDUCTIONS[type(aggregate)]
    if algorithm.loss_reduction != reduction:
        raise ValueError(f"loss_reduction: expected {reduction!r}, for {aggregate!r}, got {algorithm.loss_reduction!r}")
    if isinstance(aggregate, aggregation.sequence_sum) and algorithm.max_seq_len != aggregate.length:
        raise ValueError(f"max_seq_len: expected {aggregate.length}, for {aggregate!r}, got {algorithm.max_seq_len}")
    correction = algorithm.off_policy_correction
    if correction != type(correction)():
        raise ValueError(
            f"off_policy_correction: expected SkyRL's default, because a weights stage corrects for the engine, "
            f"got {correction!r}"
        )
    return replace(objective, aggregation=aggregation.token_sum())


class Credit:
    """Mixed into SkyRL's trainer: checks the configuration, and gives the estimators the rollouts."""

    def __init__(self, cfg: Any, *arguments: Any, **parts: Any) -> None:
        checked(cfg)
        super().__init__(cfg, *arguments, **parts)  # type: ignore[call-arg]

    def compute_advantages_and_returns(self, data: Any) -> Any:
        with rollouts(data):
            return super().compute_advantages_and_returns(data)  # type: ignore[misc]


def _estimate(
    key: str, objective: Objective, token_level_rewards: Tensor, response_mask: Tensor, index: Any, **host: Any
) -> tuple[Tensor, Tensor]:
    """Advantages and returns ``(B, T)``, right-aligned as SkyRL's responses are."""
    batch = _BATCH.get()
    if batch is None:
        raise RuntimeError(
            f"{key}: expected token ids, which SkyRL keeps from estimators, got none; "
            "mix tokcredit.adapters.skyrl.Credit into the trainer"
        )
    for name in ("sequences", "loss_mask"):
        if batch.get(name) is None:
            raise RuntimeError(f"{name}: expected in SkyRL's batch, got {', '.join(map(str, batch.keys()))}")
    paid = split.pay_padded(
        split.payer(objective, "SkyRL"),
        batch["sequences"][:, -response_mask.shape[1] :],
        response_mask,
        batch["loss_mask"],
        split.numbered(index).to(response_mask.device),
        token_level_rewards.sum(-1),
        "SkyRL",
        **{name: batch[field] for name, field in EVIDENCE.items() if batch.get(field) is not None},
    )
    return paid, paid


def _loss(
    objective: Objective,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    config: Any,
    loss_mask: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Sum over the tokens of a micro-batch ``(B, T)``, and metrics."""
    objective = reduced(objective, config)
    mask = torch.ones_like(advantages) if loss_mask is None else loss_mask
    out = split.evaluate(objective, log_probs, old_log_probs, advantages, mask)
    found = split.metrics(out)
    sides = [found.pop(f"tokcredit/clip_{side}") for side in ("low", "high", "cap")]
    return out.loss, {"clip_ratio": sum(sides), **found}


for _name in methods.names():
    register(_name, methods.load(_name))
