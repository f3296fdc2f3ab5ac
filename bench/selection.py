"""Measure quantiles and top-k of all tokens of a batch beside torch.quantile, torch.kthvalue and torch.topk."""

from __future__ import annotations

import torch
from harness import Table, close, main
from tokcredit import Spans
from tokcredit.blocks import select


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


if __name__ == "__main__":
    main(run)
