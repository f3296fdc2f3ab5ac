"""Heterogeneous adaptive policy optimization."""

from __future__ import annotations


from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tokcredit.blocks import segment, select
from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts
from tokcredit.spans import Spans
from tokcredit.stages import aggregation, clip
from tokcredit.stages.base import flag, number, part
from tokcredit.stages.clip import Clip, Window
from tokcredit.stages.credit import Credit, group_normalized
from tokcredit.stages.scale import Scale
from tokcredit.stages.token_score import TokenScore


@dataclass(frozen=True)
class entropy_deviation(TokenScore):
    """How far the log-entropy is from a quantile of the batch, in ``[-1, 1]``; 0 at the quantile.

    With ``x = log(max(H, 1e-8))``, Q its ``pivot``-quantile (nearest rank) and s the root mean square of ``x - Q``
    (at least 1e-4): ``h = (x - Q) / s``, divided by its maximum (at least 1e-8) where positive, and by minus its
    minimum (at least 1e-8) elsewhere. ``literal_sign`` divides by the minimum itself, so that nothing is negative.
    """

    pivot: float = number(0.8, at_least=0, at_most=1)
    literal_sign: bool = flag(False)
    reads: ClassVar[frozenset[str]] = frozenset({"entropies"})
    whole_batch: ClassVar[bool] = True

    def __call__(self, batch: Rollouts) -> Tensor:
        x, pivot, _, low, high = self._measured(batch)
        x.sub_(pivot)
        h = x.clamp(min=0).div_(high).add_(x.clamp_(max=0).div_(low if self.literal_sign else -low))
        return h.masked_fill_(~batch.response_mask, 0)

    def statistics(self, batch: Rollouts) -> tuple[float, float, float, float]:
        """Q, s, and the smallest and largest h: what it takes to give other tokens the same score."""
        _, pivot, spread, low, high = self._measured(batch)
        return tuple(torch.stack([pivot, spread, low / spread, high / spread]).tolist())

    def _measured(self, batch: Rollouts) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x, Q, s, and the smallest and largest ``x - Q``, both away from 0."""
        spans, entropies = batch.spans, batch.input("entropies")
        x = (entropies if entropies.dtype == torch.float64 else entropies.float()).clamp(min=1e-8).log_()
        pivot = select.quantile_nearest(x, self.pivot, spans, select.everything(spans))[0]
        square = segment.sum((x - pivot).square_(), spans).sum() / batch.lengths.sum().clamp(min=1)
        spread = square.clamp(min=1e-8).sqrt()
        none = x.new_zeros(1)
        low = torch.cat([none, segment.minimum(x, spans) - pivot]).amin()
        high = torch.cat([none, segment.maximum(x, spans) - pivot]).amax()
        return x, pivot, spread, torch.minimum(low, -1e-8 * spread), torch.maximum(high, 1e-8 * spread)


@dataclass(frozen=True)
class token_normalized(Credit):
    """Rewards centred and scaled over the *tokens* of the group, each of which carries its row's reward.

    With L the tokens of a row: ``mean = sum L r / sum L``, ``std = sqrt(sum L (r - mean)^2 / sum L)`` and
    ``A = (r - mean) / (std + epsilon)``, so that A sums to 0 over the tokens of the group. A group in which some
    ``|A|`` reaches ``limit`` is paid by ``otherwise`` instead.
    """

    limit: float = number(5.0, above=0)
    epsilon: float = number(1e-6, at_least=0)
    otherwise: Credit = part(Credit, group_normalized)

    def __call__(self, batch: Rollouts) -> Tensor:
        groups, index = batch.nonempty_groups, batch.group_index
        lengths = batch.lengths.double()
        tokens = segment.sum(lengths, groups).clamp(min=1)
        # From the group's least reward, so that equal rewards have a spread of exactly 0.
        r = batch.rewards.double() - segment.minimum(batch.rewards.double(), groups)[index]
        centred = r - (segment.sum(lengths * r, groups) / tokens)[index]
        std = (segment.sum(lengths * centred**2, groups) / tokens).sqrt()[index]
        advantages = torch.where(lengths > 0, centred / (std + self.epsilon), 0)
        extreme = segment.maximum(advantages.abs(), groups)[index] >= self.limit
        return torch.where(extreme[:, None], self.otherwise(batch), advantages[:, None]).to(batch.rewards.dtype)


@dataclass(frozen=True)
class widened(Clip):
    """The clipped surrogate whose lower bound widens where a score is negative, and whose upper where it is positive.

    With h the token's score, ``1 - low (1 - widen h)`` where ``h <= 0`` and ``1 + high (1 + widen h)`` where ``h > 0``;
    the other bound is that of :class:`ppo`, and so is the cap.
    """

    score: TokenScore = part(TokenScore)
    low: float = number(0.2, at_least=0)
    high: float = number(0.2, at_least=0)
    widen: float = number(1.0, at_least=0)
    cap: float | None = number(None, at_least=1, optional=True)

    def __call__(self, batch: Rollouts, advantages: Tensor) -> Window:
        h = self.score(batch)
        low = h.clamp(max=0).mul_(self.low * self.widen).sub_(self.low).clamp_(min=-1)
        high = h.clamp(min=0).mul_(self.high * self.widen).add_(self.high)
        plain = clip.ppo(self.low, self.high, self.cap)(batch, advantages)
        return replace(plain, low=low.log1p_(), high=high.log1p_(), score=h)


@dataclass(frozen=True)
class outside_center(Scale):
    """``1 + strength h``, h a score, for tokens of positive score whose ratio has moved and of negative whose has not.

    The ratio has moved when it is outside the middle half of its window, ``(1 + (low - 1) / 2, 1 + (high - 1) / 2)``
    for a window ``[low, high]``; the other tokens keep what they are paid.
    """

    score: TokenScore = part(TokenScore)
    strength: float = number(1.0)
    needs_bounds: ClassVar[bool] = True

    def signal(self, batch: Rollouts, window: Window) -> Tensor | None:
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
        # The log of where the ratio would be had it moved twice as far; NaN below 0.
        twice = log_ratio.expm1().mul_(2).log1p_()
        still = (twice > window.low) & (twice < window.high)
        return (self.strength * signal).mul_((signal > 0) != still).add_(1)


def hapo(
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    cap: float | None = 10.0,
    pivot: float = 0.8,
    widen: float = 1.0,
    strength: float = 1.0,
    epsilon: float = 1e-6,
    literal_sign: bool = False,
) -> Objective:
    """DAPO that treats each token by its entropy: rewards normalised over tokens, pay and window adapted to it.

    h in ``[-1, 1]`` is how far the token's log-entropy is from the batch's 80 % quantile. The lower bound of the ratio
    widens where h < 0 and the upper where h > 0; the advantage is multiplied by ``1 + h`` where an uncertain token has
    left the middle of its window, or a certain one has not. ``tokcredit.temperature.AdaptiveTemperature`` samples by
    the same h.

    Args:
        clip_low: the ratio may fall to ``1 - clip_low``, before widening.
        clip_high: the ratio may rise to ``1 + clip_high``, before widening.
        cap: where A < 0 the loss is at most ``-A cap``.
        pivot: the quantile.
        widen: a bound grows to at most ``1 + widen`` times.
        strength: the advantage is multiplied by ``1 + strength h``.
        epsilon: added to the standard deviations.
        literal_sign: h is never negative, as the released code computes it: no rule for certain tokens applies.

    Cost: as GRPO, plus entropies with the old log-probs.
    Source: arXiv 2509.16591.
    Departs from the released code: the sign of h; its statistics are those of the batch under the old policy, not of
    the micro-batch under the current one; upper bound 0.28 as in the paper (scripts: 0.2), cap as in the scripts.
    Adaptive sampling is the sampler's, and off unless asked for.
    """
    h = entropy_deviation(pivot, literal_sign)
    return Objective(
        token_normalized(epsilon=epsilon, otherwise=group_normalized(epsilon=epsilon)),
        clip=widened(h, clip_low, clip_high, widen, cap),
        aggregation=aggregation.token_mean(),
        scales=(outside_center(h, strength),),
    )
