"""Selection by sorting, and the most varied subset by trying all."""

import itertools
import math


def order(x):
    """Sort key: NaN above everything, and 0 equal to -0."""
    return (1, 0.0) if math.isnan(x) else (0, x + 0.0)


def top_k(values, k):
    """Positions of the k largest, ties to the lower one."""
    ranked = sorted(range(len(values)), key=lambda i: (*(-o for o in order(values[i])), i))
    return set(ranked[: max(k, 0)])


def kth(values, rank):
    return sorted(values, key=order)[rank] if 0 <= rank < len(values) else math.nan


def variance(values):
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / len(values)


def most_varied(values, k):
    """The largest variance that a subset of k has."""
    return max(variance(subset) for subset in itertools.combinations(values, k))


def within_mean(values, budget, least):
    """Positions of the smallest values whose mean is at most the budget, ties to the lower one; never NaN."""
    ranked = sorted((i for i in range(len(values)) if not math.isnan(values[i])), key=lambda i: (values[i], i))
    chosen, total = set(), 0.0
    for n, i in enumerate(ranked, 1):
        total += values[i]
        if n > least and total / n > budget:
            break
        chosen.add(i)
    return chosen
