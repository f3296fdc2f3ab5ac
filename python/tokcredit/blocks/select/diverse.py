"""Tokens that are important and unlike each other, and a score of importance from a projection of vectors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.arguments import describe, float_tensor, per_token, whole_number
from tokcredit.blocks.select.ranks import Share, quota
from tokcredit.blocks.select.scaling import rows_of, scaled
from tokcredit.spans import Spans, require_spans


def diverse(
    score: Tensor, vectors: Tensor, k: int | Tensor | Share, spans: Spans, weight: float | None = 0.5
) -> Tensor:
    """Return the step at which each token is chosen for its score and for being unlike the tokens before it, or -1.

    Scores of a row are scaled to ``s`` from 0 to 1. The first choice is the token of the largest score. With a weight,
    each further choice has the largest maximal marginal relevance (IDPruner)::

        weight * s[i] - (1 - weight) * max(cosine(vectors[i], vectors[j]) for j chosen)

    and with ``weight=None`` the largest product (ZOO-Prune)::

        s[i] * (1 - max(cosine(vectors[i], vectors[j]) for j chosen))

    Ties go to the lower index. A token whose score or vector is not finite is chosen after all others. No matrix of
    similarities is made: memory is O(N), time at most O(k N d). Computed in float32. On CUDA this waits for the device
    if ``k`` is not an int.

    Args:
        score: float ``[N]``, importance of each token.
        vectors: float ``[N, d]``, for example embeddings of tokens or of image patches.
        k: How many tokens of each row: for all rows, int64 ``[R]``, or a :class:`Share`. A row with fewer is taken
            whole.
        spans: The rows. Masked tokens never compete.
        weight: Weight of the score against similarity, from 0 to 1; None for the product.

    Returns:
        int64 ``[N]``: 0 for the first token that is chosen in a row, and so on. ``order >= 0`` is the mask of what is
        kept.

    Raises:
        TypeError: A tensor has another dtype.
        ValueError: A shape is wrong, or the weight is not between 0 and 1.

    References:
        YF-T/IDPruner (code). ZOO-Prune: arXiv 2509.24837.
    """
    require_spans("spans", spans)
    per_token("score", score, spans.size, spans.device)
    if float_tensor("vectors", vectors).dim() != 2 or len(vectors) != spans.size or vectors.device != spans.device:
        raise ValueError(
            f"vectors: expected [{spans.size}, d] on {spans.device}, got {describe(vectors)} on {vectors.device}"
        )
    if weight is not None and not 0 <= weight <= 1:
        raise ValueError(f"weight: expected a number from 0 to 1, or None, got {weight}")
    number = quota("k", k, spans)
    steps = k if isinstance(k, int) else int(number.max()) if number.numel() else 0
    x = vectors.detach()
    x = x.float() if x.dtype == torch.float64 else x
    epsilon, equal = (1e-8, 1.0) if weight is None else (1e-6, 0.0)
    importance = scaled(score.detach(), rows_of(spans), epsilon, equal).float()
    return ops.diverse(
        x, importance, *spans.arrays, number, steps, float(weight or 0), weight is None, ops.num_threads()
    )


def sensitivity(
    project: Callable[[Tensor], Tensor],
    x: Tensor,
    directions: int | Tensor = 64,
    step: float = 0.01,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return how far the output of a projection moves when its input does, for each token: a zeroth-order score.

    For random directions ``u[j]`` of length 1, the same for all tokens::

        score[i] = mean over j of |project(x[i] + step * u[j]) - project(x[i] - step * u[j])| / (2 * step)

    Computed in float32 at least; in half precision a coordinate may not move at all. The result is without gradient.

    Args:
        project: Maps ``[N, d]`` to ``[N, e]`` token by token, for example the projector of a vision-language model.
        x: float ``[N, d]``, its inputs.
        directions: Number m of random directions, or the directions, float ``[m, d]``.
        step: Distance in each direction, above 0.
        generator: Source of random numbers, on the device of ``x``.

    Returns:
        float ``[N]``.

    Raises:
        ValueError: A shape is wrong, there is no direction, or the step is not above 0.

    References:
        ZOO-Prune: arXiv 2509.24837.
    """
    if float_tensor("x", x).dim() != 2:
        raise ValueError(f"x: expected [N, d], got {describe(x)}")
    if not step > 0:
        raise ValueError(f"step: expected a number above 0, got {step}")
    x = x.detach().to(ops.accumulated(x.dtype))
    if not isinstance(directions, Tensor):
        shape = (whole_number("directions", directions, 1), x.shape[1])
        directions = torch.randn(shape, generator=generator, device=x.device, dtype=x.dtype)
    elif directions.dim() != 2 or directions.shape[1] != x.shape[1] or len(directions) == 0:
        raise ValueError(f"directions: expected [m, {x.shape[1]}] with m at least 1, got {describe(directions)}")
    u = directions.to(x)
    u = u / (u.norm(dim=1, keepdim=True) + 1e-12)
    total = x.new_zeros(len(x))
    with torch.no_grad():
        for each in u:
            total += (project(x + step * each) - project(x - step * each)).norm(dim=1)
    return total / (2 * step * len(u))
