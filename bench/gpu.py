"""Measure every operation on the GPU beside torch eager, torch.compile, torch's own operation and a Triton kernel.

Run: ``python bench/gpu.py [--json FILE] [--tokens N]``. Results are compared before anything is timed. For rates and
their share of the copy rate see ``harness.py``; beside it stands the share that ``sass.txt`` says the machine code
allows. ``--device cpu --tokens 50000`` runs all of it on small inputs without a GPU, but for CUDA graphs.
"""

from __future__ import annotations

import argparse
import json
import re
import warnings
from pathlib import Path

import tokcredit as tc
import torch
from divergence import with_torch as torch_divergence
from harness import Table
from head import measure as measure_head
from tokcredit import ops
from tokcredit.blocks import scan, segment, select, tree

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


# The kernel that does most of an operation's work, in sass.txt; {} is the dtype.
KERNELS = {
    "expand": "expand: expand_tiles<float>",
    "scan": "scan: scan_tiles<{}, false>",
    "segment sum": "segment: reduce_tiles<{}, 0>",
    "segment var": "segment: reduce_tiles<{}, 2>",
    "segment logsumexp": "segment: reduce_tiles<{}, 6>",
    "policy loss, clip": "policy_loss: policy_loss_tiles<0, {}, true>",
    "policy loss, soft": "policy_loss: policy_loss_tiles<1, {}, true>",
    "policy loss, k3": "policy_loss: policy_loss_tiles<3, {}, true>",
    "policy loss, cumulative": "policy_loss: policy_loss_chained<0, {}>",
    "logits forward": "logits: forward<{}, 512>",
    "logits backward": "logits: backward<{}, 512>",
    "divergence forward_kl, forward": "divergence: forward<0, {}, 256>",
    "divergence js, forward": "divergence: forward<2, {}, 256>",
}
DEVICE = "cuda"  # or "cpu", on small inputs
COMPILES = False  # whether torch.compile and Triton are measured too
SASS_NAMES = {torch.float32: "float", torch.bfloat16: "bf16"}


def model_shares():
    """Return the shares of the copy rate in sass.txt, by kernel, for the device's architecture."""
    major, minor = torch.cuda.get_device_capability() if DEVICE == "cuda" else (9, 0)
    found, wanted = {}, f"sm_{major}{minor}"
    for line in (Path(__file__).parent / "sass.txt").read_text().splitlines():
        if line.startswith("sm_"):
            architecture = line.split()[0]
        elif (row := re.match(r"(\S+: .*?>)\s.*?(\d+)%$", line)) and architecture == wanted:
            found[row[1]] = int(row[2]) / 100
    return found


