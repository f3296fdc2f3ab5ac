"""What token scores do, one token at a time in float64."""

import math


def log_deviation(x, begin, end, mask, quantile, floor, positive):
    """The distance of each token's logarithm, None where masked, and the statistics."""
    rows = zip(begin.tolist(), end.tolist(), strict=True)
    live = [t for b, e in rows for t in range(b, e) if mask is None or mask[t]]
    v = {t: math.log(max(x[t].item(), floor)) for t in live}
    out = [None] * len(x)
    if not live:
        return out, None
    pivot = sorted(v.values())[round(quantile * (len(v) - 1))]
    spread = math.sqrt(max(sum((a - pivot) ** 2 for a in v.values()) / len(v), floor))
    low = max(pivot - min(v.values()), floor * spread)
    high = max(max(v.values()) - pivot, floor * spread)
    for t, a in v.items():
        d = a - pivot
        out[t] = d / high if d > 0 else d / (-low if positive else low)
    return out, [pivot, spread, -low / spread, high / spread]


def ranges(h, low, high, widen):
    return low * (1 - widen * min(h, 0.0)), high * (1 + widen * max(h, 0.0))


def bounds(h, low, high, widen):
    below, above = ranges(h, low, high, widen)
    return math.log(1 - below) if below < 1 else -math.inf, math.log(1 + above)


def factor(h, log_ratio, below, above, strength):
    q = math.exp(log_ratio)
    inner = 1 - below / 2 < q < 1 + above / 2
    return 1 + strength * h if (h > 0) != inner else 1.0
