"""Divergences between two distributions as the loops that define them, in float64."""

import math

import torch


def softmax(logits, temperature):
    z = [v / temperature for v in logits]
    most = max(z)
    total = math.fsum(math.exp(v - most) for v in z)
    return [math.exp(v - most) / total for v in z]


def kl(p, q):
    if any(a > 0 and b == 0 for a, b in zip(p, q, strict=True)):
        return math.inf
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def of_probabilities(p, q, kind, share):
    m = None if share is None else [share * b + (1 - share) * a for a, b in zip(p, q, strict=True)]
    return {
        "forward_kl": lambda: kl(q, p),
        "reverse_kl": lambda: kl(p, q),
        "skew_forward": lambda: kl(q, m),
        "skew_reverse": lambda: kl(p, m),
        "js": lambda: share * kl(q, m) + (1 - share) * kl(p, m),
    }[kind]()


def slopes(p, q, kind, share):
    """The derivative of the divergence by each probability of p, less what is the same for all."""

    def slope(a, b):
        m = None if share is None else share * b + (1 - share) * a
        if a == 0:
            return 0.0  # is multiplied by it
        if kind == "forward_kl":
            return -b / a
        if kind == "reverse_kl":
            return math.log(a / b) if b > 0 else math.inf
        if kind == "js":
            return (1 - share) * math.log(a / m)
        if kind == "skew_forward":
            return -(1 - share) * b / m
        return math.log(a / m) + share * b / m

    return [slope(a, b) for a, b in zip(p, q, strict=True)]


def mixed(logits, other, weight):
    return [a if a == -math.inf or weight == 0 else a + weight * (a - b) for a, b in zip(logits, other, strict=True)]


def divergence(student, teacher, kind, share=None, temperature=1.0, mask=None):
    """Values, entropies of the student and the gradient of the sum of the values by the student's logits."""
    values, entropies = torch.zeros(2, len(student), dtype=torch.float64)
    grad = torch.zeros(student.shape, dtype=torch.float64)
    for i in range(len(student)):
        if mask is not None and not mask[i]:
            continue
        p, q = (softmax(x[i].double().tolist(), temperature) for x in (student, teacher))
        values[i] = of_probabilities(p, q, kind, share)
        entropies[i] = -math.fsum(a * math.log(a) for a in p if a > 0)
        if not values[i].isfinite():
            grad[i] = math.nan
            continue
        by_p = slopes(p, q, kind, share)
        mean = math.fsum(a * s for a, s in zip(p, by_p, strict=True))
        for j, (a, s) in enumerate(zip(p, by_p, strict=True)):
            grad[i, j] = a * (s - mean) / temperature
    return values, entropies, grad


def divergence_top(student, ids, log_probs, kind, share=None, outside="bucket", temperature=1.0, mask=None):
    """The same from a teacher's log-probs of some ids; the gradient by central differences."""
    values, grad = torch.zeros(len(student), dtype=torch.float64), torch.zeros(student.shape, dtype=torch.float64)

    def value(logits, own, given):
        p = softmax(logits, temperature)
        a, b = [p[j] for j in own], [math.exp(x) for x in given]
        if outside == "cut":
            first, second = (b, a) if kind == "forward_kl" else (a, b)
            return math.fsum(x * math.log(x / y) for x, y in zip(first, second, strict=True) if x > 0)
        if outside == "renormalised":
            return of_probabilities([x / sum(a) for x in a], [x / sum(b) for x in b], kind, share)
        rest = math.fsum(p[j] for j in range(len(p)) if j not in own)
        left = max(1 - math.fsum(b), 1e-7 if rest > 0 else 0)
        return of_probabilities([*a, rest], [*b, left], kind, share)

    for i in range(len(student)):
        if mask is not None and not mask[i]:
            continue
        known = {}
        for j, x in zip(ids[i].tolist(), log_probs[i].double().tolist(), strict=True):
            if j >= 0:
                known.setdefault(j, x)
        logits, own, given = student[i].double().tolist(), list(known), list(known.values())
        values[i] = value(logits, own, given)
        for j in range(len(logits)):
            step = 1e-5
            sides = [value([*logits[:j], logits[j] + s * step, *logits[j + 1 :]], own, given) for s in (1, -1)]
            grad[i, j] = (sides[0] - sides[1]) / (2 * step)
    return values, grad
