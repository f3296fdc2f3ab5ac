"""The masked recurrence as the loop that defines it, in float64. A tensor as decay has one for each row."""

import torch


def scan(x, begin, end, mask=None, decay=1.0, carry=None, reverse=False, exclusive=False):
    y = torch.zeros(x.shape, dtype=torch.float64)
    last = torch.zeros(len(begin), dtype=torch.float64)
    for r, (b, e) in enumerate(zip(begin.tolist(), end.tolist(), strict=True)):
        state = 0.0 if carry is None else carry[r].item()
        factor = decay[r].item() if isinstance(decay, torch.Tensor) else decay
        for t in reversed(range(b, e)) if reverse else range(b, e):
            if mask is not None and not mask[t]:
                continue
            if exclusive:
                y[t] = state
                state = factor * state + x[t].item()
            else:
                state = factor * state + x[t].item()
                y[t] = state
        last[r] = state
    return y, last
