"""Measure every operation on the GPU beside torch eager, torch.compile, torch's own operation and a Triton kernel.

Run: ``python bench/gpu.py [--json FILE] [--tokens N]``. Results are compared before anything is timed. For rates and
their share of the copy rate see ``harness.py``.
"""

from __future__ import annotations

import argparse
import json
import warnings

import tokcredit as tc
import torch
from harness import Table
from tokcredit import ops
from tokcredit.blocks import scan, segment, select, tree, values

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def close(a, b, rtol=1e-4, atol=1e-4):
    for x, y in zip(a if isinstance(a, tuple) else (a,), b if isinstance(b, tuple) else (b,), strict=False):
        if x is not None and y is not None:
            torch.testing.assert_close(x.double().reshape(-1), y.double().reshape(-1), rtol=rtol, atol=atol)


def equal_rows(rows, length):
    return tc.Spans.from_cu_seqlens(torch.arange(rows + 1, device="cuda") * length)


def random(*shape, scale=1.0):
    return scale * torch.randn(*shape, device="cuda")


def streams(table, rows, length):
    """Measure operations that read and write each token once."""
    n, shape = rows * length, f"{rows} x {length}"
    spans = equal_rows(rows, length)
    mask = torch.rand(n, device="cuda") > 0.05

    table.measure(
        "expand (one per row)",
        shape,
        lambda: (random(rows),),
        4 * n,
        {
            "tokcredit": lambda x: ops.spread(x, spans),
            "torch expand": lambda x: x[:, None].expand(rows, length).contiguous(),
            "torch repeat_interleave": lambda x: torch.repeat_interleave(x, length, output_size=n),
        },
        close,
    )
    table.measure(
        "scan",
        shape,
        lambda: (random(n),),
        8 * n,
        {
            "tokcredit": lambda x: scan.cumulative(x, spans),
            "torch.cumsum": lambda x: x.view(rows, length).cumsum(1),
        },
        lambda a, b: close(a, b, 1e-3, 1e-1),
    )
    table.measure(
        "scan, masked, decay 0.99",
        shape,
        lambda: (random(n),),
        9 * n,
        {"tokcredit": lambda x: scan.returns(x, spans.with_mask(mask), 0.99)},
    )
    offsets = torch.arange(rows + 1, device="cuda") * length
    for name in ("sum", "maximum", "var"):
        theirs = {"sum": "sum", "maximum": "max"}.get(name)
        providers = {
            "tokcredit": lambda x, name=name: getattr(segment, name)(x, spans),
            "torch": lambda x, name=name: {
                "sum": lambda v: v.sum(1),
                "maximum": lambda v: v.amax(1),
                "var": lambda v: v.var(1),
            }[name](x.view(rows, length)),
        }
        if theirs:
            providers["torch.segment_reduce"] = lambda x, r=theirs: torch.segment_reduce(x, r, offsets=offsets)
        table.measure(
            f"segment {name}", shape, lambda: (random(n),), 4 * n, providers, lambda a, b: close(a, b, 1e-3, 1e-1)
        )
    k = max(1, length // 5)
    table.measure(
        "top_k per row, k = T / 5",
        shape,
        lambda: (random(n),),
        5 * n,
        {
            "tokcredit": lambda x: select.top_k(x, k, spans),
            "torch.topk": lambda x: torch.zeros(rows, length, dtype=torch.bool, device="cuda").scatter_(
                1, x.view(rows, length).topk(k, 1).indices, True
            ),
        },
        lambda a, b: close(a.view(rows, length).sum(1), b.sum(1)),
    )
    table.measure(
        "quantile, global",
        shape,
        lambda: (random(n),),
        4 * n,
        {
            "tokcredit": lambda x: select.quantile_nearest(x, 0.8, spans, select.everything(spans)),
            "torch.kthvalue": lambda x: x.kthvalue(1 + round(0.8 * (n - 1))).values,
        },
        close,
    )


def losses(table, rows, length):
    """Measure losses forward and backward. They must read log_probs, old_log_probs and mask and write the gradient."""
    n, shape = rows * length, f"{rows} x {length}"
    old = -torch.rand(rows, length, device="cuda")
    mask = torch.rand(rows, length, device="cuda") > 0.05
    batch = tc.Rollouts.from_padded(
        torch.zeros(rows, length, dtype=torch.int32, device="cuda"),
        mask,
        torch.arange(rows, device="cuda") // 8,
        torch.rand(rows, device="cuda"),
        old_log_probs=old,
    )
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

    def step(f):
        def run(x):
            x = x.detach().requires_grad_()
            f(x).backward()
            return x.grad

        return run

    def mostly_equal(a, b):
        # Rounding decides on which side of its bound a ratio falls that equals it.
        assert ((a - b).abs() > 1e-3 * a.abs().max()).float().mean() < 1e-4

    for name, eager in (("dapo", clipped), ("ctpo", cumulative)):
        objective = tc.methods.load(name)
        prepared = objective.prepare(batch)
        compiled = torch.compile(eager)
        advantages = prepared.credit
        table.measure(
            f"loss + gradient ({name})",
            shape,
            lambda: (old + random(rows, length, scale=0.02),),
            13 * n,
            {
                "tokcredit": step(lambda x, o=objective, p=prepared: o.loss(p, x).loss),
                "torch eager": step(lambda x, f=eager, a=advantages: f(x, a)),
                "torch.compile": step(lambda x, f=compiled, a=advantages: f(x, a)),
            },
            mostly_equal,
        )
    spans, advantages = batch.spans, torch.ones(rows, 1, device="cuda")
    for label, options in (("", {}), (", cumulative", {"cumulative": True, "power": 0.5})):
        settings = {"low": -1.0, "high": 1.0, "bound": 20.0, "clamp": (-20.0, 10.0), **options}
        table.measure(
            f"policy_loss kernel{label}",
            shape,
            lambda: (old + random(rows, length, scale=0.02),),
            13 * n,
            {
                "tokcredit": lambda x, s=settings: ops.policy_loss(
                    x.view(-1).requires_grad_(), spans, "clip", reference=old.view(-1), advantages=advantages, **s
                )
            },
        )


if triton is not None:

    @triton.jit
    def _log_prob_entropy(logits, tokens, log_probs, entropies, vocabulary, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        logits += row * vocabulary
        most = -float("inf")
        total = 0.0
        weighted = 0.0
        for start in range(0, vocabulary, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(logits + at, mask=at < vocabulary, other=-float("inf")).to(tl.float32)
            new = tl.maximum(most, tl.max(x, 0))
            shrink = tl.exp(most - new)
            p = tl.exp(x - new)
            total = total * shrink + tl.sum(p, 0)
            weighted = weighted * shrink + tl.sum(tl.where(at < vocabulary, p * x, 0.0), 0)
            most = new
        logsumexp = most + tl.log(total)
        chosen = tl.load(logits + tl.load(tokens + row)).to(tl.float32)
        tl.store(log_probs + row, chosen - logsumexp)
        tl.store(entropies + row, logsumexp - weighted / total)


def with_triton(logits, tokens):
    log_probs = torch.empty(tokens.shape, device="cuda")
    entropies = torch.empty(tokens.shape, device="cuda")
    _log_prob_entropy[(logits.shape[0],)](
        logits, tokens, log_probs, entropies, logits.shape[1], BLOCK=4096, num_warps=8
    )
    return log_probs, entropies


def with_torch(logits, tokens):
    """Return log-probs and entropies as trainers write them: a float32 log_softmax and a gather."""
    everything = torch.log_softmax(logits.float(), -1)
    log_probs = everything.gather(-1, tokens[:, None])[:, 0]
    return log_probs, -(everything.exp() * everything).sum(-1)


def logits(table, rows, vocabulary, dtype):
    shape = f"{rows} x {vocabulary} {str(dtype).removeprefix('torch.')}"
    tokens = torch.randint(0, vocabulary, (rows,), device="cuda")
    make = lambda: ((3 * torch.randn(rows, vocabulary, device="cuda")).to(dtype),)  # noqa: E731
    size = rows * vocabulary * dtype.itemsize
    compiled = torch.compile(with_torch)
    providers = {
        "tokcredit": lambda x: tc.log_probs.with_entropies(x, tokens),
        "torch eager": lambda x: with_torch(x, tokens),
        "torch.compile": lambda x: compiled(x, tokens),
    }
    if triton is not None:
        providers["triton"] = lambda x: with_triton(x, tokens)
    table.measure("logits forward", shape, make, size, providers, close)
    log_probs, entropies, logsumexp = torch.ops.tokcredit.logits(*make(), tokens, 1.0, 1)
    ones = torch.ones_like(log_probs)
    table.measure(
        "logits backward",
        shape,
        make,
        2 * size,
        {
            "tokcredit": lambda x: torch.ops.tokcredit.logits_gradient(
                x, tokens, 1.0, logsumexp, entropies, ones, ones, 1
            )
        },
    )

    def both(f):
        def run(x):
            x = x.detach().requires_grad_()
            log_probs, entropies = f(x)
            (log_probs.sum() + 0.1 * entropies.sum()).backward()
            return x.grad

        return run

    del providers["triton" if triton is not None else "torch.compile"]
    table.measure(
        "logits forward + backward",
        shape,
        make,
        3 * size,
        {name: both(f) for name, f in providers.items()},
        lambda a, b: close(a, b, 2e-2, 1e-4),
    )


def trees(table, rows, length, group=16):
    """Measure prefix trees of rollouts that share about their first half and branch one after another from there."""
    n, shape = rows * length, f"{rows} x {length}"
    tokens = torch.randint(0, 50_000, (rows, length), device="cuda", dtype=torch.int64)
    shared = (length // 2 * torch.rand(rows, device="cuda")).long() + length // 4
    first = torch.arange(rows, device="cuda") // group * group
    tokens = torch.where(torch.arange(length, device="cuda") < shared[:, None], tokens[first], tokens)
    mask = torch.ones(rows, length, dtype=torch.bool, device="cuda")
    batch = tc.Rollouts.from_padded(tokens, mask, first, torch.rand(rows, device="cuda"))
    like = torch.empty(n, device="cuda")
    table.measure("write N floats", shape, lambda: (), 4 * n, {"torch zero_": lambda: like.zero_()})
    compared = int(shared.sum()) * 2 * tokens.element_size()
    table.measure("tree", shape, lambda: (), compared, {"tokcredit": lambda: tree.build(batch)})

    def credit():
        built = tree.build(batch)
        change = values.temporal_difference(built, values.monte_carlo(built))
        return built.expand(row=batch.rewards, head=change)

    credit()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        credit()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        credit()
    providers = {"tokcredit": credit, "tokcredit, as a graph": graph.replay}
    table.measure("tree + values + expand", shape, lambda: (), compared + 5 * n, providers)
    objective = tc.methods.load("tempo")
    table.measure(
        "tempo credit stage", shape, lambda: (), compared + 5 * n, {"tokcredit": lambda: objective.credit(batch)}
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--json")
    parser.add_argument("--tokens", type=int, default=64 << 20)
    a = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    table = Table()
    streams(table, a.tokens // 16_384, 16_384)
    streams(table, a.tokens // 131_072 // 8, 131_072)
    streams(table, a.tokens // 128, 128)
    losses(table, a.tokens // 16_384, 16_384)
    losses(table, 1024, 16_384)
    logits(table, 4096, 151_936, torch.bfloat16)
    logits(table, 1024, 151_936, torch.float32)
    trees(table, 1024, 16_384)
    print()
    for r in table.results:
        print(Table.line(r))
    if a.json:
        with open(a.json, "w") as file:
            json.dump(table.summary(), file, indent=1)


if __name__ == "__main__":
    main()