def compiles():
    """Return whether torch.compile works here. It needs a C compiler and the headers of Python."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(4, device=DEVICE))
    except Exception as error:  # of many kinds, by what is missing
        print(f"without torch.compile and Triton: {str(error).strip().splitlines()[0]}")
        return False
    return True


def named(dtype):
    return str(dtype).removeprefix("torch.")


def close(a, b, rtol=1e-4, atol=1e-4):
    for x, y in zip(a if isinstance(a, tuple) else (a,), b if isinstance(b, tuple) else (b,), strict=False):
        if x is not None and y is not None:
            torch.testing.assert_close(x.double().reshape(-1), y.double().reshape(-1), rtol=rtol, atol=atol)


def equal_rows(rows, length):
    return tc.Spans.from_cu_seqlens(torch.arange(rows + 1, device=DEVICE) * length)


def random(*shape, scale=1.0):
    return scale * torch.randn(*shape, device=DEVICE)


def streams(table, rows, length):
    """Measure operations that read and write each token once."""
    n, shape = rows * length, f"{rows} x {length}"
    spans = equal_rows(rows, length)
    mask = torch.rand(n, device=DEVICE) > 0.05

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
    offsets = torch.arange(rows + 1, device=DEVICE) * length
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
            "torch.topk": lambda x: torch.zeros(rows, length, dtype=torch.bool, device=DEVICE).scatter_(
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


def packed(table, name, lengths, dtype):
    """Measure what reads and writes each token once on packed rows of these lengths, in one launch or a few."""
    ends = lengths.to(DEVICE).cumsum(0)
    spans = tc.Spans.from_cu_seqlens(torch.cat([ends.new_zeros(1), ends]))
    n, width, rows = spans.size, dtype.itemsize, spans.num_rows
    marks = torch.rand(n, device=DEVICE) < 0.02
    some = spans.with_mask(torch.rand(n, device=DEVICE) > 0.05)
    advantages = torch.randn(rows, 1, device=DEVICE)
    shape = f"{name} {named(dtype)}"

    def loss(surrogate, **settings):
        return lambda x, y: ops.policy_loss(
            x.requires_grad_(), some, surrogate, reference=y, advantages=advantages, clamp=(-20.0, 20.0), **settings
        )

    def one():
        return (random(n, scale=0.1).to(dtype),)

    def pair():
        return (*one(), *one())

    works = {
        "expand": (lambda: (random(rows),), 4, lambda x: ops.spread(x, spans)),
        "scan": (one, width + 4, lambda x: scan.cumulative(x, spans)),
        "scan, masked, decay 0.99": (one, width + 5, lambda x: scan.returns(x, some, 0.99)),
        "segment sum": (one, width + 1, lambda x: segment.sum(x, some)),
        "segment var": (one, width + 1, lambda x: segment.var(x, some)),
        "segment logsumexp": (one, width + 1, lambda x: segment.logsumexp(x, some)),
        "policy loss, clip": (pair, 2 * width + 5, loss("clip", low=-0.2, high=0.2)),
        "policy loss, soft": (pair, 2 * width + 5, loss("soft", low=1.05, high=1.0)),
        "policy loss, k3": (pair, 2 * width + 5, loss("k3")),
        "policy loss, cumulative": (
            pair,
            2 * width + 5,
            loss("clip", low=-1.0, high=1.0, cumulative=True, bound=20.0),
        ),
        "log deviation": (
            lambda: (random(n).to(dtype).abs(),),
            width + 5,
            lambda x: ops.log_deviation(x, some, 0.8, 1e-8),
        ),
        "score factor": (
            pair,
            2 * width + 4,
            lambda x, y: ops.score_factor(x.float(), y.float(), advantages, some, 1.0, (0.2, 0.28, 1.0)),
        ),
        "pieces": (lambda: (marks.clone(),), 2, lambda x: ops.pieces(x, spans, "before")),
    }
    for operation, (make, moved, ours) in works.items():
        table.measure(operation, shape, make, moved * n, {"tokcredit": ours})


def losses(table, rows, length):
    """Measure losses forward and backward. They must read log_probs, old_log_probs and mask and write the gradient."""
    n, shape = rows * length, f"{rows} x {length}"
    old = -torch.rand(rows, length, device=DEVICE)
    mask = torch.rand(rows, length, device=DEVICE) > 0.05
    batch = tc.Rollouts.from_padded(
        torch.zeros(rows, length, dtype=torch.int32, device=DEVICE),
        mask,
        torch.arange(rows, device=DEVICE) // 8,
        torch.rand(rows, device=DEVICE),
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
        advantages = prepared.credit
        providers = {
            "tokcredit": step(lambda x, o=objective, p=prepared: o.loss(p, x).loss),
            "torch eager": step(lambda x, f=eager, a=advantages: f(x, a)),
        }
        if COMPILES:
            compiled = torch.compile(eager)
            providers["torch.compile"] = step(lambda x, f=compiled, a=advantages: f(x, a))
        table.measure(
            f"loss + gradient ({name})",
            shape,
            lambda: (old + random(rows, length, scale=0.02),),
            13 * n,
            providers,
            mostly_equal,
        )
    spans, advantages = batch.spans, torch.ones(rows, 1, device=DEVICE)
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
    log_probs = torch.empty(tokens.shape, device=DEVICE)
    entropies = torch.empty(tokens.shape, device=DEVICE)
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
    tokens = torch.randint(0, vocabulary, (rows,), device=DEVICE)
    make = lambda: ((3 * torch.randn(rows, vocabulary, device=DEVICE)).to(dtype),)  # noqa: E731
    size = rows * vocabulary * dtype.itemsize
    providers = {
        "tokcredit": lambda x: tc.log_probs.with_entropies(x, tokens),
        "torch eager": lambda x: with_torch(x, tokens),
    }
    if COMPILES:
        compiled = torch.compile(with_torch)
        providers["torch.compile"] = lambda x: compiled(x, tokens)
    forward = dict(providers)
    if COMPILES and triton is not None:
        forward["triton"] = lambda x: with_triton(x, tokens)
    table.measure("logits forward", shape, make, size, forward, close)
    rows = (tokens, 1.0, None, 1.0, float("inf"), None)
    log_probs, entropies, _, _, logsumexp = torch.ops.tokcredit.logits(*make(), *rows, False, 1)
    ones = torch.ones_like(log_probs)
    table.measure(
        "logits backward",
        shape,
        make,
        2 * size,
        {
            "tokcredit": lambda x: torch.ops.tokcredit.logits_gradient(
                x, *rows, 0, -1, logsumexp, entropies, None, ones, ones, None, None, 1
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

    table.measure(
        "logits forward + backward",
        shape,
        make,
        3 * size,
        {name: both(f) for name, f in providers.items()},
        lambda a, b: close(a, b, 2e-2, 1e-4),
    )


def divergences(table, rows, vocabulary, dtype):
    """Measure divergences, which read the logits of both, and their gradient, which is written beside."""
    shape = f"{rows} x {vocabulary} {named(dtype)}"
    size = rows * vocabulary * dtype.itemsize

    def make():
        return tuple((3 * random(rows, vocabulary)).to(dtype) for _ in range(2))

    def gradient(student, teacher, kind, share):
        student = student.detach().requires_grad_()
        tc.divergence.between(student, teacher, kind, share).sum().backward()
        return student.grad

    for kind, share in (("forward_kl", None), ("js", 0.5)):
        providers = {
            "tokcredit": lambda x, y, k=kind, s=share: tc.divergence.between(x, y, k, s),
            "torch eager": lambda x, y, k=kind, s=share: torch_divergence(x, y, k, s),
        }
        table.measure(f"divergence {kind}, forward", shape, make, 2 * size, providers, close)
        table.measure(
            f"divergence {kind}, both passes",
            shape,
            make,
            5 * size,
            {"tokcredit": lambda x, y, k=kind, s=share: gradient(x, y, k, s)},
        )


def captured(name, step):
    """Return the replay of a step's launches as a CUDA graph, or None where it cannot be captured."""
    if DEVICE == "cpu":
        return None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:
        print(f"{name}: no CUDA graph: {str(error).splitlines()[0]}")
        return None
    return graph.replay


