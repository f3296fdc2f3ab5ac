"""Measure how time grows with tokens, group size and row length, and draw it into ``bench/scaling.png``."""

from __future__ import annotations

import json
import time
from pathlib import Path

import tokcredit as tc
import torch
from harness import Table, main
from tokcredit.blocks import scan, segment, select


def seconds(f, budget=0.3):
    """Return the median time of a few calls."""
    f()
    times = []
    while sum(times) < budget and len(times) < 9:
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def batch_of(rows, length, group):
    """Return a batch whose rows share their first half with the others of their group."""
    tokens = torch.randint(0, 50_000, (rows, length), dtype=torch.int32)
    first = torch.arange(rows) // group * group
    tokens[:, : length // 2] = tokens[first, : length // 2]
    n = rows * length
    return tc.Rollouts(
        tokens.view(-1), torch.arange(0, n + 1, length), first, torch.rand(rows), old_log_probs=torch.full((n,), -1.0)
    )


def operations(batch):
    """Return what is timed, by name. Each takes time in proportion to the tokens."""
    x, spans = torch.rand(batch.num_tokens), batch.spans
    tempo, dapo = tc.methods.tempo().credit, tc.methods.load("dapo")
    prepared = dapo.prepare(batch)
    leaf = x.sub(1).requires_grad_()

    def loss():
        leaf.grad = None
        dapo.loss(prepared, leaf).loss.backward()

    return {
        "tree + credit": lambda: tempo(batch),
        "scan": lambda: scan.returns(x, spans, 0.99),
        "row sums": lambda: segment.sum(x, spans),
        "quantile": lambda: select.quantile(x, 0.8, spans, select.everything(spans)),
        "policy loss": loss,
    }


def sweep(points, shape_of):
    curves = {}
    for point in points:
        for name, f in operations(batch_of(*shape_of(point))).items():
            curves.setdefault(name, []).append(seconds(f))
    return curves


def run(table: Table, quick: bool) -> None:
    most = 20 if quick else 26
    tokens = [10_000, 100_000, 1_000_000] + ([] if quick else [10_000_000, 100_000_000])
    curves = {
        "tokens": (tokens, sweep(tokens, lambda n: (n // 1_000, 1_000, 10))),
        "rows in a group": (
            sizes := [2, 8, 32, 128, 512, 1_024],
            sweep(sizes, lambda g: (1_024, 1 << (most - 12), g)),
        ),
        "tokens in a row": (
            lengths := [64, 512, 4_096, 32_768, 1 << (most - 9)],
            sweep(lengths, lambda t: ((1 << (most - 4)) // t, t, 8)),
        ),
    }
    folder = Path(__file__).parent
    (folder / "results").mkdir(exist_ok=True)
    if not quick:
        draw(curves, folder / "scaling.png")
        (folder / "results" / "scaling.json").write_text(json.dumps(curves, indent=1) + "\n")
    points, by_name = curves["tokens"]
    for name, times in by_name.items():
        print(
            f"{name:<16}"
            + "".join(f"{n:>12} tokens {1e9 * t / n:>7.2f} ns each" for n, t in zip(points, times, strict=True))
        )


def draw(curves, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for axis, (label, (points, by_name)) in zip(axes, curves.items(), strict=True):
        for name, times in by_name.items():
            axis.loglog(points, [1e3 * t for t in times], marker="o", label=name)
        axis.set_xlabel(label)
        axis.set_ylabel("ms")
        axis.grid(alpha=0.3)
    base = curves["tokens"][0]
    axes[0].loglog(base, [n * 1e-6 for n in base], "k:", label="1 ns a token")
    axes[0].legend()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main(run)
