"""The surrogates of one token, written so that torch differentiates them."""

import torch


def token(kind, log_prob, advantage, low, high, cap, reference=None, log_ratio=None, clamp=(-20.0, 20.0)):
    if log_ratio is not None:
        log_q = log_ratio + log_prob - log_prob.detach()
    elif reference is not None:
        log_q = log_prob - reference
    else:
        log_q = log_prob * 0
    log_q = log_q.clamp(*clamp)
    q = log_q.exp()
    if kind == "clip":
        value = torch.maximum(-advantage * q, -advantage * log_q.clamp(low, high).exp())
        return torch.minimum(value, -advantage * cap.exp()) if advantage < 0 else value
    if kind == "weighted":
        return -log_q.clamp(low, high).exp().detach() * advantage * log_prob
    if kind == "soft":
        tau = high if advantage > 0 else low
        return -4 / tau * torch.sigmoid(tau * (q - 1)) * advantage
    if kind == "k1":
        return advantage * log_q
    if kind == "k2":
        return advantage * log_q**2 / 2
    return advantage * ((-log_q).exp() + log_q - 1)