def whole_methods(table, rows, length, group=8):
    """Measure all that a step asks of the library: prepare, loss and backward, and the last two alone."""
    n, shape = rows * length, f"{rows} x {length}"
    old, current = (-torch.rand(rows, length, device=DEVICE) for _ in range(2))
    batch = tc.Rollouts.from_padded(
        torch.randint(0, 50_000, (rows, length), device=DEVICE),
        torch.rand(rows, length, device=DEVICE) > 0.05,
        torch.arange(rows, device=DEVICE) // group,
        torch.rand(rows, device=DEVICE),
        old_log_probs=old,
    )
    for name in ("grpo", "tempo", "ctpo"):
        objective, log_probs = tc.methods.load(name), current.clone().requires_grad_()
        prepared = objective.prepare(batch)

        def train(prepared, objective=objective, log_probs=log_probs):
            log_probs.grad = None
            objective.loss(prepared, log_probs).loss.backward()

        steps = {
            "prepare + loss + backward": lambda o=objective, f=train: f(o.prepare(batch)),
            "loss + backward": lambda p=prepared, f=train: f(p),
        }
        for what, step in steps.items():
            providers = {"eager": step}
            if replay := captured(f"{name}, {what}", step):
                providers["CUDA graph"] = replay
            table.measure(f"{name}, {what}", shape, lambda: (), 13 * n, providers)


