"""Sampling temperature per token: hotter where the policy is less certain than usual, cooler where more."""

from __future__ import annotations

import torch
from torch import Tensor

from tokcredit.blocks import log_probs


class AdaptiveTemperature:
    """A logits processor: divides by ``temperature (1 + strength h)``, h in ``[-1, 1]`` from the entropy of the logits.

    With H the entropy at the base temperature, Q, s, low and high the statistics of the last batch:
    ``h = (log(max(H, 1e-6)) - Q) / (s + 1e-6)``, divided by high where positive and by -low elsewhere, then bounded.
    Put it into ``transformers.LogitsProcessorList`` as it is, with the temperature of ``generate`` left at 1, and
    before anything that truncates.

    Args:
        temperature: the base, and what every token gets while there are no statistics.
        strength: share by which the temperature may rise or fall.
        statistics: of :meth:`tokcredit.token_score.entropy_deviation.statistics` at that temperature; set the attribute after
            every step.
        literal_sign: h is not negative either below the quantile, as in the released code.

    References:
        arXiv 2509.16591.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        strength: float = 0.05,
        statistics: tuple[float, float, float, float] | None = None,
        literal_sign: bool = False,
    ) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature: expected a positive number, got {temperature}")
        if not 0 <= strength < 1:
            raise ValueError(f"strength: expected at least 0 and less than 1, got {strength}")
        self.temperature = temperature
        self.strength = strength
        self.statistics = statistics
        self.literal_sign = literal_sign

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The logits divided by each row's temperature.

        Args:
            input_ids: int64 ``(B, T)``, what was generated so far; the interface asks for it, the value is not used.
            scores: float ``(B, V)``, logits at temperature 1.
        """
        if self.statistics is None:
            return scores / self.temperature
        pivot, spread, low, high = self.statistics
        anything = torch.zeros(scores.shape[:-1], dtype=torch.int64, device=scores.device)
        _, entropies = log_probs.with_entropies(scores, anything, self.temperature)
        h = (entropies.clamp(min=1e-6).log() - pivot) / (spread + 1e-6)
        h = torch.where(h > 0, h / high, h / (low if self.literal_sign else -low)).clamp(-1, 1)
        return scores / (self.temperature * (1 + self.strength * h))[..., None]
