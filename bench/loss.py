"""The loss of a batch, forward and backward, beside eager torch and torch.compile.

Run: ``python bench/loss.py``. Equality is asserted before anything is timed.
"""

import argparse
import time

import tokcredit as tc
import torch


def median(f, repeats):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--length", type=int, default=16_384)
    parser.add_argument("--repeats", type=int, default=15)
    a = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(a.rows, a.length, generator=generator)
    start = old + 0.02 * torch.randn(a.rows, a.length, generator=generator)
    mask = torch.rand(a.rows, a.length, generator=generator) > 0.05
    rewards = torch.rand(a.rows, generator=generator)
    tokens = torch.zeros(a.rows, a.length, dtype=torch.long)
    batch = tc.Rollouts.from_padded(tokens, mask, torch.arange(a.rows) // 8, rewards, old_log_probs=old)
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

    print(f"{a.rows} x {a.length} tokens, {tc.num_threads()} threads; forward + backward")
    for name, eager in (("dapo", clipped), ("ctpo", cumulative)):
        objective = tc.methods.load(name)
        prepared = objective.prepare(batch)
        compiled = torch.compile(eager)
        providers = {
            "ours": lambda x, o=objective, p=prepared: o.loss(p, x).loss,
            "torch eager": lambda x, f=eager, p=prepared: f(x, p.credits),
            "torch.compile": lambda x, f=compiled, p=prepared: f(x, p.credits),
        }
        gradients = []
        for provider in providers.values():
            x = start.clone().requires_grad_()
            provider(x).backward()
            gradients.append(x.grad)
        for gradient in gradients[1:]:
            # A token whose ratio meets its bound to the last bit may fall on either side.
            assert ((gradient - gradients[0]).abs() > 1e-3 * gradients[0].abs().max()).float().mean() < 1e-5
        times = {}
        for label, provider in providers.items():
            x = start.clone().requires_grad_()

            def step(provider=provider, x=x):
                x.grad = None
                provider(x).backward()

            step()
            times[label] = median(step, a.repeats)
        for label, seconds in times.items():
            print(f"{name:<6}{label:<16}{seconds * 1e3:>8.1f} ms{seconds / times['ours']:>8.1f} x ours")


if __name__ == "__main__":
    main()
