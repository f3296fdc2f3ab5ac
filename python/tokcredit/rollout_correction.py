"""An objective with the rollout correction that a host's settings describe."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from tokcredit.objective import Objective
from tokcredit.stages import clip as clips
from tokcredit.stages import filters, token_weights
from tokcredit.stages import ratio as ratios
from tokcredit.stages import scale as scales
from tokcredit.stages.within import rejections, setting, thresholds

_ENGINE = "rollout_log_probs"


def from_verl(objective: Objective, config: Any) -> Objective:
    """Return an objective with verl's ``algorithm.rollout_correction``.

    By default the old policy is compared with the engine: :func:`tokcredit.filters.from_verl` gives filters and
    :func:`tokcredit.token_weights.from_verl` token weights, which are added to those of the objective.

    With ``bypass_mode`` the log-probs of the engine take the place of the old ones, so that no forward pass is needed
    for these, and it is the current policy that is compared with the engine. Each option of ``rollout_rs`` becomes a
    scale, :class:`tokcredit.scale.within`. With ``loss_type="ppo_clip"`` the ratio of the objective divides by the
    probability under the engine, and ``rollout_is`` has no effect, as in verl. With ``"reinforce"`` ratio and clip are
    replaced: the loss of a token is ``-A * w * log p``, with the bounded ratio ``w`` of the token or of the whole row,
    or 1 without ``rollout_is``.

    In bypass mode rejected tokens stay in every denominator. verl leaves tokens that an option ``token_k*`` rejects out
    of the mean over a row's tokens.

    Args:
        objective: Any objective.
        config: A mapping or an object with the settings ``rollout_is``, ``rollout_is_threshold``,
            ``rollout_is_batch_normalize``, ``rollout_rs``, ``rollout_rs_threshold``, ``bypass_mode`` and ``loss_type``.

    Raises:
        ValueError: A setting has no such value, the ratio of the objective does not divide by ``old_log_probs``, or
            weights of the current policy are to be normalized.

    Example:
        >>> config = {"bypass_mode": True, "rollout_rs": "token_k3", "rollout_rs_threshold": 0.1}
        >>> objective = from_verl(tokcredit.methods.grpo(), config)
    """
    if not setting(config, "bypass_mode", False):
        return replace(
            objective,
            filters=(*objective.filters, *filters.from_verl(config)),
            token_weights=(*objective.token_weights, *token_weights.from_verl(config)),
        )
    kind = setting(config, "loss_type", "ppo_clip")
    if kind not in ("ppo_clip", "reinforce"):
        raise ValueError(f"loss_type: expected ppo_clip or reinforce, got {kind!r}")
    rejecting = tuple(scales.within(*bounds, to=_ENGINE) for bounds in rejections(config))
    objective = replace(objective, scales=(*objective.scales, *rejecting))
    if kind == "reinforce":
        ratio, clip = _reinforce(config)
        return replace(objective, ratio=ratio, clip=clip)
    if getattr(objective.ratio, "to", None) != "old_log_probs":
        raise ValueError(f"objective: expected a ratio that divides by old_log_probs, got {objective.ratio!r}")
    return replace(objective, ratio=replace(objective.ratio, to=_ENGINE))  # type: ignore[type-var]


def from_trl(objective: Objective, config: Any) -> Objective:
    """Return an objective with the correction for vLLM and the off-policy mask of TRL's ``GRPOConfig``.

    With ``use_vllm``, :func:`tokcredit.token_weights.from_trl` gives a token weight that is added to those of the
    objective. ``off_policy_mask_threshold`` becomes a scale: a row with a negative advantage whose mean log-prob has
    fallen by more than the threshold has no gradient. It is compared with the engine, or with the old policy without
    ``use_vllm``.

    Args:
        objective: Any objective.
        config: A mapping or an object with the settings ``use_vllm``, ``vllm_importance_sampling_*`` and
            ``off_policy_mask_threshold``.

    Raises:
        ValueError: A setting has no such value.
    """
    by_engine = bool(setting(config, "use_vllm", False))
    threshold = setting(config, "off_policy_mask_threshold", None)
    masks: tuple[scales.Scale, ...] = ()
    if threshold is not None:
        to = _ENGINE if by_engine else "old_log_probs"
        masks = (scales.within("difference", "mean", low=-threshold, signs="negative", to=to),)
    return replace(
        objective,
        token_weights=(*objective.token_weights, *(token_weights.from_trl(config) if by_engine else ())),
        scales=(*objective.scales, *masks),
    )


def _reinforce(config: Any) -> tuple[ratios.Ratio, clips.Clip]:
    """Return the ratio and the clip stage of verl's loss ``-A * w * log p``."""
    level, threshold = setting(config, "rollout_is", None), setting(config, "rollout_is_threshold", 2.0)
    if level is None or threshold is None:
        return ratios.one(), clips.gated()
    if level not in ("token", "sequence"):
        raise ValueError(f"rollout_is: expected token, sequence or None, got {level!r}")
    if setting(config, "rollout_is_batch_normalize", False):
        raise ValueError(
            "rollout_is_batch_normalize: expected False with loss_type=reinforce, because the mean of the weights of "
            "the current policy depends on the micro-batch, got True"
        )
    low, high = thresholds(threshold)
    ratio = ratios.token(to=_ENGINE) if level == "token" else ratios.sequence(high=20.0, to=_ENGINE, over="sum")
    if low is None:
        return ratio, clips.gated(cap=math.log(high))
    return ratio, clips.gated("ratio", math.log(low), math.log(high), both_sides=True)


__all__ = ["from_trl", "from_verl"]
