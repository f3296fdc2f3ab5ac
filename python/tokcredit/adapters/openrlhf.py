"""OpenRLHF: its experience maker pays what a method says, its policy loss is the method's.

OpenRLHF builds both by name, in the driver and in the actor's worker. :func:`install` puts an objective there, in each
process that calls it: in the driver, and through ``worker_process_setup_hook`` of Ray's ``runtime_env`` in the workers.
``algo.advantage.estimator`` must be ``dr_grpo``, the one that adds nothing of its own. Tested with OpenRLHF 0.11.2.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from openrlhf.trainer import ppo_trainer
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
from openrlhf.trainer.ray import ppo_actor
from torch import Tensor

from tokcredit.stages import aggregation
from tokcredit.adapters import split
from tokcredit.objective import Objective

_CLIP = "because the objective's clip stage bounds the ratio"
_ENGINE = "because the objective's weights stage corrects for the engine"
EVIDENCE = {
    "old_log_probs": "action_log_probs",
    "rollout_log_probs": "rollout_log_probs",
    "ref_log_probs": "base_action_log_probs",
}


class PolicyLoss(torch.nn.Module):
    """Stands where ``openrlhf.models.PolicyLoss`` does: the same arguments, the same five results.

    Args:
        objective: its ratio, clip, gain and aggregation make the loss.
        clip_eps_low: OpenRLHF's settings, each of which must have its default, as those that follow.
        token_level_loss: whether ``actor.loss_agg_mode`` is ``token-mean``, which must be true of the objective.

    Raises:
        ValueError: a stage cannot be carried, or a setting contradicts the objective.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        is_correction_level: str = "off",
        is_correction_mode: str = "mask",
        is_correction_gating: str = "ratio",
        is_correction_threshold: Any = (0.5, 5.0),
    ) -> None:
        super().__init__()
        for name, value, default, reason in (
            ("actor.eps_clip_low_high", (clip_eps_low, clip_eps_high), (0.2, 0.2), _CLIP),
            ("actor.dual_clip", dual_clip, None, _CLIP),
            ("actor.policy_loss_type", policy_loss_type, "ppo", "because the objective's ratio stage makes the ratio"),
            ("algo.advantage.is_correction_level", is_correction_level, "off", _ENGINE),
            ("algo.advantage.is_correction_mode", is_correction_mode, "mask", _ENGINE),
            ("algo.advantage.is_correction_gating", is_correction_gating, "ratio", _ENGINE),
            ("algo.advantage.is_correction_threshold", tuple(is_correction_threshold), (0.5, 5.0), _ENGINE),
        ):
            if value != default:
                raise ValueError(f"{name}: expected OpenRLHF's default {default!r}, {reason}, got {value!r}")
        self.objective = split.surrogate(objective, "OpenRLHF", "algo.kl.use_loss")
        self.counted = split.counted(self.objective, "OpenRLHF")
        modes = {True: "token-mean", False: "seq-mean-token-mean"}
        expected = isinstance(self.objective.aggregation, aggregation.token_mean)
        if token_level_loss != expected:
            raise ValueError(
                f"actor.loss_agg_mode: expected {modes[expected]!r}, for {self.objective.aggregation!r}, "
                f"got {modes[token_level_loss]!r}"
            )

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: Tensor | float | None = None,
        global_batch_size: Tensor | float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """Loss of a micro-batch ``(B, A)``, share of clipped tokens, mean of ``log p_old - log p``; no correction."""
        mask = torch.ones_like(log_probs) if action_mask is None else action_mask
        counts = {"batch_num_tokens": batch_num_tokens, "global_batch_size": global_batch_size}
        number = counts[self.counted]
        if number is None:
            raise ValueError(f"{self.counted}: expected the number of the optimizer step, as OpenRLHF counts it")
        # OpenRLHF's numbers are divided by its accumulation steps, so they need not be whole.
        out = split.evaluate(
            self.objective, log_probs, old_log_probs, advantages, mask, batch_num_tokens=1, global_batch_size=1
        )
        clipped = out.metrics["clip_low"] + out.metrics["clip_high"] + out.metrics["clip_cap"]
        tokens = out.metrics["tokens"].clamp(min=1)
        drift = torch.where(mask != 0, old_log_probs - log_probs.detach(), 0).sum() / tokens
        return out.loss * dp_size / number, clipped, drift, None, None


class ExperienceMaker(RemoteExperienceMaker):  # type: ignore[misc]
    """``RemoteExperienceMaker`` whose advantages are what an objective pays; everything else is OpenRLHF's.

    Args:
        objective: its credit and weights pay.
        arguments: as in OpenRLHF, with the next.

    Raises:
        ValueError: a stage cannot be carried, or a setting contradicts the objective.
    """

    def __init__(self, objective: Objective, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.objective = split.payer(objective, "OpenRLHF")
        algo = self.args.algo
        if algo.advantage.estimator != "dr_grpo":
            raise ValueError(
                "algo.advantage.estimator: expected 'dr_grpo', whose advantages the objective's replace, "
                f"got {algo.advantage.estimator!r}"
            )
        if self.initial_model_group is not None and not algo.kl.use_loss:
            raise ValueError(
                "algo.kl.init_coef: expected 0, or algo.kl.use_loss, because the objective's credit stage is paid "
                f"rewards without a penalty, got {algo.kl.init_coef}"
            )
        if tuple(self.args.reward.clip_range or ()) != (-10, 10):
            raise ValueError(
                "reward.clip_range: expected OpenRLHF's default (-10, 10), because it clips advantages that the "
                f"objective's replace, got {self.args.reward.clip_range!r}"
            )

    @torch.no_grad()
    def compute_advantages_and_returns(self, experiences: list[Any]) -> list[Any]:
        """Penalties, metrics and returns as in OpenRLHF; then all rows together are paid."""
        experiences = super().compute_advantages_and_returns(experiences)
        width = max(x.sequences.shape[1] for x in experiences)
        actions = max(x.action_mask.shape[1] for x in experiences)

        def whole(name: str, size: int) -> Tensor:
            """All rows of a field, its tokens at the right."""
            parts = [getattr(x, name) for x in experiences]
            return torch.cat([torch.nn.functional.pad(part, (size - part.shape[1], 0)) for part in parts])

        mask = whole("action_mask", actions)
        index = torch.tensor([i for x in experiences for i in x.index], device=mask.device)
        paid = split.pay_padded(
            self.objective,
            whole("sequences", width)[:, -actions:],
            (whole("attention_mask", width)[:, -actions:] != 0) & split.responded(mask),
            mask,
            index // self.args.rollout.n_samples_per_prompt,
            torch.cat([x.rewards for x in experiences]),
            "OpenRLHF",
            **{
                name: whole(field, actions)
                for name, field in EVIDENCE.items()
                if getattr(experiences[0], field) is not None
            },
        )
        rows = paid.split([len(x.index) for x in experiences])
        for experience, part in zip(experiences, rows, strict=True):
            experience.advantages = part[:, -experience.action_mask.shape[1] :].to(experience.returns.dtype)
        return experiences


def install(objective: Objective) -> None:
    """Puts an objective where OpenRLHF, in this process, builds its experience maker and its policy loss.

    Raises:
        ValueError: a stage cannot be carried.
    """
    split.payer(objective, "OpenRLHF")
    split.counted(split.surrogate(objective, "OpenRLHF", "algo.kl.use_loss"), "OpenRLHF")
    ppo_trainer.RemoteExperienceMaker = partial(ExperienceMaker, objective)
    ppo_actor.PolicyLoss = partial(PolicyLoss, objective)
