"""A model whose last outputs can be read again, so that TRL's own forward pass serves our loss too."""

from __future__ import annotations

from typing import Any

import trl
from torch import Tensor


class Recorder:
    """Stands for a model and keeps what it returns.

    Args:
        model: The model, as TRL would call it.

    Attributes:
        outputs: What the model returned last, or None.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.outputs: Any = None

    def __call__(self, *positional: Any, **named: Any) -> Any:
        """Return what the model returns.

        Args:
            positional: Its arguments.
            named: Its arguments by name.
        """
        self.outputs = self._model(*positional, **named)
        return self.outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def read(self, name: str, width: int) -> Tensor:
        """Return a per-token output of the last real tokens, ``(B, T)``.

        Args:
            name: Name of the output, for example ``log_probs``.
            width: Number T of real tokens that are predicted. Adapters may put virtual ones before them.

        Raises:
            RuntimeError: This version of TRL has no such output.
        """
        x: Any = getattr(self.outputs, name, None)
        if x is None:
            raise RuntimeError(
                f"trl: expected a version from 1.16 on, whose models return {name}, got {trl.__version__}"
            )
        values: Tensor = x[:, -width:]
        return values
