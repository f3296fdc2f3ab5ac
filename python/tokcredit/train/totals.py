"""Totals: metrics of micro-batches, added up to those of a step."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tokcredit.train.ranks import Ranks

_MEANS = ("_mean", "_fraction")
"""Endings of metrics that are means over pairs, or over tokens where there are no pairs. Others add up over the
micro-batches of an optimizer step."""
_OVER_TOKENS = frozenset({"entropy_mean"})
"""Means over tokens in any case."""
_COUNTS = frozenset({"tokens", "pairs", "nonfinite_log_probs"})
"""Metrics that also add up over the optimizer steps of a step."""


class Totals:
    """Metrics of the micro-batches of a step, added up.

    Args:
        zeros: The names of all metrics, with any numbers.
    """

    def __init__(self, zeros: Mapping[str, float]) -> None:
        self._sums = dict.fromkeys(zeros, 0.0)

    def add(self, metrics: Mapping[str, float]) -> None:
        """Add the metrics of a micro-batch.

        Args:
            metrics: Numbers by name.
        """
        for name, value in metrics.items():
            self._sums[name] += value * metrics[self._over(name)] if name.endswith(_MEANS) else value

    def _over(self, name: str) -> str:
        return "pairs" if "pairs" in self._sums and name not in _OVER_TOKENS else "tokens"

    def metrics(self, ranks: Ranks, steps: int) -> dict[str, float]:
        """Return means over pairs or tokens, counts, and means over the optimizer steps, over all processes.

        Args:
            ranks: The processes.
            steps: Number of optimizer steps.
        """
        sums = ranks.sum({name: torch.tensor(value, dtype=torch.float64) for name, value in self._sums.items()})
        out = {}
        for name, total in sums.items():
            if name == "tokens":
                continue
            if name.endswith(_MEANS):
                if count := sums[self._over(name)]:
                    out[name] = total / count
            else:
                out[name] = total if name in _COUNTS else total / (max(steps, 1) * ranks.count)
        return out
