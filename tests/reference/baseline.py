"""Advantages over the baseline of least variance as the loops that define them, in float64."""

import math

import torch


def baseline(log_probs, squares, rewards, begin, end, mask, group, epsilon=1e-8):
    """Advantages and returns ``[N]``; rewards are ``[N]``, or one per row, ``[R, 1]``."""
    advantages, returns = (torch.zeros(log_probs.shape, dtype=torch.float64) for _ in range(2))
    spans = list(zip(begin.tolist(), end.tolist(), strict=True))
    energies, to_go = {}, {}
    for r, (b, e) in enumerate(spans):
        tokens = [t for t in range(b, e) if mask is None or mask[t]]
        energy = 0.0
        for t in tokens:
            energy += max(0.0, 1 - 2 * math.exp(log_probs[t].item()) + squares[t].item())
            energies[t] = energy
        later = 0.0
        for t in reversed(tokens):
            later += rewards[t].item() if rewards.dim() == 1 else 0.0
            to_go[t] = later if rewards.dim() == 1 else rewards[r, 0].item()
    for g in set(group.tolist()):
        own = [span for span, of in zip(spans, group.tolist(), strict=True) if of == g]
        for j in range(max(e - b for b, e in own)):
            there = [b + j for b, e in own if b + j < e and b + j in to_go]
            mean = 0.0
            if len(there) > 1:
                mean = sum(energies[t] * to_go[t] for t in there) / (sum(energies[t] for t in there) + epsilon)
            for t in there:
                returns[t] = to_go[t]
                advantages[t] = to_go[t] - mean
    return advantages, returns
