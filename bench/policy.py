"""Log-probabilities and entropies with gradient: ours beside torch, eager and compiled.

    python bench/policy.py [--rows 1024] [--vocabulary 49152] [--repeats 5]

Every provider computes both outputs and the gradient of a weighted sum of them. Results are compared with
float64 torch before anything is timed.
"""

from __future__ import annotations

import argparse
import time
import warnings

import torch
from tokcredit import ops, policy


def with_torch(logits, tokens):
    """What trainers write: a float32 log_softmax, a gather, and the entropy from it."""
    everything = torch.log_softmax(logits.float(), -1)
    log_probs = everything.gather(-1, tokens[:, None])[:, 0]
    return log_probs, -(everything.exp() * everything).sum(-1)


def run(provider, logits, tokens, a, h):
    logits.grad = None
    torch.autograd.backward(provider(logits, tokens), (a, h))
    return logits.grad


def seconds(body, repeats):
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        body()
        best = min(best, time.perf_counter() - start)
    return best


def copy_bandwidth(repeats):
    """Bytes per second, read and written, of a 256 MiB copy."""
    source = torch.ones(64 << 20)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), repeats)


def check(provider, logits, tokens, a, h):
    """Compares the first rows with float64."""
    n = 16
    exact = logits.detach()[:n].double().requires_grad_()
    everything = torch.log_softmax(exact, -1)
    expected = everything.gather(-1, tokens[:n, None])[:, 0], -(everything.exp() * everything).sum(-1)
    (slope,) = torch.autograd.grad(expected, exact, (a[:n].double(), h[:n].double()))
    for ours, truth in zip(provider(logits, tokens), expected, strict=True):
        torch.testing.assert_close(ours[:n].double(), truth, rtol=1e-5, atol=1e-5)
    rtol = 2**-7 if logits.dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(run(provider, logits, tokens, a, h)[:n].double(), slope, rtol=rtol, atol=1e-7)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    ops.set_num_threads(torch.get_num_threads())
    warnings.filterwarnings("ignore")
    providers = {
        "tokcredit": policy.log_probs_and_entropies,
        "torch eager": with_torch,
        "torch.compile": torch.compile(with_torch),
    }
    bandwidth = copy_bandwidth(options.repeats)
    print(f"threads {torch.get_num_threads()}, copy {bandwidth / 1e9:.1f} GB/s")
    for dtype in (torch.bfloat16, torch.float32):
        torch.manual_seed(0)
        logits = (torch.randn(options.rows, options.vocabulary) * 3).to(dtype).requires_grad_()
        tokens = torch.randint(0, options.vocabulary, (options.rows,))
        a, h = torch.randn(2, options.rows)
        # Read forward, read backward, write the gradient.
        limit = 3 * logits.nbytes / bandwidth
        print(f"{dtype} {options.rows} x {options.vocabulary}: at copy bandwidth {limit * 1e3:.1f} ms")
        ours = None
        for name, provider in providers.items():
            check(provider, logits, tokens, a, h)
            with torch.no_grad():
                forward = seconds(lambda f=provider, x=logits, t=tokens: f(x, t), options.repeats)
            both = seconds(lambda f=provider, x=logits, t=tokens, a=a, h=h: run(f, x, t, a, h), options.repeats)
            ours = both if ours is None else ours
            print(
                f"  {name:14} forward {forward * 1e3:8.1f} ms   forward+backward {both * 1e3:8.1f} ms"
                f"   {both / ours:5.2f} x ours   {limit / both:4.0%} of copy bandwidth"
            )


if __name__ == "__main__":
    main()
