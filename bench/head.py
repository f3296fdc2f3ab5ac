"""Measure losses and log-probs from hidden states beside the functions that trainers call, and bare matrix products."""

from __future__ import annotations

import tokcredit as tc
import torch
from harness import Table, main
from torch.nn import functional
from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions


def exact(hidden, weight, tokens, slopes):
    """Return the gradients of ``sum(slopes * log_probs)`` in float64."""
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    log_probs = (h @ w.t()).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    return torch.autograd.grad((log_probs * slopes.double()).sum(), (h, w))


def differentiated(f):
    """Return a provider that takes a loss of hidden states and weight and gives both gradients."""

    def step(hidden, weight, tokens, slopes):
        h, w = (x.detach().requires_grad_() for x in (hidden, weight))
        return torch.autograd.grad(f(h, w, tokens, slopes), (h, w))

    return step


def check(name, provider, dtype):
    """Compare the gradients of a provider with float64 on small inputs."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 32, generator=g).mul_(0.4).to(dtype) for n in (40, 300))
    tokens = torch.randint(0, 300, (40,), generator=g)
    slopes = torch.full((40,), -1 / 40) if "mean" in name else torch.randn(40, generator=g)
    for found, truth in zip(
        provider(hidden, weight, tokens, slopes), exact(hidden, weight, tokens, slopes), strict=True
    ):
        error = (found.double() - truth).norm() / truth.norm()
        assert error < (2e-2 if dtype == torch.bfloat16 else 1e-4), f"{name}: error of {error:.1e}"


def run(table: Table, quick: bool) -> None:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    n, d, v = (128, 256, 16_384) if quick else (512, 576, 49_152)

    def one_pass(hidden, weight, tokens, slopes):
        return tc.head.separable_loss(
            hidden,
            weight,
            tokens,
            lambda at, log_probs, entropies: (slopes[at], None),
            lambda log_probs, entropies: (slopes * log_probs).sum(),
        )

    def two_passes(hidden, weight, tokens, slopes):
        return (slopes * tc.head.log_probs_and_entropies(hidden, weight, tokens)[0]).sum()

    def all_logits(hidden, weight, tokens, slopes):
        return (slopes * (hidden @ weight.t()).float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]).sum()

    def with_torch(hidden, weight, tokens, slopes):
        options = LinearCrossEntropyOptions(batch_chunk_size=len(tokens), chunking_method=None)
        return functional.linear_cross_entropy(hidden, weight, tokens, options=options)

    def with_trl(hidden, weight, tokens, slopes):
        log_probs = ChunkedLogProbFunction.apply(hidden, weight, None, tokens, 1.0, 256, None, 1.0, ())[0]
        return (slopes * log_probs.view(-1)).sum()

    def with_verl(hidden, weight, tokens, slopes):
        return (slopes * FusedLinearForPPO(512)(hidden, weight, tokens)[0]).sum()

    def products(hidden, weight, tokens, slopes):
        z = hidden @ weight.t()
        return z @ weight, z.t() @ hidden

    providers = {
        "tokcredit, one pass": differentiated(one_pass),
        "tokcredit, two passes": differentiated(two_passes),
        "all logits, torch eager": differentiated(all_logits),
        "torch linear_cross_entropy, mean": differentiated(with_torch),
        "TRL": differentiated(with_trl),
        "verl": differentiated(with_verl),
    }
    for dtype in (torch.float32, torch.bfloat16):
        for name, provider in providers.items():
            check(name, provider, dtype)
        name = str(dtype).removeprefix("torch.")
        hidden, weight = torch.randn(n, d).mul_(0.3).to(dtype), torch.randn(v, d).mul_(0.3).to(dtype)
        tokens, slopes = torch.randint(0, v, (n,)), torch.full((n,), -1 / n)
        table.measure(
            f"loss from hidden states, {name}",
            f"{n} x {d} x {v}",
            lambda inputs=(hidden, weight, tokens, slopes): inputs,
            2 * (hidden.nbytes + weight.nbytes),  # read, and their gradients written
            {**providers, "three bare products": products},
            targets={"all logits, torch eager": 1, "torch linear_cross_entropy, mean": 1, "TRL": 1.5, "verl": 1.5},
        )


if __name__ == "__main__":
    main(run)
