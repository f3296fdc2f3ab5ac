"""Sampling temperature of each token: higher where the policy is less certain than usual, lower where it is more."""

from __future__ import annotations

import torch
from torch import Tensor

from tokcredit.blocks import log_probs


class AdaptiveTemperature:
    """A logits processor that divides logits by a temperature that depends on their entropy.

    With ``H`` the entropy at the base temperature, and ``Q``, ``s``, ``low`` and ``high`` the statistics of the last
    batch::

        h = (log(max(H, 1e-6)) - Q) / (s + 1e-6)
        h = clamp(h / high if h > 0 else h / -low, -1, 1)
        logits / (temperature * (1 + strength * h))

    It goes into ``transformers.LogitsProcessorList`` before any processor that truncates; leave the temperature of
    ``generate`` at 1.

    Args:
        temperature: Base temperature, above 0, and that of every token while there are no statistics.
        strength: Largest relative change of the temperature, at least 0 and below 1.
        statistics: From ``tokcredit.methods.hapo.entropy_deviation.statistics`` at the base temperature, or None. Set
            the attribute after every step.
        literal_sign: Whether ``h`` is divided by ``low`` in place of ``-low``, as in the released code, so that no
            temperature is below the base.

    Raises:
        ValueError: A setting is out of range.

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
        """Return the logits divided by the temperature of each row, ``(B, V)``.

        Args:
            input_ids: int64 ``(B, T)``, the text so far; part of the interface and not read.
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
