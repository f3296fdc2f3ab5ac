"""Two language models compared token by token, along what one of them writes.

Needs ``pip install "tokcredit[train]"``. From Python::

    from tokcredit.analyze import Shift, run

    summary = run(Shift(base="tiny", tuned="runs/tiny-tempo/model"))
"""

from __future__ import annotations

from typing import Any

from tokcredit.analyze.settings import Divergent, Shift, StudySettings

__all__ = ["Divergent", "Shift", "StudySettings", "run"]


def run(settings: Shift | Divergent) -> dict[str, Any]:
    """Makes the analysis and returns its summary.

    The folder holds ``settings.json``, a ``problem-*.parquet`` for each problem, ``summary.json`` and ``summary.png``.

    Raises:
        ValueError: models with different tokens, no task, a setting out of range, or a folder with another analysis.
    """
    if isinstance(settings, Shift):
        from tokcredit.analyze.shift import shift

        return shift(settings)
    from tokcredit.analyze.divergent import divergent

    return divergent(settings)
