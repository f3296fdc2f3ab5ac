"""AReaL: ``PPOActor`` that pays and trains by an objective.

``engine.actor = CreditActor(config, engine, method="ctpo")`` puts it into an engine. AReaL gives rows no group, so rows
with equal prompts are one. Its engine weighs the micro-batches' losses, which makes the mean over tokens of the whole
batch of means over tokens, and the mean over rows of means over rows. Tested with AReaL 1.0.4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from areal.api.cli_args import PPOActorConfig
from areal.trainer.ppo.actor import PPOActor
from areal.utils import stats_tracker
from torch import Tensor

from tokcredit.adapters import split
from tokcredit.adapters.capabilities import chosen, require, untouched
from tokcredit.objective import Objective

_CLIP = "the objective's clip stage bounds the ratio"
_CREDIT = "the objective's credit stage scales rewards"
_ENGINE = "the objective's weights stage corrects for the engine"
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
    "m2_threshold": "the objective's weights stage selects tokens",
    "rejection_sampling": _ENGINE,
    "use_decoupled_loss": _ENGINE,
}


class _Engine:
    """The engine, whose ``train_batch`` takes the objective's loss in place of AReaL's."""

    def __init__(self, engine: Any, loss: Callable[..., Tensor], weight: Callable[[dict[str, Any]], Tensor]) -> None:
        self._engine, self._loss, self._weight = engine, loss, weight

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def train_batch(self, batch: Any, loss_fn: Any, loss_weight_fn: Any) -> Any:
        return self._engine.train_batch(batch, loss_fn=self._loss, loss_weight_fn=self._weight)


class CreditActor(PPOActor):  # type: ignore[misc]
    """``PPOActor`` whose advantages are what an objective pays, and whose loss is the objective's.

    Args:
        config: as in AReaL.
        engine: as in AReaL.
        method: name of a published method, with its defaults.
        objective: or any objective.

    Raises:
        TypeError: both of ``method`` and ``objective`` are given, or neither.
        ValueError: a stage cannot be carried, or a setting contradicts the objective.
    """

    def __init__(
        self, config: PPOActorConfig, engine: Any, *, method: str | None = None, objective: Objective | None = None
    ) -> None:
        whole = chosen(method, objective)
        untouched(config, PPOActorConfig, _DECIDED, "AReaL")
        if config.kl_ctl:
            raise ValueError(
                "kl_ctl: expected 0, because the objective's credit stage is paid rewards without a penalty, "
                f"got {config.kl_ctl}"
            )
        self.paying = split.payer(whole, "AReaL")
        self.training = split.surrogate(whole, "AReaL", "kl_ctl")
        self.counted = split.counted(self.training, "AReaL")
        require(self.paying, {"old_log_probs", "rollout_log_probs"}, "AReaL")
        super().__init__(config, _Engine(engine, self.loss, self.weight))

    def _compute_advantages(self, data: dict[str, Any]) -> dict[str, Any]:
        for name in ("input_ids", "attention_mask", "loss_mask", "rewards", "logprobs"):
            if name not in data:
                raise RuntimeError(f"{name}: expected in AReaL's batch, got {', '.join(data)}")
        tokens, mask, engine = data["input_ids"], data["loss_mask"].clone(), data["logprobs"].clone()
        data = super()._compute_advantages(data)
        # From here AReaL has what belongs to a token at the position before it.
        paid = split.pay_padded(
            self.paying,
            tokens,
            (data["attention_mask"] != 0) & split.responded(mask),
            mask,
            split.prompts(tokens, mask),
            data["tot_rewards"].sum(1),
            "AReaL",
            old_log_probs=data["logprobs"].roll(1, -1),
            rollout_log_probs=engine,
        )
        data["advantages"] = paid.roll(-1, -1)
        return data

    def weight(self, batch: dict[str, Any]) -> Tensor:
        """What the engine weighs the loss of a micro-batch by: its training tokens, or its rows that have one."""
        mask: Tensor = batch["loss_mask"] != 0
        if self.counted == "batch_num_tokens":
            return mask.count_nonzero()
        if "cu_seqlens" not in batch:
            return mask.any(-1).count_nonzero()
        ends = torch.nn.functional.pad(mask.cumsum(0), (1, 0))[batch["cu_seqlens"].long()]
        return (ends.diff() > 0).count_nonzero()

    def loss(self, logprobs: Tensor, entropy: Tensor, batch: dict[str, Any], **vocabulary: Any) -> Tensor:
        """Mean over the tokens, or the rows, of a packed or padded micro-batch."""
        old, mask = batch["prox_logp"], batch["loss_mask"] != 0
        if old is None:
            raise ValueError("prox_logp: expected the log-probs that the update starts from, got None")
        if batch.get("teacher_logp") is not None:
            raise ValueError("teacher_logp: expected None, because no stage of an objective carries it, got a tensor")
        out = split.evaluate(self.training, logprobs, old, batch["advantages"], mask, batch.get("cu_seqlens"))
        means = torch.where(mask, entropy.detach(), 0).sum() / mask.count_nonzero().clamp(min=1)
        stats_tracker.scalar(**split.metrics(out), entropy=means.item(), actor_loss=out.metrics["loss"].item())
        return out.loss
