"""Alignment by control tokens."""

from __future__ import annotations

from tokcredit.stages import aggregation
from tokcredit.supervised import Supervised, nll


def meet() -> Supervised:
    """MEET: SFT of preferred responses after good control tokens, and of dispreferred ones after bad control tokens.

    With ``c`` the control tokens that stand before a prompt, good or bad as its response::

        loss = mean over all tokens of -log p(token | c, prompt, tokens before)

    First only the control tokens train, then the whole model with them. Responses are generated after the good ones.
    The trainer does this with ``--adapter "control(tokens=20, steps=50)" --imitate both`` and a file of pairs as
    ``--completions``. The objective itself is that of ``sft``.

    Cost: SFT of both responses of each pair.
    References: arXiv 2310.00819.
    Differences from the paper:
        - The written form of the loss, the number of control tokens and all other numbers are not verified.
        - Control modules are embeddings. Those of the paper may also be LoRA.
        - The mean is over all tokens of both kinds of responses.
    """
    return Supervised(nll(), aggregation=aggregation.token_mean())
