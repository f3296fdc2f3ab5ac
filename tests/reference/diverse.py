"""Greedy choice of important tokens that are unlike each other, with all similarities at hand, in float64."""

import math


def cosine(a, b):
    norm = lambda v: math.sqrt(sum(x * x for x in v)) + 1e-8  # noqa: E731
    return sum(x * y for x, y in zip(a, b, strict=True)) / (norm(a) * norm(b))


def worths(score, vectors, chosen, weight):
    """What each candidate is worth after some choices; ``weight`` None is the product."""
    out = {}
    for i, s in enumerate(score):
        if i in chosen:
            continue
        nearest = max((cosine(vectors[i], vectors[j]) for j in chosen), default=None)
        if not math.isfinite(s) or not all(map(math.isfinite, vectors[i])):
            out[i] = -math.inf
        elif nearest is None:
            out[i] = s
        else:
            out[i] = s * (1 - nearest) if weight is None else weight * s - (1 - weight) * nearest
    return out


def scaled(score, weight):
    finite = [s for s in score if math.isfinite(s)]
    if not finite:
        return score
    low, high = min(finite), max(finite)
    if low == high:
        return [1.0 if weight is None and math.isfinite(s) else 0.0 * s for s in score]
    return [(s - low) / (high - low + (1e-8 if weight is None else 1e-6)) for s in score]
