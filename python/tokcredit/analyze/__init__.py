"""Two language models compared token by token, and which tokens of a prompt mattered.

Needs ``pip install "tokcredit[train]"``. From Python::

    from tokcredit.analyze import Shift, run

    summary = run(Shift(base="tiny", tuned="runs/tiny-tempo/model"))
"""

from __future__ import annotations

from typing import Any

from tokcredit.analyze.settings import (
    Attribute,
    CompressSettings,
    Divergent,
    ReagentSettings,
    ScoreSettings,
    Shift,
    StudySettings,
)

__all__ = [
    "Attribute",
    "CompressSettings",
    "Divergent",
    "ReagentSettings",
    "ScoreSettings",
    "Shift",
    "StudySettings",
    "compress",
    "run",
]


def run(settings: Shift | Divergent | Attribute) -> dict[str, Any]:
    """Run an analysis and return its summary, or with :class:`Attribute` the record of the first prompt.

    The folder of the others holds ``settings.json``, a ``problem-*.parquet`` for each problem, ``summary.json`` and
    ``summary.png``.

    Args:
        settings: Settings of the analysis.

    Raises:
        ValueError: The models have different vocabularies, there is no task, a setting is out of range, or the folder
            holds another analysis.
    """
    if isinstance(settings, Attribute):
        from tokcredit.analyze.attribute import attribute

        return attribute(settings)
    if isinstance(settings, Shift):
        from tokcredit.analyze.shift import shift

        return shift(settings)
    from tokcredit.analyze.divergent import divergent

    return divergent(settings)


def compress(settings: CompressSettings) -> dict[str, int]:
    """Write shorter prompts as JSONL and return the number of ``prompts``, their ``words``, and ``words_kept``.

    Args:
        settings: Where prompts are read from, and how they are shortened.

    Raises:
        ValueError: A model, a prompt or a setting is not as expected.
    """
    from tokcredit.analyze import compression

    return compression.compress(settings)
