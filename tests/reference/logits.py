"""Rows of logits as the loops that define them, in float64."""

import math

import torch


def scaled(logits, temperature, scale, softcap):
    """``z`` of a row, and its derivative to each logit."""
    z, slopes = [], []
    for x in logits.double().tolist():
        capped = math.isfinite(softcap) and x != -math.inf
        z.append((softcap * math.tanh(scale * x / softcap) if capped else scale * x) / temperature)
        slope = 1 / math.cosh(min(abs(scale * x / softcap), 300)) ** 2 if math.isfinite(softcap) else 1
        slopes.append(slope * scale / temperature)
    return z, slopes


def log_p(z):
    most = max(z)
    logsumexp = most + math.log(math.fsum(math.exp(v - most) for v in z))
    return [v - logsumexp for v in z], logsumexp


def every(logits, tokens, temperature=1.0, scale=1.0, softcap=math.inf, chosen=None):
    """Log-probs, entropies, squares, log-probs of chosen ids, and log-normalizers."""
    temperatures = torch.as_tensor(temperature, dtype=torch.float64).expand(len(tokens)).tolist()
    log_probs, entropies, squares, logsumexp = torch.zeros(4, len(tokens), dtype=torch.float64)
    of_chosen = torch.zeros(len(tokens), 0 if chosen is None else chosen.shape[1], dtype=torch.float64)
    for i, token in enumerate(tokens.tolist()):
        if token == -1:
            continue
        logs, logsumexp[i] = log_p(scaled(logits[i], temperatures[i], scale, softcap)[0])
        log_probs[i] = logs[token]
        entropies[i] = -math.fsum(math.exp(v) * v for v in logs if v != -math.inf)
        squares[i] = math.fsum(math.exp(2 * v) for v in logs)
        for k, c in enumerate([] if chosen is None else chosen[i].tolist()):
            of_chosen[i, k] = logs[c] if c >= 0 else 0
    return log_probs, entropies, squares, of_chosen, logsumexp


def logits(logits, tokens, temperature=1.0):
    return every(logits, tokens, temperature)[:2]


def every_gradient(logits, tokens, given, temperature=1.0, scale=1.0, softcap=math.inf, chosen=None):
    """The gradient, given those to log-probs, entropies, squares and log-probs of chosen ids, each or None for 0."""
    temperatures = torch.as_tensor(temperature, dtype=torch.float64).expand(len(tokens)).tolist()
    _, entropies, squares, *_ = every(logits, tokens, temperature, scale, softcap, chosen)
    a, h, q = (torch.zeros(len(tokens)) if x is None else x for x in given[:3])
    grad = torch.zeros(logits.shape, dtype=torch.float64)
    for i, token in enumerate(tokens.tolist()):
        if token == -1:
            continue
        z, slopes = scaled(logits[i], temperatures[i], scale, softcap)
        own = [0.0] * len(z)
        own[token] += a[i].item()
        for c, slope in zip(chosen[i].tolist(), given[3][i].tolist(), strict=True) if given[3] is not None else []:
            if c >= 0:
                own[c] += slope
        every_own = math.fsum(own)
        for j, log in enumerate(log_p(z)[0]):
            p = math.exp(log)
            slope = own[j] - every_own * p + 2 * q[i].item() * p * (p - squares[i].item())
            if p > 0:
                slope -= h[i].item() * p * (log + entropies[i].item())
            grad[i, j] = slope * slopes[j]
    return grad


def logits_gradient(logits, tokens, grad_log_probs, grad_entropies, temperature=1.0):
    return every_gradient(logits, tokens, (grad_log_probs, grad_entropies, None, None), temperature)
