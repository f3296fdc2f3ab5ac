"""Random calls of every native operation on the emulator, compared with the CPU's: ``python -m tests.emulation.fuzz``.

A case is a function of its number alone, so a failure is repeated by ``--first N --cases 1``. Every tenth case is junk:
spans and indices out of all bounds, for which nothing is asked but that no memory outside of the arrays is touched and
that the call ends.
"""

import argparse
import math
import random
import time
from collections import Counter
from pathlib import Path

import torch
from tokcredit import _C
from tokcredit.ops import REDUCTIONS

from .emulator import Emulator
from .operations import SIGNATURES, names, run_both

JUNK_EVERY = 10
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SPECIAL = [math.inf, -math.inf, math.nan, 0.0, -0.0]


def accumulated(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


class Draw:
    """What cases are made of. Unless ``aligned``, arrays lie at odd places of larger ones."""

    def __init__(self, number, long=False):
        self.long = long
        self.aligned = False
        self.random = random.Random(number)
        self.torch = torch.Generator().manual_seed(number)
        self.choice, self.integer = self.random.choice, self.random.randint

    def chance(self, p):
        return self.random.random() < p

    def placed(self, x):
        offset = 0 if self.aligned or self.chance(0.4) else self.integer(0, 9)
        place = x.new_empty(x.numel() + offset)[offset:].view(x.shape)
        return place.copy_(x)

    def empty(self, dtype, *shape):
        return self.placed(torch.zeros(shape, dtype=dtype))

    def index(self, values):
        return self.placed(torch.tensor(values, dtype=torch.int64))

    def normal(self, dtype, *shape, scale=1.0):
        return self.placed((torch.randn(shape, generator=self.torch, dtype=torch.float64) * scale).to(dtype))

    def values(self, dtype, *shape):
        """Normal; or full of ties; or with infinities and NaN."""
        x = self.normal(torch.float64, *shape)
        kind = self.choice(["normal", "normal", "ties", "special"])
        if kind == "ties":
            x = x.mul(2).round().div(2)
        elif kind == "special":
            at = torch.rand(x.shape, generator=self.torch) < 0.1
            x[at] = torch.tensor([self.choice(SPECIAL) for _ in range(int(at.sum()))], dtype=x.dtype)
        return self.placed(x.to(dtype))

    def in_rows(self, x):
        """The same matrix; or as a slice of a wider one, whose rows lie apart."""
        if self.chance(0.6):
            return x
        wide = x.new_empty(len(x), x.shape[1] + self.choice([1, 8, 40]))[:, : x.shape[1]].copy_(x)
        return wide.view(2, -1, x.shape[1]) if len(x) % 2 == 0 and self.chance(0.3) else wide

    def bools(self, size, kind=None):
        kind = kind or self.choice(["dense", "sparse", "none", "runs"])
        if kind == "runs":
            edges = torch.rand(size, generator=self.torch) < 0.02
            return self.placed(edges.cumsum(0) % 2 == 1)
        return self.placed(torch.rand(size, generator=self.torch) < {"dense": 0.9, "sparse": 0.05, "none": 0}[kind])

    def lengths(self, most=20_000, huge=False, kind=None):
        if self.long:
            return [140_000]
        if huge:  # more tokens than tiles of the smallest size
            return [self.integer(0, 50), self.integer(4_190_000, 4_200_000), self.integer(0, 3000)]
        kind = kind or self.choice(["few", "few", "many", "tile", "padded", "long"])
        if kind == "few":
            return [self.integer(0, 40) for _ in range(self.integer(1, 8))]
        if kind == "many":
            return [self.integer(0, 9) for _ in range(self.integer(1, 300))]
        if kind == "tile":  # about the size of a tile
            return [self.choice([511, 512, 513, 1024, 2048, 700, 3]) for _ in range(self.integer(1, 6))]
        if kind == "padded":
            return [self.integer(0, 300) for _ in range(self.integer(1, 12))]
        return [self.integer(0, 50), self.integer(1, most), self.integer(0, 3000)]

    def rows(self, **limits):
        """``begin``, ``end``, ``mask`` and the size of the buffer."""
        lengths, gaps = self.lengths(**limits), self.choice([0, 0, 3, 700])
        begin, end, at = [], [], self.integer(0, gaps)
        for length in lengths:
            begin.append(at)
            end.append(at + length)
            at += length + (self.integer(0, gaps) if self.chance(0.5) else 0)
        size = max(at, 1)
        mask = None if self.chance(0.4) else self.bools(size)
        return {"begin": self.index(begin), "end": self.index(end), "mask": mask}, len(lengths), size


def scan(d):
    rows, count, size = d.rows()
    dtype = d.choice(FLOATS)
    out = accumulated(dtype)
    return {
        **rows,
        "x": d.normal(dtype, size),
        "decay": d.choice([1.0, 0.9, 0.0, -0.5]),
        "carry_in": d.choice([None, d.normal(out, count)]),
        "reverse": d.chance(0.5),
        "exclusive": d.chance(0.5),
        "y": d.empty(out, size),
        "carry_out": d.empty(out, count),
        "decays": d.choice([None, d.normal(torch.float64, count).clamp_(-1, 1)]),
    }


def sequences(d):
    """Rows of a few groups, interleaved, that share prefixes, repeat and end inside each other."""
    count, longest = d.choice([(5, 6), (30, 40), (600, 5), (4, 3000)])
    count = d.integer(1, count)
    groups = d.integer(1, max(1, count // d.choice([1, 4, 600])))
    if d.chance(0.015):  # about as many rows as are put in order without a sort, and as one block sorts
        count, longest = d.choice([2048, 4096, 12_288]) + d.integer(-8, 8), 3
        groups = d.integer(count // 600, count // 100)
    big = d.choice([0, 2**33])
    texts = []
    for _ in range(count):
        length = d.integer(0, longest)
        text = [big + d.integer(0, 1) for _ in range(length)]
        if texts and d.chance(0.7):
            model = d.choice(texts)
            text = model[: d.integer(0, len(model))] + text[: d.integer(0, length)]
        texts.append(text)
    group = list(range(groups)) + [d.integer(0, groups - 1) for _ in range(count - groups)]
    d.random.shuffle(group)
    return texts, group, groups, big


NODES = ["parent", "group_of", "depth", "length", "count", "degree"]


def tree(d):
    """A batch as ``tree_build`` wants it, with its results empty."""
    texts, group, groups, big = sequences(d)
    count, gap, at, begin = len(texts), d.choice([0, 5]), 0, []
    flat = []
    for text in texts:
        begin.append(at)
        flat += text + [big] * gap
        at += len(text) + gap
    nodes = {name: d.empty(torch.int64, 2 * count) for name in NODES}
    return {
        "tokens": d.placed(
            torch.tensor(flat or [0], dtype=torch.int64 if big else d.choice([torch.int32, torch.int64]))
        ),
        "begin": d.index(begin),
        "end": d.index([b + len(text) for b, text in zip(begin, texts, strict=True)]),
        "group": d.index(group),
        "groups": groups,
        "leaf": d.empty(torch.int64, count),
        **nodes,
        "size": torch.zeros((), dtype=torch.int64),
    }


def built(d):
    batch = tree(d)
    _C.tree_build(*(batch.get(name, 1) for name in names("tree_build")))
    return batch


def tree_fold(d):
    batch, dtype = built(d), d.choice(FLOATS[:2])
    count = batch["leaf"].numel()
    return {
        "leaf": batch["leaf"],
        "parent": batch["parent"],
        "scale": d.choice([None, d.normal(dtype, 2 * count)]),
        "x": d.normal(dtype, count),
        "y": d.empty(dtype, 2 * count),
    }


def tree_mean(d):
    batch, dtype = built(d), d.choice(FLOATS[:2])
    count = batch["leaf"].numel()
    return {
        "leaf": batch["leaf"],
        "parent": batch["parent"],
        "counts": d.choice([None, d.bools(count)]),
        "x": d.normal(dtype, count),
        "change": d.chance(0.5),
        "y": d.empty(dtype, 2 * count),
    }


def standardize(d):
    dtype, groups, count = d.choice(FLOATS[:2]), d.integer(1, 300), d.integer(0, 3000)
    moments = d.normal(torch.float64, groups, len(_C.MOMENTS))
    moments[:, 0] = torch.randint(0, 5, (groups,), generator=d.torch)
    moments[:, 2].abs_()
    return {
        "x": d.normal(dtype, count),
        "group": d.index([d.integer(0, groups - 1) for _ in range(count)]),
        "moments": moments,
        "standard": d.integer(0, len(_C.STANDARDS) - 1),
        "epsilon": d.choice([1e-6, 1.0]),
        "y": d.empty(d.choice(FLOATS[:2]), count),
    }


def row_affine(d):
    rows, count, size = d.rows()
    of_rows = [count] if d.chance(0.7) else []
    return {
        **rows,
        "x": d.values(d.choice(FLOATS[:2]), size),
        "factor": d.values(torch.float64, *of_rows),
        "shift": d.values(torch.float64, *of_rows),
        "low": d.choice([-math.inf, -0.5]),
        "high": d.choice([math.inf, 0.5]),
        "y": d.empty(d.choice([*FLOATS[:2], torch.bool]), size),
    }


def expand(d):
    dtype, huge = d.choice([torch.float32, torch.float64, torch.int64, torch.bool]), d.chance(0.005)
    dtype = torch.bool if huge else dtype  # the smallest

    def numbers(size):
        x = d.normal(torch.float64, size, scale=3)
        return d.placed(x > 0 if dtype == torch.bool else x.to(dtype))

    if huge or d.chance(0.5):
        rows, count, size = d.rows(huge=huge)
        return {**rows, "row": numbers(count), "y": d.empty(dtype, size)}
    batch = built(d)
    count, size = batch["leaf"].numel(), batch["tokens"].numel()
    return {
        **{name: batch[name] for name in ("begin", "end", "leaf", "parent", "depth")},
        "mask": d.choice([None, d.bools(size)]),
        "row": d.choice([None, numbers(count)]),
        "body": d.choice([None, numbers(2 * count)]),
        "head": d.choice([None, numbers(2 * count)]),
        "y": d.empty(dtype, size),
    }


def reduction(d, dtype, size, segments):
    kind, x = d.integer(0, len(REDUCTIONS) - 1), d.values(dtype, size)
    name = REDUCTIONS[kind]
    out = {"moments": torch.float64, "count": torch.int64}.get(name, accumulated(dtype))
    width = [len(_C.MOMENTS)] if name == "moments" else []
    if width:
        x.clamp_(-100, 100)  # whether a mean with infinities is NaN depends on the order of the values
    return {"x": x, "reduction": kind, "ddof": d.choice([0.0, 1.0]), "y": d.empty(out, segments, *width)}


def segment_rows(d):
    rows, count, size = d.rows()
    return {**rows, **reduction(d, d.choice(FLOATS), size, count)}


def weighted_moments(d):
    rows, count, size = d.rows(most=3000)
    return {
        **rows,
        "x": d.normal(d.choice(FLOATS[:2]), size),  # infinities give infinity or NaN, by the order of merging
        "weights": d.placed(torch.randint(-1, 5, (size,), generator=d.torch).double()),
        "ddof": d.choice([0.0, 1.0]),
        "y": d.empty(torch.float64, count, len(_C.MOMENTS)),
    }


def segment_ids(d):
    size, segments = d.choice([1, 40, 5000]), d.choice([1, 5, 300])
    return {
        "ids": d.index([d.integer(-1, segments) for _ in range(size)]),
        "mask": d.choice([None, d.bools(size)]),
        **reduction(d, d.choice(FLOATS), size, segments),
    }


def quota(d, scopes, number):
    """A number for each scope, or a share."""
    return {
        "wanted": d.index([number() for _ in range(scopes)]) if d.chance(0.5) else None,
        "scopes": scopes,
        "share": d.choice([0.0, 0.02, 0.25, 0.7, 1.0]),
        "rounding": d.integer(0, len(_C.ROUNDINGS) - 1),
        "least": d.integer(0, 3),
    }


def select(d):
    rows, count, size = d.rows(most=3000)
    dtype, ranks, scopes = d.choice(FLOATS), d.chance(0.5), d.choice([1, 2, 7, 40])
    scope = d.index([d.integer(-1, scopes) if d.chance(0.1) else d.integer(0, scopes - 1) for _ in range(count)])
    return {
        **rows,
        "x": d.values(dtype, size),
        "scope": scope if scopes > 1 or d.chance(0.5) else None,
        **quota(d, scopes, lambda: d.integer(-1, size // d.choice([1, 4, 50]) + 1)),
        "ranks": ranks,
        "y": d.empty(accumulated(dtype), scopes) if ranks else d.empty(torch.bool, size),
    }


def maximum_variance(d):
    size, scopes = d.integer(1, 60), d.integer(1, 5)
    return {
        "x": d.normal(torch.float64, size),
        "scope": d.index([d.integer(-1, scopes) for _ in range(size)]),
        **quota(d, scopes, lambda: d.integer(-1, 12)),
        "largest": d.chance(0.5),
        "chosen": d.empty(torch.bool, size),
    }


def within_mean(d):
    rows, _, size = d.rows(most=3000)
    x = d.normal(d.choice(FLOATS[:2]), size, scale=8)
    x.round_().div_(8)  # sums are exact in any order
    if d.chance(0.3):
        x[torch.rand(x.shape, generator=d.torch) < 0.1] = d.choice([math.nan, math.inf])
    return {
        **rows,
        "x": x,
        "budget": d.choice([-1.0, 0.0, 0.01, 0.7, 100.0]),
        "least": d.choice([0, 1, 40, size + 1]),
        "chosen": d.empty(torch.bool, size),
    }


def diverse(d):
    rows, count, size = d.rows(most=60)
    # Entries of +1 and -1 in the first 1, 4, 16 or 64 of a vector: every norm and every cosine is exact.
    filled = d.choice([1, 4, 16, 64])
    x = torch.zeros(size, filled + d.choice([0, 1, 7]))
    x[:, :filled] = (torch.rand(size, filled, generator=d.torch) < d.choice([0.5, 0.9])) * 2.0 - 1
    score = torch.randint(0, 9, (size,), generator=d.torch) / 8
    if d.chance(0.3):
        score[torch.rand(size, generator=d.torch) < 0.2] = d.choice([math.nan, math.inf])
        x[torch.rand(size, generator=d.torch) < 0.1] = d.choice([math.nan, math.inf, 0.0])
    return {
        **rows,
        "x": d.placed(x.to(d.choice([torch.float32, torch.bfloat16, torch.float16]))),
        "score": d.placed(score),
        "number": d.index([d.integer(-1, 12) for _ in range(count)]),
        "steps": d.integer(0, 12),
        "weight": d.choice([0.0, 0.25, 0.5, 1.0]),
        "product": d.chance(0.5),
        "order": d.empty(torch.int64, size),
    }


def policy_loss(d):
    usual = d.chance(0.5)  # most tokens are evaluated four at a time
    d.aligned = usual
    rows, count, size = d.rows(kind="tile" if usual and d.chance(0.5) else None)
    dtype = d.choice(FLOATS)
    out, surrogate = accumulated(dtype), "clip" if usual and d.chance(0.4) else d.choice(_C.SURROGATES)
    source = d.choice(_C.SOURCES)
    on = d.choice(_C.COORDINATES) if surrogate == "gated" else "ratio"

    if usual and d.chance(0.7):
        rows["mask"] = None

    def grid(dtype, *shape, scale=16, low=-40, high=40):
        """Multiples of 1/16, of which sums are exact: a token is on the same side of a bound on both sides."""
        return d.placed((torch.randint(low, high, shape, generator=d.torch) / scale).to(dtype))

    made = {
        "log_ratio": lambda shape: grid(out, *shape),
        "advantages": lambda shape: d.normal(out, *shape),
        "weights": lambda shape: d.normal(out, *shape).abs(),
        "low": lambda shape: grid(out, *shape, low=-16, high=-1) - 1 / 64,
        "high": lambda shape: grid(out, *shape, low=1, high=16) + 1 / 64,
        "cap": lambda shape: grid(out, *shape, low=16, high=40) + 1 / 64,
        "outside_low": lambda shape: grid(out, *shape, low=0, high=16),
        "outside_high": lambda shape: grid(out, *shape, low=0, high=16),
        "given": lambda shape: grid(out, *shape),
    }
    always = {"low", "high"} | ({"log_ratio"} if source == "given" else set())
    operands, numbers = [], []
    for name, absent in _C.OPERANDS.items():
        shape = d.choice([(), (count, 1)] if usual and d.chance(0.9) else [(), (count, 1), (size,)])
        wanted = (name != "log_ratio" or source == "given") and (name in always or d.chance(0.7))
        operands.append(made[name](shape) if wanted and shape else None)
        numbers.append(made[name](()).item() if wanted and not shape else absent)
    probability = on in ("probability", "binary_kl", "given")
    scale = 64 if usual else 16
    log_probs = grid(dtype, size, scale=scale, high=0 if probability else 40)
    needs_reference = source == "cumulative" or probability
    reference = grid(dtype, size, scale=scale, high=0 if probability else 40)
    if d.chance(0.15):
        log_probs[d.integer(0, size - 1)] = d.choice(SPECIAL)
    clamp = d.choice([2.515625, math.inf])
    d.aligned &= d.chance(0.7)  # where inputs are aligned, results may not be
    return {
        **rows,
        "log_probs": log_probs,
        "reference": reference if needs_reference or d.chance(0.7) else None,
        "operands": operands,
        "numbers": numbers,
        "trains": None if usual and d.chance(0.7) else d.choice([None, d.bools(size)]),
        "surrogate": _C.SURROGATES.index(surrogate),
        "source": _C.SOURCES.index(source),
        "on": _C.COORDINATES.index(on),
        "value": d.integer(0, len(_C.GATED_VALUES) - 1),
        "both_sides": d.chance(0.5),
        "bound": d.choice([0.515625, 3.0]) if source == "cumulative" else math.inf,
        "power": d.choice([0.0, 0.0, 0.5, 0.73]),
        "limit": d.choice([math.inf, 0.3]),
        "clamp_low": -clamp,
        "clamp_high": d.choice([clamp, 2.515625]),
        "values": d.empty(out, count),
        "stats": d.empty(torch.float64, count, len(_C.LOSS_STATS)),
        "slopes": d.choice([None, d.empty(out, size)]),
    }


def scale_rows(d):
    rows, count, size = d.rows()
    dtype = d.choice(FLOATS[:2])
    factor = d.normal(dtype, *d.choice([(count,), ()]))
    factor[torch.rand(factor.shape, generator=d.torch) < 0.5] = 1.0
    x = d.normal(dtype, size)
    y = x if d.chance(0.5) else d.empty(dtype, size)
    return {"begin": rows["begin"], "end": rows["end"], "x": x, "factor": factor, "y": y}


def logits(d):
    rows, vocabulary, dtype = d.integer(1, 12), d.choice([1, 2, 7, 33, 500, 5003, 4096]), d.choice(FLOATS)
    x = d.normal(dtype, rows, vocabulary, scale=d.choice([0.1, 2, 30]))
    for least in (-math.inf, torch.finfo(dtype).min / 2):  # which may still be divided by a temperature
        if d.chance(0.3):
            x[:, d.integer(0, vocabulary - 1)] = least
    out = accumulated(dtype)
    tokens = [d.choice([-1, d.integer(0, vocabulary - 1), d.integer(0, vocabulary - 1)]) for _ in range(rows)]
    choices = d.choice([None, None, 0, 1, 3, 40])
    chosen = None if choices is None else torch.randint(-1, vocabulary, (rows, choices), generator=d.torch)
    return {
        "logits": d.in_rows(x),
        "tokens": d.index(tokens).to(d.choice([torch.int32, torch.int64])),
        "temperature": d.choice([1.0, 0.7, 2.0]),
        "temperatures": d.choice([None, d.placed(d.normal(out, rows).abs() + 0.5)]),
        "scale": d.choice([1.0, 0.5]),
        "softcap": d.choice([math.inf, math.inf, 5.0, 0.5, 1e18]),
        "chosen": None if chosen is None else d.placed(chosen),
        "log_probs": d.empty(out, rows),
        "entropies": d.empty(out, rows),
        "squares": d.empty(out, rows),
        "chosen_log_probs": None if chosen is None else d.empty(out, rows, choices),
        "logsumexp": d.empty(torch.float64, rows),
    }


def logits_gradient(d):
    f = logits(d)
    _C.logits(*(f.get(name, 1) for name in names("logits")))
    x, squares, chosen = f["logits"], f["squares"], f["chosen"]
    out, rows = squares.dtype, len(squares)
    dtype = d.choice([torch.float32, torch.bfloat16, torch.float16]) if x.dtype == torch.float32 else x.dtype
    over = x if dtype == x.dtype else x.view(dtype)[..., : x.shape[-1]]
    grad_squares = d.choice([None, d.normal(out, rows)])
    return {
        **{name: f[name] for name in names("logits")[:7]},
        "first": 0,
        "ids": -1,
        "logsumexp": f["logsumexp"],
        "entropies": f["entropies"],
        "squares": d.choice([squares] if grad_squares is not None else [squares, None]),
        "grad_log_probs": d.choice([None, d.normal(out, rows)]),
        "grad_entropies": d.choice([None, d.normal(out, rows)]),
        "grad_squares": grad_squares,
        "grad_chosen": None if chosen is None else d.choice([None, d.normal(out, *chosen.shape)]),
        "grad": d.choice([over, d.in_rows(d.empty(dtype, rows, x.shape[-1]))]),
    }


def logits_state(d):
    f = logits(d)
    x, chosen, first = f["logits"], f["chosen"], d.choice([0, 3, 5000])
    rows = len(f["tokens"])
    ids = first + x.shape[-1] + d.choice([0, 9])
    f["tokens"] = d.placed(torch.randint(-1, ids, (rows,), generator=d.torch))
    if chosen is not None:
        f["chosen"] = d.placed(torch.randint(-1, ids, chosen.shape, generator=d.torch))
    size = 5 + (0 if chosen is None else chosen.shape[1])
    before = d.normal(torch.float64, rows, size)
    before[:, 1:4] = before[:, 1:4].abs() + 0.5
    if d.chance(0.3):  # the parts before had no probability
        before[:, 0], before[:, 1:4] = -math.inf, 0
    before = d.choice([None, before])
    return {
        **{name: f[name] for name in names("logits")[:7]},
        "first": first,
        "ids": ids,
        "before": before,
        "state": before if before is not None and d.chance(0.3) else d.empty(torch.float64, rows, size),
    }


def divergence(d):
    rows, vocabulary, dtype = d.integer(1, 12), d.choice([1, 2, 7, 33, 500, 5003]), d.choice(FLOATS)
    scale = d.choice([0.1, 2, 10])
    student = d.normal(dtype, rows, vocabulary, scale=scale)
    teacher = d.placed(student.clone()) if d.chance(0.2) else d.normal(dtype, rows, vocabulary, scale=scale)
    if d.chance(0.3):
        d.choice([student, teacher])[:, d.integer(0, vocabulary - 1)] = -math.inf
    out, mixed = accumulated(dtype), d.chance(0.3)
    return {
        "student": student,
        "teacher": teacher,
        "other": d.normal(dtype, rows, vocabulary, scale=scale) if mixed else None,
        "weights": d.placed(torch.tensor([d.choice([0.0, 1.5, -0.05]) for _ in range(rows)], dtype=out))
        if mixed
        else None,
        "mask": d.choice([None, d.bools(rows)]),
        "kind": d.integer(0, len(_C.DIVERGENCES) - 1),
        "share": d.choice([0.5, 0.1, 0.9]),
        "temperature": d.choice([1.0, 0.7, 2.0]),
        "values": d.empty(out, rows),
        "entropies": d.empty(out, rows),
        "saved": d.empty(torch.float64, rows, 3),
    }


def divergence_gradient(d):
    f = divergence(d)
    _C.divergence(*(f.get(name, 1) for name in names("divergence")))
    student = f["student"]
    grad_values = d.normal(f["values"].dtype, len(student))
    grad_values[torch.rand(len(student), generator=d.torch) < 0.2] = 0
    return {
        **{name: f[name] for name in names("divergence")[:8]},
        "saved": f["saved"],
        "grad_values": grad_values,
        "grad": d.choice([student, d.empty(student.dtype, *student.shape)]),
    }


def divergence_top(d):
    rows, vocabulary, dtype = d.integer(1, 12), d.choice([2, 7, 33, 500, 5003]), d.choice(FLOATS)
    top, out = d.choice([1, 2, 20, 300]), accumulated(dtype)
    ids = torch.randint(-1, vocabulary, (rows, top), generator=d.torch)
    # An outcome whose probability cancels to nothing would compare what rounding left.
    ids[:, 0], ids = 0, ids.where(ids != vocabulary - 1, -1)
    outside = d.integer(0, len(_C.OUTSIDES) - 1)
    cut = _C.OUTSIDES[outside] == "cut"
    kinds = [number for number, kind in enumerate(_C.DIVERGENCES) if kind.endswith("kl") or not cut]
    return {
        "student": d.normal(dtype, rows, vocabulary, scale=d.choice([0.1, 2])),
        "ids": d.placed(ids.to(d.choice([torch.int32, torch.int64]))),
        "log_probs": d.placed(-d.normal(out, rows, top, scale=3).abs() - math.log(top + 1)),
        "mask": d.choice([None, d.bools(rows)]),
        "kind": d.choice(kinds),
        "share": d.choice([0.5, 0.1, 0.9]),
        "outside": outside,
        "temperature": d.choice([1.0, 0.7, 2.0]),
        "values": d.empty(out, rows),
        "entropies": d.empty(out, rows),
        "saved": d.empty(torch.float64, rows, 2),
        "slopes": d.empty(torch.float64, rows, top),
    }


def divergence_top_gradient(d):
    f = divergence_top(d)
    _C.divergence_top(*(f.get(name, 1) for name in names("divergence_top")))
    student = f["student"]
    grad_values = d.normal(f["values"].dtype, len(student))
    grad_values[torch.rand(len(student), generator=d.torch) < 0.2] = 0
    return {
        **{name: f[name] for name in ("student", "ids", "mask", "temperature", "saved", "slopes")},
        "grad_values": grad_values,
        "grad": d.choice([student, d.empty(student.dtype, *student.shape)]),
    }


def repack(d):
    rows, _, size = d.rows()
    length = rows["end"] - rows["begin"]
    shift = d.integer(0, 9)
    dtype = d.choice([*FLOATS, torch.int32, torch.int64, torch.bool])
    x = d.normal(torch.float64, size, scale=9)
    source = rows["begin"]
    target = (length.cumsum(0) - length) + shift
    if d.chance(0.5):
        x, source, target = d.normal(torch.float64, int(length.sum()) + 10, scale=9), target, source
    total = int((target + length).max()) + d.integer(0, 700)
    return {
        "x": d.placed(x > 0 if dtype == torch.bool else x.to(dtype)),
        "source": d.placed(source),
        "target": d.placed(target),
        "length": d.placed(length),
        "y": d.empty(dtype, max(total, 1)),
    }


def baseline(d):
    rows, count, size = d.rows(most=3000)
    dtype, groups, per_row = d.choice(FLOATS), d.integer(1, 4), d.chance(0.5)
    out = accumulated(dtype)
    return {
        **rows,
        "log_probs": d.placed(-d.normal(dtype, size).abs()),
        "squares": d.placed(d.normal(dtype, size).abs().clamp(max=1)),
        "rewards": d.normal(dtype, count, 1) if per_row else d.normal(dtype, size),
        "group": d.index([d.integer(0, groups - 1) for _ in range(count)]),
        "groups": groups,
        "epsilon": 1e-8,
        "advantages": d.empty(out, size),
        "returns": d.choice([None, d.empty(out, size)]),
    }


def piece_offsets(d):
    rows, count, size = d.rows()
    return {
        **rows,
        "marks": d.bools(size),
        "cut": d.integer(0, len(_C.CUTS) - 1),
        "offset": d.empty(torch.int64, count + 1),
    }


def pieces(d):
    case = piece_offsets(d)
    _C.piece_offsets(*(case[name] for name in names("piece_offsets")))
    count = int(case["offset"][-1])
    return {**case, **{name: d.empty(torch.int64, count) for name in ("piece_begin", "piece_end", "row", "at")}}


def log_deviation(d):
    rows, _, size = d.rows(most=3000)
    dtype = d.choice(FLOATS)
    return {
        **rows,
        "x": d.placed(d.values(dtype, size).abs()),
        "quantile": d.choice([0.0, 0.8, 1.0]),
        "floor": d.choice([1e-8, 0.1]),
        "positive": d.chance(0.5),
        "y": d.empty(accumulated(dtype), size),
        "statistics": d.empty(torch.float64, 4),
    }


def score_bounds(d):
    dtype, size = d.choice(FLOATS[:2]), d.integer(1, 10_000)
    return {
        "score": d.values(dtype, size),
        "low": d.choice([0.2, 0.0, 1.5]),
        "high": d.choice([0.28, 0.0, 10.0]),
        "widen": d.choice([1.0, 0.0, 3.0]),
        "below": d.empty(dtype, size),
        "above": d.empty(dtype, size),
    }


def score_factor(d):
    rows, count, size = d.rows()
    case, bounds = score_bounds(d), d.chance(0.5)
    dtype = case["score"].dtype
    return {
        **case,
        **rows,
        "score": d.values(dtype, size),
        "log_probs": d.normal(dtype, size, scale=0.2),
        "reference": d.choice([None, d.normal(dtype, size, scale=0.2)]),
        "advantages": d.values(dtype, count),
        "clamp_low": d.choice([-0.5, -20.0]),
        "clamp_high": 20.0,
        "low_bound": d.placed(-d.normal(dtype, size, scale=0.2).abs()) if bounds else None,
        "high_bound": d.placed(d.normal(dtype, size, scale=0.2).abs()) if bounds else None,
        "strength": d.choice([1.0, 0.5]),
        "y": d.empty(dtype, size),
    }


def pair_link(d):
    dtype, count = d.choice(FLOATS[:2]), d.integer(0, 600)
    functions = [d.integer(0, len(_C.LINK_FUNCTIONS) - 1) for _ in range(d.integer(0, 4))]
    numbers = [
        x for _ in functions for x in (d.choice([1.0, -0.5]), *(d.choice([0.5, 0.0, -1.0]) for _ in "cr"), 0.25, 0.5)
    ]
    rows = torch.randperm(2 * count + 3, generator=d.torch)[: 2 * count].view(-1, 2)
    pairs = None if d.chance(0.3) else d.placed(rows)
    size = 2 * count + (0 if pairs is None else 3)
    return {
        "scores": d.values(dtype, size),
        "divisors": None if d.chance(0.5) else d.placed(torch.randint(0, 9, (size,), generator=d.torch)),
        "pairs": pairs,
        "weights": None if d.chance(0.5) else d.normal(torch.float64, count),
        "functions": functions,
        "numbers": numbers,
        "scale": 0.25,
        "total": d.empty(dtype),
        "slopes": d.empty(dtype, size),
        "table": d.empty(torch.float64, count, len(_C.PAIR_COLUMNS)),
    }


def row_weights(d):
    rows, by_length = d.integer(1, 3000), d.chance(0.5)
    return {
        "lengths": d.placed(torch.randint(-1, 4, (rows,), generator=d.torch)),
        "given": d.choice([-1, 0, 7]),
        "counted": d.integer(0, 1),
        "by_length": by_length,
        "length": d.choice([1.0, 512.0]),
        "factor": d.choice([1.0, 3.0]),
        "y": d.empty(torch.float64, *([rows] if by_length else [])),
    }


GENERATORS = {
    "scan": scan,
    "tree_build": tree,
    "tree_fold": tree_fold,
    "tree_mean": tree_mean,
    "standardize": standardize,
    "row_affine": row_affine,
    "expand": expand,
    "segment_rows": segment_rows,
    "weighted_moments": weighted_moments,
    "segment_ids": segment_ids,
    "select": select,
    "maximum_variance": maximum_variance,
    "within_mean": within_mean,
    "diverse": diverse,
    "policy_loss": policy_loss,
    "scale_rows": scale_rows,
    "logits": logits,
    "logits_gradient": logits_gradient,
    "logits_state": logits_state,
    "divergence": divergence,
    "divergence_gradient": divergence_gradient,
    "divergence_top": divergence_top,
    "divergence_top_gradient": divergence_top_gradient,
    "repack": repack,
    "piece_offsets": piece_offsets,
    "pieces": pieces,
    "log_deviation": log_deviation,
    "score_bounds": score_bounds,
    "score_factor": score_factor,
    "pair_link": pair_link,
    "row_weights": row_weights,
    "baseline": baseline,
}
assert GENERATORS.keys() == SIGNATURES.keys()

# Arguments that say where something is, and so may be junk.
PLACES = {
    "begin",
    "end",
    "group",
    "leaf",
    "parent",
    "depth",
    "ids",
    "scope",
    "pairs",
    "wanted",
    "tokens",
    "chosen",
    "source",
    "target",
    "length",
    "number",
    "offset",
}


def junk(d, op, case):
    """Replaces some of the numbers that say where something is."""
    for name in PLACES & set(names(op)):
        x = case.get(name)
        if not isinstance(x, torch.Tensor) or d.chance(0.3):
            continue
        bound = int(d.choice([x.numel(), 50, 5000, 2**31 - 1]))
        wrong = torch.randint(-bound, bound + 1, x.shape, generator=d.torch).to(x.dtype)
        case[name] = x.where(torch.rand(x.shape, generator=d.torch) < d.choice([0.0, 0.5, 0.9]), wrong)


def run_case(emulator, number, ops, with_junk=True, long=False):
    """Runs case ``number``; returns its operation and what was found."""
    d = Draw(number, long)
    op = d.choice(ops)
    case = GENERATORS[op](d)
    case.setdefault("threads", 1)
    emulator.seed(number * 7919 + 1)
    wild = with_junk and number % JUNK_EVERY == JUNK_EVERY - 1
    if wild:
        junk(d, op, case)
    arguments = [case.get(name) for name in names(op)]
    try:
        if wild:
            getattr(emulator.module, op)(*arguments)
            found = []
        else:
            found = run_both(op, getattr(emulator.module, op), getattr(_C, op), arguments)
    except ValueError as error:
        found = [] if wild else [str(error)]  # junk may be refused
    except RuntimeError as error:
        found = [str(error)]
    reports = emulator.reports()
    if wild:  # what is computed from junk is junk
        reports = [line for line in reports if "outside" in line]
    return op, [f"{'junk: ' if wild else ''}{line}" for line in [*found, *reports]]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flavour", default="instrumented", choices=["plain", "instrumented"])
    parser.add_argument("--module", type=Path, help="a module built elsewhere")
    parser.add_argument("--seconds", type=float, default=60, help="of CPU time")
    parser.add_argument("--cases", type=int, default=10**9)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--ops", nargs="+", default=sorted(GENERATORS), choices=sorted(GENERATORS))
    parser.add_argument("--verbose", action="store_true", help="the number of each case before it runs")
    parser.add_argument("--no-junk", action="store_true")
    parser.add_argument("--long", action="store_true", help="one row, longer than the look-back of a scan sees")
    parser.add_argument("--most", type=int, default=10, help="stop after so many findings")
    a = parser.parse_args()
    emulator = Emulator(a.flavour, a.module)
    emulator.reports()
    start, done, findings = time.process_time(), Counter(), 0
    for number in range(a.first, a.first + a.cases):
        if time.process_time() - start > a.seconds or findings >= a.most:
            break
        if a.verbose:
            print(number, flush=True)
        op, found = run_case(emulator, number, a.ops, not a.no_junk, a.long)
        done[op] += 1
        findings += bool(found)
        for line in found:
            print(f"case {number}: {line}", flush=True)
    print(f"fuzz: {done.total()} cases, {emulator.accesses() / 1e6:.0f} M accesses checked, {findings} with findings")
    raise SystemExit(findings > 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
