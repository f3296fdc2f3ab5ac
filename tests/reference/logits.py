"""Log-probability and entropy as the loops that define them, in float64."""

import math

import torch


def logits(logits, tokens, temperature=1.0):
    log_probs = torch.zeros(len(tokens), dtype=torch.float64)
    entropies = torch.zeros(len(tokens), dtype=torch.float64)
    for i, token in enumerate(tokens.tolist()):
        if token == -1:
            continue
        z = [v / temperature for v in logits[i].double().tolist()]
        most = max(z)
        logsumexp = most + math.log(math.fsum(math.exp(v - most) for v in z))
        log_probs[i] = z[token] - logsumexp
        entropies[i] = -math.fsum(math.exp(v - logsumexp) * (v - logsumexp) for v in z if v != -math.inf)
    return log_probs, entropies


def logits_gradient(logits, tokens, grad_log_probs, grad_entropies, temperature=1.0):
    _, entropies = globals()["logits"](logits, tokens, temperature)
    grad = torch.zeros(logits.shape, dtype=torch.float64)
    for i, token in enumerate(tokens.tolist()):
        if token == -1:
            continue
        z = [v / temperature for v in logits[i].double().tolist()]
        most = max(z)
        logsumexp = most + math.log(math.fsum(math.exp(v - most) for v in z))
        a, h = grad_log_probs[i].item(), grad_entropies[i].item()
        for j, v in enumerate(z):
            p = math.exp(v - logsumexp)
            slope = a * ((j == token) - p)
            if p > 0:
                slope -= h * p * (v - logsumexp + entropies[i].item())
            grad[i, j] = slope / temperature
    return grad
