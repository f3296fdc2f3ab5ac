"""SkyRL: every method as an advantage estimator and as a policy loss, ``tokcredit_NAME`` in both registries.

SkyRL passes no settings to either, so a method with other settings gets a name of its own with :func:`register`. SkyRL
multiplies the advantages by what ``loss_reduction`` says before its workers sum the loss; that setting must be the
aggregation of the objective. Estimators read token ids inside :func:`rollouts`, which :class:`Credit`, mixed into
SkyRL's trainer, enters by itself::

    class CreditTrainer(Credit, RayPPOTrainer): ...

    class CreditExp(BasePPOExp):
        def get_trainer(self, *parts, **named):
            return CreditTrainer(*parts, **named)

With ``generator.step_wise_trajectories`` the rows up to a last step are one trajectory. SkyRL reads the reward of the
last row only, which is ``reward_rule = "last"`` of the trainer; ``"sum"`` reads the rewards of all rows and tokens.
Tested with SkyRL 0.3.0.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from skyrl.backends.skyrl_train.utils import ppo_utils
from skyrl.train.config import AlgorithmConfig
from torch import Tensor

from tokcredit.adapters import two_phase
from tokcredit.adapters.capabilities import host_fields, policy_methods, require_defaults
from tokcredit.adapters.rows import Fields, host_rows, known_rule
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
_ROWS = Fields("trajectory", "uids", "rewards")
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
_BATCH: ContextVar[tuple[Any, str, Sequence[bool] | None] | None] = ContextVar("batch", default=None)


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
def rollouts(batch: Any, rule: str = "last", is_last_step: Sequence[bool] | None = None) -> Iterator[None]:
    """Let the estimators that are called inside read token ids and log-probs.

    Args:
        batch: SkyRL's training batch.
        rule: What the reward of a row is; see :func:`tokcredit.adapters.rows.host_rows`.
        is_last_step: Whether the trajectory of each row ends with it, or None if each row is a trajectory.

    Raises:
        ValueError: There is no such rule.
    """
    token = _BATCH.set((batch, known_rule(rule), is_last_step))
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
    two_phase.advantage_part(_OBJECTIVES[estimator], "SkyRL")
    summed_part(_OBJECTIVES[loss], algorithm)
    if config.generator.step_wise_trajectories:
        two_phase.require_rows_cut(two_phase.loss_part(_OBJECTIVES[loss], "SkyRL", "use_kl_loss"), "SkyRL")


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

    Attributes:
        reward_rule: What the reward of a row is; see :func:`tokcredit.adapters.rows.host_rows`.

    Raises:
        ValueError: SkyRL cannot carry a stage, or a setting contradicts the objective.
    """

    reward_rule: ClassVar[str] = "last"
    cfg: Any
    all_metrics: dict[str, Any]

    def __init__(self, cfg: Any, *arguments: Any, **parts: Any) -> None:
        known_rule(self.reward_rule)
        check(cfg)
        super().__init__(cfg, *arguments, **parts)  # type: ignore[call-arg]

    def compute_advantages_and_returns(self, data: Any) -> Any:
        """Return SkyRL's training batch with advantages.

        Args:
            data: The training batch.
        """
        step_wise = self.cfg.generator.step_wise_trajectories
        with rollouts(data, self.reward_rule, data.metadata["is_last_step"] if step_wise else None):
            if not step_wise or self.cfg.trainer.algorithm.advantage_estimator not in _OBJECTIVES:
                return super().compute_advantages_and_returns(data)  # type: ignore[misc]
            # SkyRL passes estimators the last rows only, and copies one advantage to the others.
            cfg = self.cfg
            self.cfg = copy.copy(cfg)
            self.cfg.generator = copy.copy(cfg.generator)
            self.cfg.generator.step_wise_trajectories = False
            try:
                data = super().compute_advantages_and_returns(data)  # type: ignore[misc]
            finally:
                self.cfg = cfg
        rows = len(data["rewards"]) - data.metadata.get("pad_size", 0)
        last = torch.tensor(data.metadata["is_last_step"][:rows])
        mean = data["rewards"][:rows].sum(-1)[last].mean().item()
        data.metadata["metrics"]["avg_final_rewards"] = self.all_metrics["loss/avg_final_rewards"] = mean
        return data


def _trajectories(is_last_step: Sequence[bool] | None, rows: int) -> list[int]:
    """Return the trajectory of each row, which ends with a last step."""
    if is_last_step is None:
        return list(range(rows))
    if len(is_last_step) != rows or (rows and not is_last_step[-1]):
        raise ValueError(
            f"is_last_step: expected one for each of {rows} rows, True in the last one, got {len(is_last_step)}, "
            f"{is_last_step[-1] if is_last_step else None} in the last one"
        )
    return np.cumsum([False, *is_last_step[:-1]])[:rows].tolist()


def _estimate(
    key: str, objective: Objective, token_level_rewards: Tensor, response_mask: Tensor, index: Any, **host: Any
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns ``(B, T)``, right-aligned as SkyRL's responses are."""
    found = _BATCH.get()
    if found is None:
        raise RuntimeError(
            f"{key}: expected token ids, which SkyRL does not pass to estimators, got none; "
            "mix tokcredit.adapters.skyrl.Credit into the trainer"
        )
    batch, rule, is_last_step = found
    for name in ("sequences", "loss_mask"):
        if batch.get(name) is None:
            raise RuntimeError(f"{name}: expected in SkyRL's batch, got {', '.join(map(str, batch.keys()))}")
    prompts, mask = list(map(str, index)), batch["loss_mask"]
    trajectories = _trajectories(is_last_step, len(prompts))
    advantages = two_phase.advantages_padded(
        two_phase.advantage_part(objective, "SkyRL"),
        batch["sequences"][:, -response_mask.shape[1] :],
        response_mask,
        mask,
        two_phase.group_ids(prompts).to(response_mask.device),
        host_rows(trajectories, prompts, token_level_rewards, mask, rule, _ROWS),
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
