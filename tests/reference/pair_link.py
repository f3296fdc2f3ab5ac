"""The loss of pairs and its derivatives, one pair at a time in float64, with derivatives by torch."""

import torch
from torch.nn.functional import logsigmoid


def value(function, x, parameter):
    k = torch.sigmoid(x / parameter) if function == "blend" else None
    return {
        "logistic": lambda: -logsigmoid(x),
        "square": lambda: x * x,
        "hinge": lambda: x.clamp(min=0),
        "sigmoid": lambda: torch.sigmoid(x),
        "entropy": lambda: torch.sigmoid(x) * (logsigmoid(x) - parameter),
        "blend": lambda: k * (-x).exp() - (1 - k) * logsigmoid(x),
    }[function]()


def pair_link(scores, terms, pairs, divisors, weights, scale):
    """Total, slopes and table; see ``csrc/ops/pair_link.hpp``."""
    total, slopes, table = 0.0, [0.0] * len(scores), []
    for p, rows in enumerate(pairs):
        own = [scores[r] / max(divisors[r], 1) for r in rows]
        x = torch.tensor(own, dtype=torch.float64)

        def loss(x):
            terms_of = (w * value(f, a * x[0] + b * x[1] + shift, k) for f, w, a, b, shift, k in terms)
            return sum(terms_of, torch.zeros((), dtype=torch.float64))

        first = torch.autograd.functional.jacobian(loss, x).tolist()
        second = torch.autograd.functional.hessian(loss, x)
        table.append([loss(x).item(), *own, *first, second[0, 0].item(), second[0, 1].item(), second[1, 1].item()])
        total += scale * weights[p] * table[-1][0]
        for row, slope in zip(rows, first, strict=True):
            slopes[row] = scale * weights[p] * slope / max(divisors[row], 1)
    return total, slopes, table
