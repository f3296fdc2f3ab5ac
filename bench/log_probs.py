"""Measure log-probs and entropies of logits, with gradient, beside TRL, verl, torch eager and torch.compile."""

from __future__ import annotations

import tokcredit as tc
import torch
from harness import Table, main


def with_torch(logits, tokens):
    """Return log-probs and entropies by a log_softmax in float32 or float64 and a gather."""
    everything = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), -1)
    log_probs = everything.gather(-1, tokens[:, None])[:, 0]
    return log_probs, -(everything.exp() * everything).sum(-1)


def check(provider, logits, tokens, a, h):
    """Compare the results and the gradient of a few rows with float64."""
    exact = logits.detach().double().requires_grad_()
    expected = with_torch(exact, tokens)
    (slope,) = torch.autograd.grad(expected, exact, (a.double(), h.double()))
    # TRL and verl compute in the dtype of the logits.
    low = logits.dtype == torch.bfloat16
    x = logits.detach().requires_grad_()
    outputs = provider(x, tokens)
    for ours, truth in zip(outputs, expected, strict=True):
        torch.testing.assert_close(
            ours.detach().double(), truth.detach(), rtol=2e-2 if low else 1e-4, atol=0.1 if low else 1e-4
        )
    torch.autograd.backward(outputs, (a.to(outputs[0].dtype), h.to(outputs[1].dtype)))
    torch.testing.assert_close(x.grad.double(), slope, rtol=5e-2 if low else 1e-3, atol=5e-3 if low else 1e-6)


def run(table: Table, quick: bool) -> None:
    from incumbents import selective_log_softmax_and_entropy, verl_functional

    rows, vocabulary = (128, 49_152) if quick else (1_024, 49_152)
    providers = {
        "tokcredit": tc.log_probs.with_entropies,
        "torch eager": with_torch,
        "torch.compile": torch.compile(with_torch),
        "TRL": selective_log_softmax_and_entropy,
        "verl": lambda x, t: (
            verl_functional.logprobs_from_logits_v2(x, t),
            verl_functional.entropy_from_logits(x),
        ),
    }
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        logits = torch.empty(rows, vocabulary, dtype=dtype).normal_(0, 3)
        tokens = torch.randint(0, vocabulary, (rows,))
        a, h = torch.randn(2, rows)
        for provider in providers.values():
            check(provider, logits[:8], tokens[:8], a[:8], h[:8])

        def step(f, x=logits, t=tokens, a=a, h=h):
            def body():
                leaf = x.detach().requires_grad_()
                outputs = f(leaf, t)
                torch.autograd.backward(outputs, (a.to(outputs[0].dtype), h.to(outputs[1].dtype)))
                return leaf.grad

            return body

        table.measure(
            f"log-probs + entropy, {name}",
            f"{rows} x {vocabulary}",
            lambda: (),
            3 * logits.nbytes,  # read forward, read backward, the gradient written
            {label: step(f) for label, f in providers.items()},
            targets={"TRL": 3, "verl": 3, "torch.compile": 1},
        )


if __name__ == "__main__":
    main(run)
