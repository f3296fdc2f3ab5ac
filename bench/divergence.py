"""Measure divergences with gradient beside log-probs, TRL's functions, torch eager and torch.compile."""

from __future__ import annotations

import tokcredit as tc
import torch
from harness import Table, main
from head import installed
from tokcredit.blocks.distilled_head import distilled_loss

KINDS = (("forward_kl", None), ("reverse_kl", None), ("js", 0.5), ("skew_forward", 0.1), ("skew_reverse", 0.9))


def with_torch(student, teacher, kind, share):
    """Return divergences by two log_softmax in float32 or float64."""
    wide = student.dtype if student.dtype == torch.float64 else torch.float32
    log_p, log_q = (x.to(wide).log_softmax(-1) for x in (student, teacher))
    if kind == "forward_kl":
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    if kind == "reverse_kl":
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    log_m = torch.log(share * log_q.exp() + (1 - share) * log_p.exp())
    to_q, to_p = (log_q.exp() * (log_q - log_m)).sum(-1), (log_p.exp() * (log_p - log_m)).sum(-1)
    return {"js": share * to_q + (1 - share) * to_p, "skew_forward": to_q, "skew_reverse": to_p}[kind]


def with_gkd(student, teacher, kind, share):
    """Return the divergence summed over positions as GKD's trainer computes it."""
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "js": share}[kind]
    return GKDTrainer.generalized_jsd_loss(student[None], teacher[None], beta=beta, reduction="sum")


def differentiated(f):
    """Return a provider that gives the gradient of the values, weighed by slopes."""

    def step(student, slopes):
        leaf = student.detach().requires_grad_()
        values = f(leaf)
        torch.autograd.backward(values, slopes.to(values.dtype) if values.dim() else None)
        return leaf.grad

    return step


def check(provider, student, teacher, kind, share):
    """Compare the gradient of a few rows with float64."""
    exact = student.double().requires_grad_()
    (slope,) = torch.autograd.grad(with_torch(exact, teacher.double(), kind, share).sum(), exact)
    seen = differentiated(lambda x: provider(x, teacher))(student, torch.ones(len(student))).double()
    error = (seen - slope).norm() / slope.norm()
    assert error < (5e-2 if student.dtype == torch.bfloat16 else 1e-3), f"{kind}: error of {error:.1e}"


def timed(table, name, student, providers, targets, matrices=2):
    """Measure providers alone and with the gradient of the student."""
    slopes = torch.randn(len(student))
    forward = {label: lambda x, _, f=f: f(x) for label, f in providers.items()}
    both = {label: differentiated(f) for label, f in providers.items()}
    # With a gradient all are read a second time, and one is written.
    for what, moved, made in (("forward", matrices, forward), ("with gradient", 2 * matrices + 1, both)):
        table.measure(
            f"{name}, {str(student.dtype).removeprefix('torch.')}, {what}",
            " x ".join(map(str, student.shape)),
            lambda: (student, slopes),
            moved * student.nbytes,
            made,
            targets=targets,
        )


def log_probs_of(student):
    """Return log-probs and entropies of the same rows: a divergence should take at most 2.5 times as long."""
    tokens = torch.randint(0, student.shape[1], (len(student),))
    return lambda x: tc.log_probs.from_logits(x, tokens)


def measure(table, student, teacher, kind, share):
    """Measure one divergence between two rows of logits."""

    def eager(x, y):
        return with_torch(x, y, kind, share)

    providers = {"tokcredit": lambda x, y: tc.divergence.between(x, y, kind, share), "torch eager": eager}
    if not kind.startswith("skew"):
        providers["TRL, GKD"] = lambda x, y: with_gkd(x, y, kind, share)
    for provider in providers.values():
        check(provider, student[:8], teacher[:8], kind, share)
    if kind in ("forward_kl", "js"):
        torch.compiler.reset()  # one function is compiled a few times only
        providers["torch.compile"] = torch.compile(eager, dynamic=False)
        check(providers["torch.compile"], student, teacher, kind, share)
    made = {label: lambda x, f=f: f(x, teacher) for label, f in providers.items()}
    made["log-probs + entropy"] = log_probs_of(student)
    timed(table, kind, student, made, {"TRL, GKD": 5, "torch.compile": 1, "log-probs + entropy": 0.4})


