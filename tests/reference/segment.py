"""Reductions as loops in float64."""

import math


def standardize(standard, x, own, epsilon):
    """``x`` held against the numbers of its group that count."""
    n, mean, deviation = len(own), 0.0, 1.0
    if n > 1:
        mean, deviation = sum(own) / n, math.sqrt(reduce("var", own))
    return {
        "centred": x - mean,
        "normalized": (x - mean) / (deviation + epsilon),
        "scaled": x / (deviation + epsilon),
        "leave_one_out": (x - mean) * n / (n - 1) if n > 1 else 0.0,
    }[standard]


def reduce(name, xs, ddof=1.0):
    n = len(xs)
    if name == "count":
        return n
    if name == "sum":
        return sum(xs)
    if name == "mean":
        return sum(xs) / n if n else 0.0
    if name == "var":
        mean = sum(xs) / n if n else 0.0
        return sum((x - mean) ** 2 for x in xs) / (n - ddof) if n > ddof and n else 0.0
    if name == "moments":
        return [reduce(moment, xs, ddof) for moment in ("count", "mean", "var", "minimum", "maximum")]
    if name == "minimum":
        return min(xs, default=math.inf)
    if name == "maximum":
        return max(xs, default=-math.inf)
    top = max(xs, default=-math.inf)
    return top + math.log(sum(math.exp(x - top) for x in xs)) if xs else -math.inf


def row_affine(x, mask, factor, shift):
    """A linear function of the tokens of one row; 0 where masked."""
    return [factor * v + shift if live else 0.0 for v, live in zip(x, mask, strict=True)]
