"""Measure the policy loss of a batch, forward and backward, beside verl, TRL, eager torch and torch.compile."""

from __future__ import annotations

import tokcredit as tc
import torch
from harness import Table, main


def mostly_equal(a, b):
    # Rounding decides on which side of its bound a ratio falls that equals it.
    assert ((a - b).abs() > 1e-3 * a.abs().max()).float().mean() < 1e-4


def step(f):
    """Return a function that runs ``f`` and its backward pass and returns the gradient."""

    def run(x):
        x = x.detach().requires_grad_()
        f(x).backward()
        return x.grad

    return run


def ours(objective, prepared):
    """Return our loss of given log-probs. Like those of verl and TRL it computes its metrics."""

    def loss(log_probs):
        result = objective.loss(prepared, log_probs)
        dict(result.metrics)
        return result.loss

    return loss


def eager_losses(old, mask):
    """Return the clipped and the cumulative loss as trainers write them, with a mean over tokens."""
    position = mask.cumsum(1).clamp(min=1).float()

    def clipped(log_probs, advantages):
        ratio = (log_probs - old).clamp(-20, 20).exp()
        loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.28))
        return (loss * mask).sum() / mask.sum()

    def cumulative(log_probs, advantages):
        difference = ((log_probs - old).clamp(-20, 20) * mask).detach()
        log_q = (difference.cumsum(1) + log_probs - log_probs.detach()).clamp(max=10)
        width = position.sqrt()
        stopped = torch.minimum(torch.maximum(log_q, -0.025 * width), 0.05 * width)
        loss = torch.maximum(-advantages * log_q.exp(), -advantages * stopped.exp())
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * (0.05 * width).exp()), loss)
        return (loss * mask).sum() / mask.sum()

    return clipped, cumulative


def workload(rows, length):
    old = -torch.rand(rows, length)
    mask = torch.rand(rows, length) > 0.05
    tokens = torch.zeros(rows, length, dtype=torch.long)
    batch = tc.Rollouts.from_padded(tokens, mask, torch.arange(rows) // 8, torch.rand(rows), old_log_probs=old)
    return batch, old, mask, tokens


def run(table: Table, quick: bool) -> None:
    from incumbents import trl_loss, verl_loss

    rows, length = (32, 4_096) if quick else (128, 16_384)
    batch, old, mask, tokens = workload(rows, length)
    clipped, cumulative = eager_losses(old, mask)
    real = mask.float()
    verl, trl = verl_loss(0.2, 0.28), trl_loss(0.2, 0.28)
    for name, eager in (("dapo", clipped), ("ctpo", cumulative)):
        objective = tc.methods.load(name)
        prepared = objective.prepare(batch)
        advantages, compiled = prepared.credit, torch.compile(eager)
        providers = {
            "tokcredit": ours(objective, prepared),
            "torch eager": lambda x, f=eager, a=advantages: f(x, a),
            "torch.compile": lambda x, f=compiled, a=advantages: f(x, a),
        }
        targets = {"torch eager": 15, "torch.compile": 3}
        if name == "dapo":
            providers["verl"] = lambda x, a=advantages: verl(x, old, a.expand(rows, length), real)
            providers["TRL"] = lambda x, a=advantages: trl(x, old, a, real, tokens)
            targets = {"verl": 15, "TRL": 15, "torch.compile": 1.5}
        table.measure(
            "policy loss" if name == "dapo" else "cumulative ratio loss",
            f"{rows} x {length}",
            lambda: (old + 0.02 * torch.randn(rows, length),),
            13 * rows * length,  # log_probs, old_log_probs and mask read, gradient written
            {label: step(f) for label, f in providers.items()},
            mostly_equal,
            targets,
        )


if __name__ == "__main__":
    main(run)
