"""AReaL: a ``PPOActor`` whose advantages and loss are those of an objective.

Put it into an engine with ``engine.actor = CreditActor(config, engine, method="ctpo")``. AReaL gives rows no group, so
rows with equal prompts are one group. Tested with AReaL 1.0.4.

AReaL's engine weights the losses of micro-batches. The result is the mean over the tokens of the whole batch for
``aggregation.token_mean``, and the mean over its rows for ``aggregation.sequence_mean``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from areal.api.cli_args import PPOActorConfig
from areal.trainer.ppo.actor import PPOActor
from areal.utils import stats_tracker
from torch import Tensor

from tokcredit.adapters import two_phase
from tokcredit.adapters.capabilities import chosen, require, require_defaults
from tokcredit.objective import Objective

_CLIP = "the objective's clip stage bounds the ratio"
_CREDIT = "the objective's credit stage normalizes rewards"
_ENGINE = "the objective's token weights correct for the engine"
_DECIDED = {
    "eps_clip": _CLIP,
    "eps_clip_higher": _CLIP,
    "c_clip": _CLIP,
    "use_sapo_loss": _CLIP,
    "sapo_tau_pos": _CLIP,
    "sapo_tau_neg": _CLIP,
    "importance_sampling_level": "the objective's ratio stage makes the ratio",
    "adv_norm": _CREDIT,
    "reward_norm": _CREDIT,
    "discount": "the objective's credit stage discounts",
    "gae_lambda": "the objective's credit stage discounts",
    "m2_threshold": "the objective decides which tokens train",
    "rejection_sampling": _ENGINE,
    "use_decoupled_loss": _ENGINE,
}


class _Engine:
    """The engine, with the objective's loss in place of AReaL's in ``train_batch``."""

    def __init__(self, engine: Any, loss: Callable[..., Tensor], weight: Callable[[dict[str, Any]], Tensor]) -> None:
        self._engine, self._loss, self._weight = engine, loss, weight

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def train_batch(self, batch: Any, loss_fn: Any, loss_weight_fn: Any) -> Any:
        return self._engine.train_batch(batch, loss_fn=self._loss, loss_weight_fn=self._weight)


class CreditActor(PPOActor):  # type: ignore[misc]
    """``PPOActor`` with the advantages and the loss of an objective.

    Args:
        config: As in AReaL.
        engine: As in AReaL.
        method: Name of a published method, with its default settings.
        objective: Any objective, in place of ``method``.

    Raises:
        TypeError: Both ``method`` and ``objective`` are given, or neither.
        ValueError: AReaL cannot carry a stage, or a setting of AReaL contradicts the objective.
    """

    def __init__(
        self, config: PPOActorConfig, engine: Any, *, method: str | None = None, objective: Objective | None = None
    ) -> None:
        whole = chosen(method, objective)
        require_defaults(config, PPOActorConfig, _DECIDED, "AReaL")
        if config.kl_ctl:
            raise ValueError(
                "kl_ctl: expected 0, because the objective's credit stage takes rewards without a KL penalty, "
                f"got {config.kl_ctl}"
            )
        self.advantage_part = two_phase.advantage_part(whole, "AReaL")
        self.loss_part = two_phase.loss_part(whole, "AReaL", "kl_ctl")
        self.denominator = two_phase.denominator(self.loss_part, "AReaL")
        require(self.advantage_part, ("old_log_probs", "rollout_log_probs"), "AReaL")
        super().__init__(config, _Engine(engine, self.loss, self.weight))

    def _compute_advantages(self, data: dict[str, Any]) -> dict[str, Any]:
        for name in ("input_ids", "attention_mask", "loss_mask", "rewards", "logprobs"):
            if name not in data:
                raise RuntimeError(f"{name}: expected in AReaL's batch, got {', '.join(data)}")
        tokens, mask, engine = data["input_ids"], data["loss_mask"].clone(), data["logprobs"].clone()
        data = super()._compute_advantages(data)
        # From here on AReaL keeps what belongs to a token at the position before it.
        advantages = two_phase.advantages_padded(
            self.advantage_part,
            tokens,
            (data["attention_mask"] != 0) & two_phase.from_first_response(mask),
            mask,
            two_phase.prompt_groups(tokens, mask),
            data["tot_rewards"].sum(1),
            "AReaL",
            old_log_probs=data["logprobs"].roll(1, -1),
            rollout_log_probs=engine,
        )
        data["advantages"] = advantages.roll(-1, -1)
        return data

    def weight(self, batch: dict[str, Any]) -> Tensor:
        """Return what the engine weights the loss of a micro-batch by.

        Args:
            batch: A packed or padded micro-batch.

        Returns:
            0-d integer: its training tokens, or its rows with a training token, as the aggregation divides.
        """
        mask: Tensor = batch["loss_mask"] != 0
        if self.denominator == "batch_num_tokens":
            return mask.count_nonzero()
        if "cu_seqlens" not in batch:
            return mask.any(-1).count_nonzero()
        ends = torch.nn.functional.pad(mask.cumsum(0), (1, 0))[batch["cu_seqlens"].long()]
        return (ends.diff() > 0).count_nonzero()

    def loss(self, logprobs: Tensor, entropy: Tensor, batch: dict[str, Any], **vocabulary: Any) -> Tensor:
        """Return the mean loss over the tokens, or the rows, of a micro-batch.

        Args:
            logprobs: float ``[N]`` packed or ``(B, T)`` padded, of the current policy.
            entropy: float, in the same shape; for the logs.
            batch: The micro-batch, with ``prox_logp``, ``advantages`` and ``loss_mask`` in the same shape.
            vocabulary: Further arguments of AReaL, which are not used.

        Raises:
            ValueError: ``prox_logp`` is missing, or the batch has a teacher's log-probs.
        """
        old, mask = batch["prox_logp"], batch["loss_mask"] != 0
        if old is None:
            raise ValueError("prox_logp: expected the log-probs that the update starts from, got None")
        if batch.get("teacher_logp") is not None:
            raise ValueError("teacher_logp: expected None, because the objective has no term for it, got a tensor")
        out = two_phase.loss(self.loss_part, logprobs, old, batch["advantages"], mask, batch.get("cu_seqlens"))
        mean = torch.where(mask, entropy.detach(), 0).sum() / mask.count_nonzero().clamp(min=1)
        stats_tracker.scalar(**two_phase.metrics(out), entropy=mean.item(), actor_loss=out.metrics["loss"].item())
        return out.loss
