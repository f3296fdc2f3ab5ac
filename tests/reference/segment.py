"""Reductions as loops in float64."""

import math


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
