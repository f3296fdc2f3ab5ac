"""Log-probabilities and entropies of tokens from the logits of a language model, with gradients.

No float32 copy of ``(N, V)`` is made: with bf16 logits, the one that ``log_softmax`` in float32 makes and
keeps for the gradient is twice the size of the logits. Here two numbers per row are kept beside the logits.
"""

from __future__ import annotations

import math

from torch import Tensor

from tokcredit import ops


def log_probs_and_entropies(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of each token, and entropy in nats of the distribution it was drawn from.

    With ``p = softmax(logits[i] / temperature)``::

        log_probs[i] = log(p[tokens[i]])
        entropies[i] = -sum(p[j] * log(p[j]) for j in range(V))

    A token of -1 marks a position that takes no part: both results and the gradient are 0 there and its
    logits are not read. So the shift by one that next-token prediction needs is best done on the tokens (drop
    the first and append -1) and not on the logits: ``logits[:, :-1]`` is another layout and has to be copied
    first. Positions whose incoming gradient is 0 get a gradient of 0, whatever their logits hold.

    Args:
        logits: float ``(..., V)``; bf16 and fp16 are computed in float32. A logit of -inf has probability 0.
        tokens: int64 or int32 ``(...)``, -1 or an id below V.
        temperature: positive; what the logits were divided by when the tokens were drawn.

    Returns:
        Two tensors ``(...)``, float32, or float64 for float64 logits. Both have a gradient in the logits.

    Raises:
        ValueError: if shapes disagree, a token is out of range, or the temperature is not positive.
    """
    if logits.dim() == 0 or logits.shape[:-1] != tokens.shape:
        expected = "at least one dimension" if logits.dim() == 0 else f"{list(logits.shape[:-1])}"
        raise ValueError(f"tokens: expected the shape of logits without V, {expected}, got {list(tokens.shape)}")
    if not logits.is_floating_point():
        raise TypeError(f"logits: expected a float dtype, got {logits.dtype}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    rows = logits.reshape(tokens.numel(), logits.shape[-1])
    log_probs, entropies = ops.logits(rows, tokens.reshape(-1), float(temperature))
    return log_probs.view(tokens.shape), entropies.view(tokens.shape)


def log_probs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each token, ``log softmax(logits / temperature)[token]``; ``(...)``.

    Arguments, ignored positions and errors are those of :func:`log_probs_and_entropies`.
    """
    return log_probs_and_entropies(logits, tokens, temperature)[0]