def measure_teachers(table, student, teacher, top):
    """Measure divergences from a mixture of two teachers and from the most likely ids of one."""
    likely, ids = teacher.float().log_softmax(-1).topk(top)
    other = (teacher.float() + torch.randn(teacher.shape)).to(teacher.dtype)
    mixture = tc.divergence.Mixture(teacher, other, torch.full((len(student),), 0.5))

    def of_top(outside):
        known = tc.divergence.Top(ids, likely, outside)
        return lambda x: tc.divergence.between(x, known, "forward_kl")

    def renormalised(x):
        """Return the divergence over the ids alone, as TRL and NeMo-RL compute it."""
        p, q = x.float().gather(-1, ids).log_softmax(-1), likely.log_softmax(-1)
        return (q.exp() * (q - p)).sum(-1)

    logits = {"log-probs + entropy": log_probs_of(student)}
    for kind, share in KINDS[:3]:
        ours = {"tokcredit": lambda x, k=kind, s=share: tc.divergence.between(x, mixture, k, s)}
        timed(table, f"{kind} of a mixture", student, ours | logits, {"log-probs + entropy": 0.4}, 3)
    for outside in tc.divergence.OUTSIDES:
        providers = {"tokcredit": of_top(outside)} | logits
        if outside == "renormalised":
            providers["torch eager, the ids alone"] = renormalised
        timed(table, f"forward_kl of {top} ids, {outside}", student, providers, {"log-probs + entropy": 0.4}, 1)


def with_chunks(hidden, weight, teacher_hidden, teacher_weight, slopes, kind, share):
    """Return a loss of TRL's divergence from hidden states."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "js": share}[kind]
    values, _ = ChunkedDivergenceFunction.apply(hidden, weight, None, teacher_hidden, teacher_weight, None, beta)
    return (values * slopes).sum()


def liger_js(kind, share):
    """Return Liger's mean divergence from hidden states, in torch."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "js": share}[kind]
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False)

    def run(hidden, weight, teacher_hidden, teacher_weight):
        tokens = torch.zeros(len(hidden), dtype=torch.long)
        return loss(hidden, weight, teacher_hidden, teacher_weight, tokens)

    return run


def measure_hidden(table, rows, width, vocabulary, dtype, kind, share):
    """Measure a loss of divergences from the hidden states of both models, with gradients of student and weight."""
    student, teacher = ([torch.randn(n, width).mul_(0.3).to(dtype) for n in (rows, vocabulary)] for _ in range(2))
    tokens, slopes = torch.randint(0, vocabulary, (rows,)), torch.full((rows,), 1 / rows)

    def ours(hidden, weight, *others):
        return distilled_loss(
            hidden,
            weight,
            tokens,
            (others[0], tc.head.Head(others[1])),
            lambda x, y, temperature, overwrite: tc.divergence.between(
                x, y, kind, share, temperature, overwrite=overwrite
            ),
            lambda at, *_: slopes[at],
            lambda values, *_: (values * slopes).sum(),
        )

    def eager(hidden, weight, *others):
        return (with_torch(hidden @ weight.t(), others[0] @ others[1].t(), kind, share) * slopes).sum()

    def chunked(hidden, weight, *others):
        return with_chunks(hidden, weight, *others, slopes, kind, share)

    def of_both(f):
        def step(hidden, weight, *others):
            leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
            return torch.autograd.grad(f(*leaves, *others), leaves)

        return step

    def products(hidden, weight, *others):
        z, _ = hidden @ weight.t(), others[0] @ others[1].t()
        return z @ weight, z.t() @ hidden

    functions = {"tokcredit": ours, "torch eager": eager, "TRL": chunked}
    functions |= installed({"Liger": lambda: liger_js(kind, share)})
    providers = {label: of_both(f) for label, f in functions.items()}
    exact = of_both(eager)(*(x.double() for x in (*student, *teacher)))
    for label, provider in providers.items():
        for found, truth in zip(provider(*student, *teacher), exact, strict=True):
            error = (found.double() - truth).norm() / truth.norm()
            limit = 1e-3 if dtype == torch.float32 else 3e-2 if label == "tokcredit" else 6e-2
            assert error < limit, f"{label}, {kind}: error of {error:.1e}"
    table.measure(
        f"{kind} from hidden states, {str(dtype).removeprefix('torch.')}",
        f"{rows} x {width} x {vocabulary}",
        lambda: (*student, *teacher),
        sum(x.nbytes for x in (*student, *student, *teacher)),
        {**providers, "four bare products": products},
        targets={"torch eager": 1, "TRL": 1.5, "Liger": 1, "four bare products": 0.7},
    )


def run(table: Table, quick: bool) -> None:
    rows, vocabulary = (16, 49_152) if quick else (128, 49_152)
    if not quick:
        table.device.seconds = 0.25
    for dtype in (torch.float32, torch.bfloat16):
        student = torch.empty(rows, vocabulary).normal_(0, 3)
        teacher = (student + torch.empty_like(student).normal_(0, 1)).to(dtype)
        student = student.to(dtype)
        for kind, share in KINDS:
            measure(table, student, teacher, kind, share)
        measure_teachers(table, student, teacher, 100)
        for kind, share in (KINDS[0], KINDS[2]):
            measure_hidden(table, 4 * rows, 576, vocabulary, dtype, kind, share)


if __name__ == "__main__":
    main(run)
