"""Measure quantiles and top-k of all tokens of a batch beside torch, and maximal marginal relevance beside a loop."""

from __future__ import annotations

import torch
from harness import Table, close, main
from tokcredit import Spans
from tokcredit.blocks import select
from torch import Tensor


def relevance_loop(score: Tensor, vectors: Tensor, k: int) -> Tensor:
    """IDPruner as its repository has it: one row of similarities for each choice."""
    s = (score - score.min()) / (score.max() - score.min() + 1e-6)
    x = vectors / (vectors.norm(dim=1, keepdim=True) + 1e-8)
    order = torch.full_like(score, -1, dtype=torch.int64)
    nearest = torch.full_like(score, -2.0)
    pick = s.argmax()
    for step in range(k):
        order[pick] = step
        nearest = torch.maximum(nearest, x @ x[pick])
        pick = (0.5 * s - 0.5 * nearest).masked_fill(order >= 0, -torch.inf).argmax()
    return order


def run(table: Table, quick: bool) -> None:
    for n in (1 << 20, 1 << 22) if quick else (1 << 24, 1 << 26):
        spans = Spans.from_cu_seqlens(torch.arange(0, n + 1, 16_384))
        everything = select.everything(spans)
        providers = {"tokcredit": lambda x, s=spans, e=everything: select.quantile(x, 0.8, s, e)}
        if n <= 1 << 24:
            providers["torch.quantile"] = lambda x: x.quantile(0.8)[None]
        else:
            try:
                torch.zeros(n).quantile(0.8)
            except RuntimeError as refusal:
                print(f"torch.quantile of {n}: {refusal}")
        shape = f"{n >> 20} M"
        table.measure(
            "quantile", shape, lambda n=n: (torch.randn(n),), 4 * n, providers, close(1e-6, 1e-6), {"torch.quantile": 5}
        )
        k = n // 5

        def topk(x, k=k, n=n):
            return torch.zeros(n, dtype=torch.bool).index_fill_(0, x.topk(k, sorted=False).indices, True)

        def kthvalue(x, k=k, n=n):
            return x >= x.kthvalue(n - k + 1).values

        table.measure(
            "top fifth of all tokens",
            shape,
            lambda n=n: (torch.rand(n, dtype=torch.float64).float(),),
            5 * n,
            {
                "tokcredit": lambda x, k=k, s=spans, e=everything: select.top_k(x, k, s, e),
                "torch.topk": topk,
                "torch.kthvalue": kthvalue,
            },
            # Of equal values torch marks others, or more of them.
            lambda a, b: torch.testing.assert_close(a.sum().float(), b.sum().float(), rtol=1e-5, atol=2),
            {"torch.topk": 5},
        )
    for n, k, width in ((576, 64, 256),) if quick else ((576, 64, 1024), (2880, 160, 1024), (2880, 640, 1024)):

        def arguments(n: int = n, width: int = width) -> tuple[Tensor, Tensor]:
            return torch.rand(n), torch.randn(n, width)

        table.measure(
            "maximal marginal relevance",
            f"{k} of {n}, {width} wide",
            arguments,
            4 * n * width,
            {
                "tokcredit": lambda s, x, k=k, n=n: select.diverse(s, x, k, Spans.single(n, s.device)),
                "torch loop": lambda s, x, k=k: relevance_loop(s, x, k),
            },
            close(0, 0),
        )


if __name__ == "__main__":
    main(run)
