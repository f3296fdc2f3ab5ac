"""Measure losses from hidden states beside the functions that trainers call and bare matrix products.

Gradients of all providers are compared with float64 before they are timed. A table of their errors, also at tokens with
a probability above 0.99, goes into the results.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import tokcredit as tc
import torch
from harness import Table, main
from torch import Tensor
from torch.nn import functional
from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

Losses = dict[str, Callable[..., Tensor]]


def log_probs_of_logits(hidden, weight, tokens):
    return (hidden @ weight.t()).float().log_softmax(1).gather(1, tokens[:, None])[:, 0]


def one_pass(hidden, weight, tokens, **settings):
    """Return the mean loss of the tokens, with its gradients in three products."""
    slopes = torch.full((len(tokens),), -1 / len(tokens), device=hidden.device)
    return tc.head.separable_loss(
        hidden, weight, tokens, lambda at, *_: (slopes[at], None), lambda x, _: (slopes * x).sum(), **settings
    )


def two_passes(hidden, weight, tokens, **settings):
    return tc.head.log_probs_and_entropies(hidden, weight, tokens, **settings)[0]


def in_float32(f):
    """Return a provider of ours whose tile of logits is float32."""
    return lambda *inputs: f(*inputs, logits_dtype=torch.float32 if inputs[0].dtype == torch.bfloat16 else None)


def with_torch(reduction):
    def run(hidden, weight, tokens):
        options = LinearCrossEntropyOptions(batch_chunk_size=len(tokens), chunking_method=None)
        return functional.linear_cross_entropy(hidden, weight, tokens, reduction=reduction, options=options)

    return run


def trl(chunk):
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    return lambda h, w, tokens: ChunkedLogProbFunction.apply(h, w, None, tokens, 1.0, chunk, None, 1.0, ())[0]


def verl():
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    return lambda *inputs: FusedLinearForPPO(512)(*inputs)[0]


def verl_triton():
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return lambda *inputs: linear_cross_entropy(*inputs, 1.0, "none", None)[0]


def prime_rl():
    """The output layer of prime-rl's trainer, in chunks of 8,192 tokens as there, from a checkout.

    Its file is loaded alone: the package around it imports models that need torchtitan.
    """
    trainer = importlib.util.find_spec("prime_rl.trainer")
    path = os.path.join(trainer.submodule_search_locations[0], "models", "layers", "lm_head.py")
    spec = importlib.util.spec_from_file_location("prime_rl_lm_head", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    layer = module.FusedOutputLinear(1, 1, 8192)

    def run(hidden, weight, tokens):
        inputs = hidden[None], tokens[None], torch.ones(1, len(tokens), device=hidden.device)
        return torch.func.functional_call(layer, {"weight": weight}, inputs)["logprobs"][0]

    return run


def liger_scaled():
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    def run(*inputs):
        found = LigerFusedLinearScaledCrossEntropyFunction.apply(*inputs)
        return -(found[0] if isinstance(found, tuple) else found)

    return run


def liger_grpo(compiled):
    """GRPO with advantages of 1 on the policy that sampled: its gradient is that of the mean loss."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, compiled=compiled, use_ref_model=False, loss_type="bnpo")

    def run(hidden, weight, tokens):
        rows = tokens.view(4, -1)
        inputs = hidden.view(*rows.shape, -1), weight, rows, torch.ones_like(rows)
        return loss(*inputs, torch.ones(len(rows), device=hidden.device))[0]

    return run


def liger_cross_entropy():
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return lambda *inputs: LigerFusedLinearCrossEntropyFunction.apply(*inputs)[0]


def cut_cross_entropy(kind):
    from cut_cross_entropy import linear_cross_entropy

    return lambda *inputs: linear_cross_entropy(*inputs, impl=kind)


def quack():
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda *inputs: chunked_linear_cross_entropy(*inputs, 4096, reduction="mean")


