"""Gradient times input: the first-order effect of each embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokcredit.attribution.model import evaluated, next_logits, output, sequence


def gradient_times_input(model: Any, ids: Tensor, target: int, log_prob: bool = False) -> Tensor:
    """Return the inner product of each token's embedding with the gradient of one output.

    With embeddings ``x[i]`` and the logit ``f`` of the target::

        score[i] = sum over d of x[i, d] * df / dx[i, d]

    If f is linear in the embeddings, the scores add up to f minus its value at embeddings of zeros.

    Args:
        model: Causal language model or sequence classifier of transformers.
        ids: Integers ``[n]``.
        target: Token that follows, or the class.
        log_prob: Take the log-prob of the target in place of its logit.

    Returns:
        float ``[n]``, in float32 at least.

    Raises:
        TypeError: A dtype is wrong.
        ValueError: A shape is wrong, or there is no such target.
    """
    ids = sequence(model, ids)
    with evaluated(model), torch.enable_grad():
        embedded = model.get_input_embeddings()(ids[None]).detach().requires_grad_(True)
        logits = next_logits(model, inputs_embeds=embedded)
        number = output(target, logits)
        value = logits[0].log_softmax(-1)[number] if log_prob else logits[0, number]
        (gradient,) = torch.autograd.grad(value, embedded)
    dtype = torch.promote_types(embedded.dtype, torch.float32)
    return (gradient.to(dtype) * embedded.detach().to(dtype)).sum(-1)[0]
