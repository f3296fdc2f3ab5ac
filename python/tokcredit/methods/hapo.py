"""Heterogeneous adaptive policy optimization."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.blocks import segment
from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts
from tokcredit.spans import Spans
from tokcredit.stages import aggregation
from tokcredit.stages.base import flag, number, part
from tokcredit.stages.clip import Clip, Window
from tokcredit.stages.credit import Credit, group_normalized
from tokcredit.stages.ratio import LogRatio
from tokcredit.stages.scale import Scale
from tokcredit.stages.token_score import TokenScore


@dataclass(frozen=True)
class entropy_deviation(TokenScore):
    """Distance of the log-entropy from a quantile of the batch, scaled to ``[-1, 1]``; 0 at the quantile.

    With ``H`` the entropies, ``Q`` the quantile of nearest rank and means, minimum and maximum over the tokens of the
    batch::

        x = log(max(H, 1e-8))
        s = sqrt(max(mean((x - Q) ** 2), 1e-8))
        h = (x - Q) / s
        score = h / max(max(h), 1e-8) if h > 0 else h / max(-min(h), 1e-8)

    Args:
        pivot: Quantile, from 0 to 1.
        literal_sign: Whether the second case is divided by ``min(min(h), -1e-8)`` as in the released code, so that no
            score is negative.
    """

    pivot: float = number(0.8, at_least=0, at_most=1)
    literal_sign: bool = flag(False)
    reads: ClassVar[frozenset[str]] = frozenset({"entropies"})
    whole_batch: ClassVar[bool] = True

    def __call__(self, batch: Rollouts) -> Tensor:
        return self._measured(batch)[0]

    def statistics(self, batch: Rollouts) -> tuple[float, float, float, float]:
        """Return ``Q``, ``s`` and the smallest and largest ``h``, from which other tokens get the same score.

        Args:
            batch: The rollouts, with ``entropies``.
        """
        q, s, smallest, largest = self._measured(batch)[1].tolist()
        return q, s, smallest, largest

    def _measured(self, batch: Rollouts) -> tuple[Tensor, Tensor]:
        return ops.log_deviation(batch.input("entropies"), batch.spans, self.pivot, 1e-8, self.literal_sign)


@dataclass(frozen=True)
class token_group_average(Credit):
    """HAPO's token-level group average: rewards normalized over the tokens of the group, each with its row's reward.

    With ``L`` the number of tokens of a row and sums over the rows of the group::

        mean = sum(L * r) / sum(L)
        std = sqrt(sum(L * (r - mean) ** 2) / sum(L))
        A = (r - mean) / (std + epsilon)

    The sum of ``A`` over the tokens of the group is 0. A group in which some ``|A|`` is at least ``limit`` has the
    advantages of ``otherwise``.

    Args:
        limit: Bound of ``|A|`` from which on ``otherwise`` is used, above 0; inf for never.
        epsilon: Added to the standard deviation, at least 0.
        otherwise: Credit of groups with an ``|A|`` of at least ``limit``.
        limit_padding: Whether ``|0 - mean| / (std + epsilon)`` is compared with ``limit`` too, in groups with a padded
            or masked position. The released code does that, because such positions have a reward of 0 there.
    """

    limit: float = number(5.0, above=0, infinite=True)
    epsilon: float = number(1e-6, at_least=0)
    otherwise: Credit = part(Credit, group_normalized)
    limit_padding: bool = flag(False)

    def __call__(self, batch: Rollouts) -> Tensor:
        rewards, groups = batch.rewards, batch.nonempty_groups
        # Each token counts twice, which changes no mean and no std, so that a single token is no exception.
        moments = segment.moment_table(rewards, groups, ddof=0, weights=batch.lengths.double().mul_(2))
        advantages = segment.standardize(rewards, groups.index, moments, "normalized", self.epsilon, torch.float64)
        extreme = advantages.abs() >= self.limit
        if not self.limit_padding and not bool(extreme.any()):
            return advantages.to(rewards.dtype)[:, None]
        extreme = segment.maximum(extreme.double(), groups) > 0
        if self.limit_padding:
            padded = segment.maximum((batch.lengths < batch.longest).double(), batch.groups) > 0
            mean, var = moments[:, 1], moments[:, 2]
            extreme |= padded & (mean.abs() >= self.limit * (var.sqrt() + self.epsilon))
        otherwise = self.otherwise(batch)
        advantages = advantages[:, None].to(otherwise.dtype)
        return torch.where(groups.per_row(extreme)[:, None], otherwise, advantages)


@dataclass(frozen=True)
class widened(Clip):
    """HAPO's asymmetric adaptive clipping: PPO's clip with one clip range of each token widened by a score ``h``.

    The ratio of a token is clipped to these bounds::

        ratio in [1 - low * (1 - widen * h), 1 + high]    if h <= 0
        ratio in [1 - low, 1 + high * (1 + widen * h)]    if h > 0

    Args:
        score: Score of each token, from -1 to 1.
        low: Lower clip range before it is widened, at least 0; may be a schedule or a controller.
        high: Upper clip range before it is widened, at least 0; may be a schedule or a controller.
        widen: Growth of a clip range where ``|h|`` is 1, at least 0.
        cap: Dual-clip constant, at least 1, or None for no dual clip.
    """

    score: TokenScore = part(TokenScore)
    low: float = number(0.2, at_least=0, scheduled=True, infinite=True)
    high: float = number(0.2, at_least=0, scheduled=True, infinite=True)
    widen: float = number(1.0, at_least=0)
    cap: float | None = number(None, at_least=1, optional=True)

    def __call__(self, batch: Rollouts, advantages: Tensor) -> Window:
        h = self.score(batch)
        ranges = (self.low, self.high, self.widen)
        low, high = ops.score_bounds(h, *ranges)
        return Window("clip", low, high, None if self.cap is None else math.log(self.cap), score=h, ranges=ranges)


@dataclass(frozen=True)
class outside_center(Scale):
    """HAPO's differential advantage redistribution: ``1 + strength * h`` where score and ratio agree, else 1.

    With ``h`` the score, ``q`` the ratio and ``[1 - low, 1 + high]`` the bounds of the token::

        neutral = 1 - low / 2 < q < 1 + high / 2
        factor = 1 + strength * h if (h > 0 and not neutral) or (h <= 0 and neutral) else 1

    Args:
        score: Score of each token, from -1 to 1. The score of a clip stage with a score is used instead.
        strength: Factor of the score, the paper's beta.
    """

    score: TokenScore = part(TokenScore)
    strength: float = number(1.0)
    needs_bounds: ClassVar[bool] = True

    couples_tokens = False

    def signal(self, batch: Rollouts, window: Window) -> Tensor | None:
        """Return the score of each token, float ``[N]``.

        Args:
            batch: The rollouts.
            window: Window of the clip stage.
        """
        return self.score(batch) if window.score is None else window.score

    def __call__(
        self,
        log_probs: Tensor,
        log_ratio: Tensor,
        advantages: Tensor,
        spans: Spans,
        window: Window,
        signal: Tensor | None,
    ) -> Tensor:
        assert signal is not None
        one = torch.ones(spans.num_rows, 1, device=spans.device)
        bounds = (window.low, window.high)
        return ops.score_factor(signal, log_ratio, one, spans, self.strength, window.ranges, bounds)

    def scaled(
        self,
        advantages: Tensor,
        log_probs: Tensor,
        log_ratio: LogRatio,
        credit: Tensor,
        spans: Spans,
        window: Window,
        signal: Tensor | None,
    ) -> Tensor:
        """Return the same as the base, in one pass where log-ratios are differences.

        Args:
            advantages: As in the base.
            log_probs: As in the base.
            log_ratio: As in the base.
            credit: As in the base.
            spans: As in the base.
            window: As in the base.
            signal: As in the base.
        """
        of, clamp = log_ratio.reference, log_ratio.clamp
        if advantages.dim() == 1 or of is None or log_ratio.log_ratio is not None or log_ratio.cumulative:
            return super().scaled(advantages, log_probs, log_ratio, credit, spans, window, signal)
        assert signal is not None
        bounds = (window.low, window.high)
        return ops.score_factor(signal, log_probs, advantages, spans, self.strength, window.ranges, bounds, of, clamp)


def hapo(
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    cap: float | None = 10.0,
    pivot: float = 0.8,
    widen: float = 1.0,
    strength: float = 1.0,
    epsilon: float = 1e-6,
    literal_sign: bool = False,
    limit: float = 5.0,
    limit_padding: bool = False,
) -> Objective:
    """HAPO: DAPO whose advantages and clip ranges depend on the entropy of each token.

    ``h`` in ``[-1, 1]`` is the distance of the token's log-entropy from the 80 % quantile of the batch, ``q`` the ratio
    and ``A`` the reward normalized over the tokens of the group::

        low = clip_low * (1 - widen * h) if h <= 0 else clip_low
        high = clip_high * (1 + widen * h) if h > 0 else clip_high
        neutral = 1 - low / 2 < q < 1 + high / 2
        A[t] = (1 + strength * h) * A if (h > 0) != neutral else A

    The loss is PPO's with ratios clipped to ``[1 - low, 1 + high]``. The paper's adaptive temperature samples by the
    same ``h``: ``tokcredit.decoding.temperature.AdaptiveTemperature``.

    Args:
        clip_low: Lower clip range before it is widened.
        clip_high: Upper clip range before it is widened.
        cap: Dual-clip constant, at least 1: where ``A < 0`` the loss is at most ``-A * cap``. None for no dual clip.
        pivot: Quantile of the log-entropies, from 0 to 1; the paper's rho.
        widen: A clip range grows to at most ``1 + widen`` times its size; the paper's alpha.
        strength: Factor of ``h`` in the advantage; the paper's beta.
        epsilon: Added to the standard deviations.
        literal_sign: Whether ``h`` is never negative, as the paper's equation 6 and the released code have it. No rule
            for low entropies applies then.
        limit: A group in which some ``|A|`` is at least this has the advantages of GRPO; inf for none, as in the paper.
        limit_padding: Whether ``limit`` also applies to padded and masked positions, as in the released code, where
            their reward is 0.

    Cost: GRPO plus the entropies of the forward pass for the old log-probs.
    References: arXiv 2509.16591.
    Differences from the paper:
        - ``h`` of low entropies is negative, as the later equations need it; equation 6 has the other sign.
        - ``limit`` is a rule of the released code.
        - The dual clip of 10 is that of the released scripts.
        - The adaptive temperature belongs to the sampler and is used only if asked for.
    Differences from the released code:
        - The sign of ``h`` at low entropies, see ``literal_sign``.
        - ``h`` is that of the old policy over the whole batch. The release takes it from the current policy over the
          micro-batch.
        - The upper clip range is 0.28 as in the paper; the scripts have 0.2.
        - ``limit`` does not apply to padded positions, see ``limit_padding``.
        - Rows without a token that the policy chose do not count where a group has the advantages of GRPO.
    """
    h = entropy_deviation(pivot, literal_sign)
    return Objective(
        token_group_average(limit, epsilon, group_normalized(epsilon=epsilon), limit_padding),
        clip=widened(h, clip_low, clip_high, widen, cap),
        aggregation=aggregation.token_mean(),
        scales=(outside_center(h, strength),),
    )