def installed(makers: dict[str, Callable[[], Callable[..., Tensor]]]) -> Losses:
    """Return the functions whose packages are installed."""
    found: Losses = {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except ImportError as problem:
            print(f"without {name}: {problem}")
    return found


def of_log_probs(device: str) -> Losses:
    """Return functions of hidden states, weight and tokens that give log-probs of the tokens, by name."""
    makers = {
        "tokcredit, two passes": lambda: two_passes,
        "all logits, torch eager": lambda: log_probs_of_logits,
        "all logits, torch.compile": lambda: torch.compile(log_probs_of_logits),
        "torch linear_cross_entropy, none": lambda: lambda *inputs: -with_torch("none")(*inputs),
        "TRL": lambda: trl(32_768),  # as its trainers
        "TRL, one chunk": lambda: trl(1 << 20),
        "verl": verl,
        "prime-rl": prime_rl,
        "Liger, scaled cross-entropy": liger_scaled,
    }
    return installed(makers | ({"verl, Triton": verl_triton} if device == "cuda" else {}))


def of_means(device: str) -> Losses:
    """Return functions of hidden states, weight and tokens that give the mean loss of the tokens, by name."""
    cuda = device == "cuda"
    kind = "cce" if cuda else "torch_compile"
    makers = {
        "tokcredit, one pass": lambda: one_pass,
        "torch linear_cross_entropy, mean": lambda: with_torch("mean"),
        "Liger, GRPO": lambda: liger_grpo(compiled=cuda),
        f"cut-cross-entropy, {kind}": lambda: cut_cross_entropy(kind),
    }
    return installed(makers | ({"Liger, cross-entropy": liger_cross_entropy, "quack": quack} if cuda else {}))


def differentiated(f, mean=False):
    """Return a provider that gives the gradients of the mean loss by hidden states and weight."""

    def step(hidden, weight, tokens):
        h, w = (x.detach().requires_grad_() for x in (hidden, weight))
        return torch.autograd.grad(f(h, w, tokens) if mean else -f(h, w, tokens).float().mean(), (h, w))

    return step


def products(hidden, weight, tokens):
    z = hidden @ weight.t()
    return z @ weight, z.t() @ hidden


def error(found, truth):
    return float((found.double() - truth).norm() / truth.norm())


def examples(n, d, v, dtype, device="cpu"):
    """Return hidden states, weight and tokens; every second token has a probability above 0.99."""
    weight = torch.randn(v, d, device=device).mul_(0.3)
    tokens = torch.randint(0, v, (n,), device=device)
    hidden = torch.randn(n, d, device=device).mul_(0.8)
    scale = torch.empty(n // 2, 1, device=device).uniform_(15, 20)
    hidden[::2] = weight[tokens[::2]] * (scale / weight[tokens[::2]].square().sum(1, keepdim=True))
    return hidden.to(dtype), weight.to(dtype), tokens


def errors(f, mean, inputs):
    """Return how far log-probs (if there are any) and gradients of a provider are from float64.

    Returns:
        The largest error of a log-prob or None, the relative error of the gradient of hidden states, that at tokens
        with a probability above 0.99, and that of the gradient of the weight.
    """
    exact = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    h, w = (x.requires_grad_() for x in exact[:2])
    log_probs = (h @ w.t()).log_softmax(1).gather(1, inputs[2][:, None])[:, 0]
    truth = torch.autograd.grad(-log_probs.mean(), (h, w))
    found = differentiated(f, mean)(*inputs)
    sure = log_probs.detach().exp() > 0.99
    far = None if mean else float((f(*inputs).detach().double() - log_probs).detach().abs().max())
    of_sure = error(found[0][sure], truth[0][sure]) if sure.any() else 0.0
    return far, error(found[0], truth[0]), of_sure, error(found[1], truth[1])


def running(device: str, dtype: torch.dtype) -> tuple[Losses, Losses]:
    """Return the functions of log-probs and of means that run here and whose gradients are right."""
    kept: tuple[Losses, Losses] = {}, {}
    inputs = [x.to(device) for x in examples(64, 128, 512, torch.float32)]
    inputs[0], inputs[1] = inputs[0].mul(0.5).to(dtype), inputs[1].to(dtype)
    for mean, functions in enumerate((of_log_probs(device), of_means(device))):
        for name, f in functions.items():
            try:
                _, of_hidden, _, of_weight = errors(f, bool(mean), inputs)
            except Exception as problem:  # of many kinds, by what the machine lacks
                print(f"{name}, {dtype}: {str(problem).strip().splitlines()[:1]}")
                continue
            if max(of_hidden, of_weight) < (5e-2 if dtype == torch.bfloat16 else 1e-4):
                kept[mean][name] = f
            else:
                print(f"{name}, {dtype}: errors of the gradients {of_hidden:.1e} and {of_weight:.1e}: not timed")
    return kept


def measure(table: Table, n: int, d: int, v: int, dtype: torch.dtype, device: str) -> None:
    """Measure a mean loss with its gradients."""
    log_probs, means = running(device, dtype)
    providers = {"tokcredit, one pass": differentiated(means.pop("tokcredit, one pass"), True)}
    providers |= {name: differentiated(f) for name, f in log_probs.items()}
    providers |= {name: differentiated(f, True) for name, f in means.items()}
    # One pass may take 1.15 times as long as the products alone, in bfloat16 1.4 times.
    bare = 1 / (1.4 if dtype == torch.bfloat16 else 1.15)
    targets = {name: 1.0 for name in providers if not name.startswith("tokcredit")} | {"three bare products": bare}
    hidden, weight = (torch.randn(k, d, device=device).mul_(0.3).to(dtype) for k in (n, v))
    tokens = torch.randint(0, v, (n,), device=device)
    table.measure(
        f"loss from hidden states, {str(dtype).removeprefix('torch.')}",
        f"{n} x {d} x {v}",
        lambda: (hidden, weight, tokens),
        2 * (hidden.nbytes + weight.nbytes),  # read, and their gradients written
        {**providers, "three bare products": products},
        targets=targets,
    )


def lines_of_memory(table: Table, n: int, d: int, v: int, dtype: torch.dtype) -> list[str]:
    """Return the peak memory of ours beside that of its formula: a tile of logits, and the two gradients."""
    head = tc.head.Head(torch.empty(v, d, dtype=dtype))
    size, tiles = dtype.itemsize, -(-n // head.tile_rows)
    # A sum over several tiles is float32.
    summed = 4 * v * d if tiles > 1 and size < 4 else 0
    formula = (size * min(n, head.tile_rows) * v + summed + size * (n + v) * d) / 2**20
    found = {r.provider: r for r in table.results if r.operation.endswith(str(dtype).removeprefix("torch."))}
    bare, lines = found["three bare products"].milliseconds, []
    for name in ("tokcredit, one pass", "tokcredit, two passes"):
        r = found[name]
        lines.append(
            f"- {name.removeprefix('tokcredit, ')}, {str(dtype).removeprefix('torch.')}: {r.milliseconds / bare:.2f} "
            f"times as long as three bare products; {r.megabytes:.0f} MiB, by the formula {formula:.0f} MiB."
        )
    return lines


def lines_of_accuracy() -> list[str]:
    """Return a table of errors in bfloat16."""
    lines = [
        "Errors in bfloat16 against float64, of 1,024 tokens, width 128 and 4,096 ids. Half of the tokens have a "
        "probability above 0.99. `dh` and `dW` are the errors of the gradients of the hidden states and of the weight, "
        "relative to their norms; a *float32 tile* holds its logits in float32:",
        "",
        "| provider | log-prob, largest error | dh | dh where p > 0.99 | dW |",
        "| --- | --- | --- | --- | --- |",
    ]
    log_probs, means = running("cpu", torch.bfloat16)
    log_probs["tokcredit, two passes, float32 tile"] = in_float32(two_passes)
    means["tokcredit, one pass, float32 tile"] = in_float32(one_pass)
    inputs = examples(1024, 128, 4096, torch.bfloat16)
    for mean, functions in enumerate((log_probs, means)):
        for name, f in functions.items():
            cells = ("" if x is None else f"{x:.1e}" for x in errors(f, bool(mean), inputs))
            lines.append(f"| {name} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    return lines


def run(table: Table, quick: bool) -> None:
    shape = (128, 256, 16_384) if quick else (512, 576, 49_152)
    lines = []
    for dtype in (torch.float32, torch.bfloat16):
        measure(table, *shape, dtype, "cpu")
        lines += lines_of_memory(table, *shape, dtype)
    table.sections["Losses from hidden states"] = [*lines, "", *lines_of_accuracy()]


if __name__ == "__main__":
    main(run)
