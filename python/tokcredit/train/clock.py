"""Time spent in the parts of a step."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Adds up the seconds spent in named parts of a step.

    ``with clock("sample"): ...`` adds to ``clock.seconds["sample_seconds"]``. Parts may contain other parts.

    Attributes:
        seconds: Seconds by name.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time spent inside the ``with`` block.

        Args:
            name: Name of the part.
        """
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[f"{name}_seconds"] += time.perf_counter() - start
