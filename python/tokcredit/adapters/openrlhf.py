"""OpenRLHF: the advantages of an objective in its experience maker, and the objective's policy loss in its actor.

OpenRLHF builds both by name, the first in the driver and the second in the actor's worker. :func:`install` puts an
objective there in each process that calls it: call it in the driver, and in the workers through the
``worker_process_setup_hook`` of Ray's ``runtime_env``. Set ``algo.advantage.estimator`` to ``dr_grpo``; its advantages
are replaced. Tested with OpenRLHF 0.11.2.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from openrlhf.trainer import ppo_trainer
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
from openrlhf.trainer.ray import ppo_actor
from torch import Tensor

from tokcredit.adapters import two_phase
from tokcredit.adapters.capabilities import host_fields
from tokcredit.objective import Objective

_CLIP = "because the objective's clip stage bounds the ratio"
_ENGINE = "because the objective's token weights correct for the engine"
_MODES = {"batch_num_tokens": "token-mean", "global_batch_size": "seq-mean-token-mean"}
FIELDS = host_fields(
    old_log_probs="action_log_probs", rollout_log_probs="rollout_log_probs", ref_log_probs="base_action_log_probs"
)
"""OpenRLHF's field of each input that it can carry."""


class PolicyLoss(torch.nn.Module):
    """The policy loss of an objective, with the arguments and the five results of ``openrlhf.models.PolicyLoss``.

    The settings after the first argument are OpenRLHF's. Each must have its default, except ``token_level_loss``, which
    must fit the aggregation of the objective.

    Args:
        objective: Its ratio, clip, scales and aggregation make the loss.
        clip_eps_low: ``actor.eps_clip_low_high``, first number.
        clip_eps_high: ``actor.eps_clip_low_high``, second number.
        dual_clip: ``actor.dual_clip``.
        token_level_loss: Whether ``actor.loss_agg_mode`` is ``token-mean``.
        policy_loss_type: ``actor.policy_loss_type``.
        is_correction_level: ``algo.advantage.is_correction_level``.
        is_correction_mode: ``algo.advantage.is_correction_mode``.
        is_correction_gating: ``algo.advantage.is_correction_gating``.
        is_correction_threshold: ``algo.advantage.is_correction_threshold``.

    Raises:
        ValueError: OpenRLHF cannot carry a stage, or a setting contradicts the objective.
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
        self.objective = two_phase.loss_part(objective, "OpenRLHF", "algo.kl.use_loss")
        self.denominator = two_phase.denominator(self.objective, "OpenRLHF")
        given = "token-mean" if token_level_loss else "seq-mean-token-mean"
        if given != _MODES[self.denominator]:
            raise ValueError(
                f"actor.loss_agg_mode: expected {_MODES[self.denominator]!r}, for {self.objective.aggregation!r}, "
                f"got {given!r}"
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
        """Return the loss of a micro-batch and OpenRLHF's metrics of it.

        Args:
            log_probs: float ``(B, A)``, of the current policy.
            old_log_probs: float ``(B, A)``.
            advantages: float ``(B, A)``.
            action_mask: ``(B, A)``, nonzero where the policy chose the token, or None for all.
            rollout_log_probs: Not used; token weights that correct for the engine are part of the advantages.
            dp_size: Ranks whose gradients are averaged.
            batch_num_tokens: Training tokens of the optimizer step, divided by its accumulation steps.
            global_batch_size: The same for rows.

        Returns:
            Loss; fraction of clipped tokens; mean of ``log p_old - log p``; None; None.

        Raises:
            ValueError: The number that the aggregation divides by is missing.
        """
        mask = torch.ones_like(log_probs) if action_mask is None else action_mask
        counts = {"batch_num_tokens": batch_num_tokens, "global_batch_size": global_batch_size}
        number = counts[self.denominator]
        if number is None:
            raise ValueError(f"{self.denominator}: expected the number of the optimizer step, got None")
        out = two_phase.loss(
            self.objective, log_probs, old_log_probs, advantages, mask, batch_num_tokens=1, global_batch_size=1
        )
        clipped = torch.stack([out.metrics[f"clip_{side}_fraction"] for side in ("low", "high", "cap")]).sum()
        tokens = out.metrics["tokens"].clamp(min=1)
        drift = torch.where(mask != 0, old_log_probs - log_probs.detach(), 0).sum() / tokens
        return out.loss * dp_size / number, clipped, drift, None, None


class ExperienceMaker(RemoteExperienceMaker):  # type: ignore[misc]
    """``RemoteExperienceMaker`` with the advantages of an objective; everything else is OpenRLHF's.

    Args:
        objective: Its credit and token weights make the advantages.
        arguments: As in OpenRLHF.
        keywords: As in OpenRLHF.

    Raises:
        ValueError: OpenRLHF cannot carry a stage, or a setting of it contradicts the objective.
    """

    def __init__(self, objective: Objective, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.objective = two_phase.advantage_part(objective, "OpenRLHF")
        algo = self.args.algo
        if algo.advantage.estimator != "dr_grpo":
            raise ValueError(
                "algo.advantage.estimator: expected 'dr_grpo', whose advantages the objective's replace, "
                f"got {algo.advantage.estimator!r}"
            )
        if self.initial_model_group is not None and not algo.kl.use_loss:
            raise ValueError(
                "algo.kl.init_coef: expected 0, or algo.kl.use_loss, because the objective's credit stage takes "
                f"rewards without a KL penalty, got {algo.kl.init_coef}"
            )
        if tuple(self.args.reward.clip_range or ()) != (-10, 10):
            raise ValueError(
                "reward.clip_range: expected OpenRLHF's default (-10, 10), because it clips advantages that the "
                f"objective's replace, got {self.args.reward.clip_range!r}"
            )

    @torch.no_grad()
    def compute_advantages_and_returns(self, experiences: list[Any]) -> list[Any]:
        """Return the experiences with the advantages of the objective, and all else as OpenRLHF computes it.

        Args:
            experiences: All rows of the step, in micro-batches.
        """
        experiences = super().compute_advantages_and_returns(experiences)
        width = max(x.sequences.shape[1] for x in experiences)
        actions = max(x.action_mask.shape[1] for x in experiences)

        def whole(name: str, size: int) -> Tensor:
            """Return a field of all rows, padded at the left."""
            parts = [getattr(x, name) for x in experiences]
            return torch.cat([torch.nn.functional.pad(part, (size - part.shape[1], 0)) for part in parts])

        mask = whole("action_mask", actions)
        index = torch.tensor([i for x in experiences for i in x.index], device=mask.device)
        advantages = two_phase.advantages_padded(
            self.objective,
            whole("sequences", width)[:, -actions:],
            (whole("attention_mask", width)[:, -actions:] != 0) & two_phase.from_first_response(mask),
            mask,
            index // self.args.rollout.n_samples_per_prompt,
            torch.cat([x.rewards for x in experiences]),
            "OpenRLHF",
            **{
                name: whole(field, actions)
                for name, field in FIELDS.items()
                if getattr(experiences[0], field) is not None
            },
        )
        rows = advantages.split([len(x.index) for x in experiences])
        for experience, part in zip(experiences, rows, strict=True):
            experience.advantages = part[:, -experience.action_mask.shape[1] :].to(experience.returns.dtype)
        return experiences


def install(objective: Objective) -> None:
    """Put an objective where OpenRLHF, in this process, builds its experience maker and its policy loss.

    Args:
        objective: The objective.

    Raises:
        ValueError: OpenRLHF cannot carry a stage.
    """
    two_phase.advantage_part(objective, "OpenRLHF")
    two_phase.denominator(two_phase.loss_part(objective, "OpenRLHF", "algo.kl.use_loss"), "OpenRLHF")
    ppo_trainer.RemoteExperienceMaker = partial(ExperienceMaker, objective)
    ppo_actor.PolicyLoss = partial(PolicyLoss, objective)
