"""The surrogates of one token in float64: values that torch differentiates, and slopes where the paper states those."""

import torch


def binary_divergence(old, log_prob):
    p, q = old.exp(), log_prob.exp()
    return p * (old - log_prob) + (1 - p) * torch.log((1 - p + 1e-8) / (1 - q + 1e-8))


def gated(log_prob, old, x, a, low, high, cap, outside_low, outside_high, given, on, value, both_sides):
    difference = log_prob - old if old is not None else x
    c = {
        "ratio": lambda: x,
        "difference": lambda: difference,
        "probability": lambda: log_prob.exp() - old.exp(),
        "binary_kl": lambda: difference.sign() * binary_divergence(old, log_prob),
        "given": lambda: difference.sign() * given,
    }[on]()
    below = bool(c < low) and bool(both_sides or a < 0)
    above = bool(c > high) and bool(both_sides or a > 0)
    share = outside_high if above else outside_low if below else torch.ones_like(a)
    held = torch.minimum(x, cap)
    if on == "ratio":
        held = high if above else low if below else held
    w = held.exp()
    slope = -a * share * w if share != 0 else torch.zeros_like(a)
    return {"score": slope * log_prob, "ratio": slope, "whole": -a * w}[value].detach(), slope.detach()


def kl(kind, u, q):
    """Estimate and slope; the slope of the corrected one is that of ``q * k3`` with ``q`` differentiated too."""
    return {
        "k1": lambda: (u, torch.ones_like(u)),
        "k2": lambda: (u**2 / 2, u),
        "k3": lambda: ((-u).exp() + u - 1, 1 - (-u).exp()),
        "abs": lambda: (u.abs(), u.sign()),
        "k3_corrected": lambda: (q * ((-u).exp() + u - 1), q * u),
    }[kind]()


def token(kind, log_prob, a, low, high, cap, old=None, log_ratio=None, clamp=(-20.0, 20.0), limit=float("inf"), **gate):
    """Value and slope of one token. ``log_ratio`` is given or None; ``old`` is the reference or None."""
    difference = (
        log_prob - old if old is not None else log_ratio if log_ratio is not None else torch.zeros_like(log_prob)
    )
    raw = difference if log_ratio is None else log_ratio
    x = raw.clamp(*clamp)
    if kind == "gated":
        return gated(log_prob, old, x, a, low, high, cap, **gate)
    if kind in ("clip", "soft"):
        x.requires_grad_()
        q = x.exp()
        if kind == "clip":
            loss = torch.maximum(-a * q, -a * x.clamp(low, high).exp())
            loss = torch.minimum(loss, -a * cap.exp()) if a < 0 else loss
        else:
            tau = high if a > 0 else low
            loss = -4 / tau * torch.sigmoid(tau * (q - 1)) * a
        (slope,) = torch.autograd.grad(loss, x)
        held = bool(raw < clamp[0]) or bool(raw > clamp[1])
        return loss.detach(), torch.zeros_like(slope) if held else slope
    u = difference.clamp(*clamp)
    value, slope = kl(kind, u, torch.ones_like(x) if log_ratio is None else x.exp())
    stopped = value.abs() > limit or bool(difference < clamp[0]) or bool(difference > clamp[1])
    return a * value.clamp(-limit, limit), torch.zeros_like(slope) if stopped else a * slope