def trees(table, rows, length, dtype, group=16):
    """Measure prefix trees of rollouts that share about their first half and branch one after another from there."""
    n, shape = rows * length, f"{rows} x {length} {named(dtype)}"
    tokens = torch.randint(0, 50_000, (rows, length), device=DEVICE, dtype=dtype)
    shared = (length // 2 * torch.rand(rows, device=DEVICE)).long() + length // 4
    first = torch.arange(rows, device=DEVICE) // group * group
    tokens = torch.where(torch.arange(length, device=DEVICE) < shared[:, None], tokens[first], tokens)
    mask = torch.ones(rows, length, dtype=torch.bool, device=DEVICE)
    batch = tc.Rollouts.from_padded(tokens, mask, first, torch.rand(rows, device=DEVICE))
    like = torch.empty(n, device=DEVICE)
    table.measure("write N floats", shape, lambda: (), 4 * n, {"torch zero_": lambda: like.zero_()})
    compared = int(shared.sum()) * 2 * tokens.element_size()
    table.measure("tree", shape, lambda: (), compared, {"tokcredit": lambda: tree.build(batch)})

    credit = tc.methods.load("tempo").credit
    providers = {"tokcredit": lambda: credit(batch)}
    if replay := captured("TEMPO's credit", lambda: credit(batch)):
        providers["CUDA graph"] = replay
    table.measure("tree + TEMPO's credit", shape, lambda: (), compared + 5 * n, providers)


def with_model(result, shares):
    """Return a line of the table, with the model's share where it knows the kernel."""
    dtype = next((d for d in SASS_NAMES if named(d) in result.shape), torch.float32)
    share = shares.get(KERNELS.get(result.operation, "").format(SASS_NAMES[dtype]))
    return Table.line(result) + (f"  model {share:.0%}" if share and result.provider == "tokcredit" else "")


def main():
    global DEVICE, COMPILES
    parser = argparse.ArgumentParser()
    parser.add_argument("--json")
    parser.add_argument("--tokens", type=int, default=64 << 20)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    a = parser.parse_args()
    DEVICE, small = a.device, a.device == "cpu"
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    table, tokens, COMPILES = Table(DEVICE), a.tokens, not small and compiles()
    lengths = {
        "rows of 2k-14k": torch.randint(2000, 14_001, (max(2, tokens // 8000),)),
        "rows of 20-400": torch.randint(20, 401, (min(65_536, tokens // 210),)),
        "rows of 1000": torch.full((tokens // 1000,), 1000),
        "a row of 1M": torch.tensor([min(tokens, 1_000_000)]),
        "16 rows of 500": torch.full((16,), 500),  # launches
    }
    for name, each in lengths.items():
        for dtype in SASS_NAMES:
            packed(table, name, each, dtype)
    for rows, length in ((32, 512), (8, 1000)) if small else ((32, 512), (1024, 9200)):
        whole_methods(table, rows, length)
    for length in (128,) if small else (16_384, 131_072, 128):
        streams(table, tokens // length // (8 if length > 100_000 else 1), length)
    losses(table, 8 if small else 1024, 1000 if small else 16_384)
    vocabulary = 500 if small else 151_936
    logits(table, 4 if small else 4096, vocabulary, torch.bfloat16)
    logits(table, 4 if small else 1024, vocabulary, torch.float32)
    divergences(table, 4 if small else 1024, vocabulary, torch.bfloat16)
    shape = (16, 32, 500) if small else (8192, 4096, 151_936)
    measure_head(table, *shape, torch.bfloat16, DEVICE)
    for dtype in (torch.int32, torch.int64):
        trees(table, 16 if small else 1024, 500 if small else 16_384, dtype)
    shares = model_shares()
    print()
    for r in table.results:
        print(with_model(r, shares))
    if a.json:
        with open(a.json, "w") as file:
            json.dump(table.summary(), file, indent=1)


if __name__ == "__main__":
    main()
