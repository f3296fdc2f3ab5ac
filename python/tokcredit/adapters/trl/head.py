"""TRL's fused output layer, computed by :mod:`tokcredit.head`. Tested with TRL 1.16."""

from __future__ import annotations

from typing import Any

import trl
from torch import Tensor
from trl.trainer import utils

from tokcredit.blocks import head

_OURS = {"log_probs", "entropy"}


class _LogProbs:
    """What TRL's patched models call in place of the output layer.

    Args:
        stock: TRL's own.
    """

    def __init__(self, stock: Any) -> None:
        self._stock = stock

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        scale: float = 1.0,
        outputs: tuple[str, ...] = ("log_probs",),
    ) -> tuple[Tensor | None, ...]:
        # The weight of ZeRO-3 is there only inside of TRL's own function.
        if not set(outputs) <= _OURS or hasattr(weight, "ds_id"):
            stock: tuple[Tensor | None, ...] = self._stock.apply(
                hidden, weight, bias, targets, temperature, chunk_size, softcap, scale, outputs
            )
            return stock
        settings: dict[str, Any] = {"temperature": temperature, "softcap": softcap, "scale": scale}
        dtype = head.dtype_of(hidden)
        bias = None if bias is None else bias.to(dtype)
        log_probs, entropies = head.log_probs_and_entropies(hidden, weight.to(dtype), targets, bias, **settings)
        return log_probs, entropies if "entropy" in outputs else None, None, None, None


def use_head() -> None:
    """Compute the fused output layer of TRL's trainers with :mod:`tokcredit.head`, in this process.

    TRL's own function is used where a trainer asks for more than log-probs and entropies (those of DPO and SFT ask for
    mean logits and accuracies), and with ZeRO-3.

    Raises:
        RuntimeError: This version of TRL has no such layer.
    """
    stock = getattr(utils, "_ChunkedLogProbFunction", None)
    if stock is None:
        raise RuntimeError(f"trl: expected a version with a fused output layer, such as 1.16, got {trl.__version__}")
    if not isinstance(stock, _LogProbs):
        utils._ChunkedLogProbFunction = _LogProbs(stock)
