"""How well an attribution agrees with what a model predicts from perturbed embeddings."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokcredit.arguments import per_token
from tokcredit.attribution.model import evaluated, next_logits, sequence


class Faithfulness(NamedTuple):
    """Soft normalized sufficiency and comprehensiveness; higher is better.

    Attributes:
        sufficiency: How close the prediction stays when important embeddings are kept, from 0 to 1.
        comprehensiveness: How far it moves when they are dropped, at least 0.
    """

    sufficiency: float
    comprehensiveness: float


def distance(p: Tensor, q: Tensor, root: bool = False) -> Tensor:
    """Return how far two distributions are apart: ``sum over v of (sqrt(p[v]) - sqrt(q[v]))**2 / sqrt(2)``.

    Args:
        p: float ``[..., V]``, probabilities.
        q: float ``[..., V]``, probabilities.
        root: Return Hellinger's distance, ``sqrt(sum) / sqrt(2)``; without it the number of the released code.

    Returns:
        float ``[...]``.
    """
    total = (p.sqrt() - q.sqrt()).square().sum(-1)
    return (total.sqrt() if root else total) / math.sqrt(2)


def faithfulness(
    model: Any,
    ids: Tensor,
    importance: Tensor,
    root: bool = False,
    generator: torch.Generator | None = None,
) -> Faithfulness:
    """Return the soft sufficiency and comprehensiveness of an attribution of the next-token prediction.

    Each number of the embedding of token i is kept with probability ``importance[i]`` for sufficiency and with
    ``1 - importance[i]`` for comprehensiveness, else set to 0. With the distances ``s`` and ``c`` of the predictions to
    the original one, and ``z`` that of embeddings of zeros::

        sufficiency = max(0, z - s) / z        comprehensiveness = c / z

    Args:
        model: Causal language model of transformers.
        ids: Integers ``[n]``.
        importance: float ``[n]``, from 0 to 1.
        root: See :func:`distance`.
        generator: Source of random numbers, on the device of ``ids``.

    Raises:
        ValueError: An importance is not between 0 and 1, or a shape is wrong.

    References:
        arXiv 2402.00794.
    """
    ids = sequence(model, ids)
    per_token("importance", importance, len(ids), ids.device)
    if not bool(((importance >= 0) & (importance <= 1)).all()):
        raise ValueError("importance: expected numbers from 0 to 1, got others")
    with evaluated(model), torch.no_grad():
        embedded = model.get_input_embeddings()(ids[None])
        drawn = torch.rand(embedded.shape, generator=generator, device=ids.device)
        other = torch.rand(embedded.shape, generator=generator, device=ids.device)
        keep = importance.float()[None, :, None]
        rows = torch.cat([embedded, embedded * (drawn < keep), embedded * (other < 1 - keep), embedded * 0])
        logits = next_logits(model, inputs_embeds=rows)
    p = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    sufficient, comprehensive, zero = distance(p[1:], p[:1], root).tolist()
    if zero == 0:
        return Faithfulness(0.0, 0.0)
    return Faithfulness(max(0.0, zero - sufficient) / zero, comprehensive / zero)
