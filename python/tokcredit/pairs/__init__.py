"""Preference pairs from the rollouts of any run.

Needs ``pip install "tokcredit[train]"``. From Python::

    from tokcredit.pairs import PairsSettings, run

    counts = run(PairsSettings(path="runs/tiny-tempo", output="pairs.jsonl"))
"""

from __future__ import annotations

from tokcredit.pairs.settings import PairsSettings

__all__ = ["PairsSettings", "run"]


def run(settings: PairsSettings) -> dict[str, int]:
    """Write pairs as JSONL and return the number of ``pairs``, ``groups``, and ``groups_without`` a pair.

    Args:
        settings: Where rollouts are read from, and how pairs are chosen.

    Raises:
        ValueError: The rollouts cannot be read, or no group has a pair.
    """
    from tokcredit.pairs.making import make

    return make(settings)
