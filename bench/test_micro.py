"""Microbenchmarks on small inputs: ``pytest bench/`` compares each provider with ours and then times it."""

from __future__ import annotations

import pytest
import tokcredit as tc
import torch
from loss import eager_losses, mostly_equal, ours, step, workload
from tokcredit.blocks import scan, segment, select

ROWS, LENGTH = 64, 2_048
N = ROWS * LENGTH
SPANS = tc.Spans.from_cu_seqlens(torch.arange(ROWS + 1) * LENGTH)


def equal(a, b):
    torch.testing.assert_close(a.reshape(-1), b.reshape(-1), rtol=1e-3, atol=1e-3)


def losses(name):
    batch, old, mask, _ = workload(ROWS, LENGTH)
    objective = tc.methods.load(name)
    prepared = objective.prepare(batch)
    eager = eager_losses(old, mask)[name == "ctpo"]
    x = old + 0.02 * torch.randn(ROWS, LENGTH)
    providers = {"tokcredit": step(ours(objective, prepared)), "torch": step(lambda y: eager(y, prepared.credit))}
    return x, providers, mostly_equal


def logits():
    tokens = torch.randint(0, 4_096, (256,))

    def theirs(x):
        everything = x.log_softmax(-1)
        return everything.gather(-1, tokens[:, None])[:, 0] - (everything.exp() * everything).sum(-1)

    providers = {
        "tokcredit": step(lambda x: sum(y.sum() for y in tc.log_probs.with_entropies(x, tokens))),
        "torch": step(lambda x: theirs(x).sum()),
    }
    return torch.randn(256, 4_096), providers, equal


def operations(**providers):
    return lambda: (torch.randn(N), providers, equal)


CASES = {
    "policy_loss": lambda: losses("dapo"),
    "cumulative_loss": lambda: losses("ctpo"),
    "log_probs": logits,
    "scan": operations(
        tokcredit=lambda x: scan.cumulative(x, SPANS),
        torch=lambda x: x.view(ROWS, LENGTH).cumsum(1),
    ),
    "row_sum": operations(tokcredit=lambda x: segment.sum(x, SPANS), torch=lambda x: x.view(ROWS, LENGTH).sum(1)),
    "row_variance": operations(tokcredit=lambda x: segment.var(x, SPANS), torch=lambda x: x.view(ROWS, LENGTH).var(1)),
    "quantile": operations(
        tokcredit=lambda x: select.quantile(x, 0.8, SPANS, select.everything(SPANS)),
        torch=lambda x: x.quantile(0.8),
    ),
    "row_median": operations(
        tokcredit=lambda x: select.quantile(x, 0.5, SPANS),
        torch=lambda x: x.view(ROWS, LENGTH).quantile(0.5, 1),
    ),
}


@pytest.mark.parametrize("provider", ["tokcredit", "torch"])
@pytest.mark.parametrize("case", CASES)
def test_operation(benchmark, case, provider):
    torch.manual_seed(0)
    x, providers, check = CASES[case]()
    check(providers["tokcredit"](x), providers["torch"](x))
    benchmark.group = case
    benchmark(providers[provider], x)
