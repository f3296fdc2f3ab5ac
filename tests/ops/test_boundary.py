"""Native functions called directly: whatever they are given, they raise or compute, and touch only their tensors."""

import contextlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokcredit import _C

N, R, V = 12, 3, 6  # tokens, rows, tree nodes


def integers(*x):
    return torch.tensor(x, dtype=torch.int64)


def floats(*shape, dtype=torch.float32):
    return torch.linspace(-1.5, -0.1, math.prod(shape), dtype=dtype).reshape(shape)


def spans():
    return {"begin": integers(0, 4, 4), "end": integers(3, 4, 12), "mask": torch.arange(N) % 3 > 0}


def tree():
    return {"leaf": integers(1, 2, 3), "parent": integers(-1, 0, 0, 1, -1, -1), "depth": integers(0, 2, 0, 2, 0, 0)}


def policy_loss():
    operands = [None, floats(R, 1), floats(N), None, None, None, None, floats(N), floats(N)]
    return {
        "log_probs": floats(N),
        "reference": floats(N),
        "operands": operands,
        "numbers": [0.0] * 9,
        **spans(),
        "trains": None,
        "surrogate": _C.SURROGATES.index("gated"),
        "source": 2,
        "on": 1,
        "value": 0,
        "both_sides": True,
        **dict.fromkeys(("bound", "power", "limit", "clamp_low", "clamp_high"), 1.0),
        "values": floats(R),
        "stats": floats(R, len(_C.LOSS_STATS), dtype=torch.float64),
        "slopes": floats(N),
        "threads": 2,
    }


# Arguments of each function that it takes, in order; the names are those of the errors.
VALID = {
    "scan": lambda: {
        "x": floats(N),
        **spans(),
        "decay": 0.5,
        "decays": None,
        "carry_in": floats(R),
        "reverse": False,
        "exclusive": True,
        "y": floats(N),
        "carry_out": floats(R),
        "threads": 2,
    },
    "segment_rows": lambda: {
        "x": floats(N),
        **spans(),
        "reduction": 2,
        "ddof": 1.0,
        "y": floats(R),
        "threads": 2,
    },
    "weighted_moments": lambda: {
        "x": floats(N),
        "weights": floats(N, dtype=torch.float64).abs(),
        **spans(),
        "ddof": 0.0,
        "y": floats(R, 5).double(),
    },
    "segment_ids": lambda: {
        "x": floats(N),
        "ids": torch.arange(N) % 5,
        "mask": torch.arange(N) % 3 > 0,
        "reduction": 6,
        "ddof": 1.0,
        "y": floats(4),
    },
    "standardize": lambda: {
        "x": floats(R),
        "group": integers(0, 1, 0),
        "moments": floats(2, 5).double(),
        "standard": 1,
        "epsilon": 1e-6,
        "y": floats(R),
    },
    "row_affine": lambda: {
        "x": floats(N),
        "factor": floats(R).double(),
        "shift": floats(R).double(),
        **spans(),
        "low": 0.0,
        "high": 1.0,
        "y": floats(N),
        "threads": 2,
    },
    "select": lambda: {
        "x": floats(N),
        **spans(),
        "scope": integers(0, 7, 1),
        "k": integers(1, 2),
        "scopes": 2,
        "share": 0.5,
        "rounding": 1,
        "least": 0,
        "ranks": False,
        "y": torch.zeros(N, dtype=torch.bool),
        "threads": 2,
    },
    "kth": lambda: {
        "x": floats(N),
        **spans(),
        "scope": integers(0, 7, 1),
        "rank": integers(1, 2),
        "scopes": 2,
        "share": 0.5,
        "rounding": 1,
        "least": 0,
        "ranks": True,
        "y": floats(2),
        "threads": 2,
    },
    "maximum_variance": lambda: {
        "x": floats(N, dtype=torch.float64),
        "scope": torch.arange(N) % 3,
        "k": integers(2, 3),
        "scopes": 2,
        "share": 0.5,
        "rounding": 1,
        "least": 0,
        "largest": True,
        "chosen": torch.zeros(N, dtype=torch.bool),
    },
    "within_mean": lambda: {
        "x": floats(N),
        **spans(),
        "budget": 0.5,
        "least": 1,
        "chosen": torch.zeros(N, dtype=torch.bool),
    },
    "diverse": lambda: {
        "x": floats(N, 3),
        "score": floats(N),
        **spans(),
        "number": integers(1, 2, 9),
        "steps": 3,
        "weight": 0.5,
        "product": False,
        "order": integers(*[0] * N),
        "threads": 2,
    },
    "tree_build": lambda: {
        "tokens": torch.arange(N) % 2,
        "begin": integers(0, 4, 6),
        "end": integers(4, 6, 12),
        "group": integers(0, 0, 1),
        "groups": 2,
        "leaf": integers(*[0] * R),
        **{name: integers(*[0] * V) for name in ("parent", "group_of", "depth", "length", "count", "degree")},
        "size": integers(0),
        "threads": 2,
    },
    "tree_pack": lambda: {
        "tokens": torch.arange(N) % 2,
        "begin": integers(0, 4, 6),
        "end": integers(4, 6, 12),
        "wanted": torch.arange(N) % 3 > 0,
        "contexts": integers(5, 5, 5, 6),
        "context_begin": integers(0, 0, 1),
        "context_end": integers(2, 2, 4),
        "tags": torch.arange(N) % 3,
        "context_tags": integers(0, 0, 0, 1),
        "group": integers(0, 0, 1),
        "groups": 2,
        "together": integers(0, 7, 0),
        "budget": 100,
        "predictions": 100,
        "bin_cost": 2,
        "ranks": 2,
        "threads": 2,
        "allocate": lambda size, dtype: torch.empty(size, dtype=getattr(torch, dtype)),
    },
    "tree_fold": lambda: {
        "leaf": tree()["leaf"],
        "parent": tree()["parent"],
        "scale": floats(V),
        "x": floats(R),
        "y": floats(V),
    },
    "tree_mean": lambda: {
        "leaf": tree()["leaf"],
        "parent": tree()["parent"],
        "counts": torch.tensor([True, False, True]),
        "x": floats(R),
        "change": True,
        "y": floats(V),
    },
    "expand": lambda: {
        "begin": integers(0, 4, 6),
        "end": integers(3, 6, 12),
        "mask": torch.arange(N) % 3 > 0,
        "row": floats(R),
        **tree(),
        "body": floats(V),
        "head": floats(V),
        "y": floats(N),
        "threads": 2,
    },
    "policy_loss": policy_loss,
    "scale_rows": lambda: {
        "x": floats(N),
        "factor": floats(R),
        "begin": integers(0, 4, 4),
        "end": integers(3, 4, 12),
        "y": floats(N),
        "threads": 2,
    },
    "logits": lambda: {
        "logits": floats(4, V),
        "tokens": integers(0, 5, -1, 2),
        "temperature": 0.7,
        "temperatures": floats(4).abs(),
        "scale": 1.5,
        "softcap": 5.0,
        "chosen": integers(0, 1, -1, 2, 3, 3, 5, 0).view(4, 2),
        "log_probs": floats(4),
        "entropies": floats(4),
        "squares": floats(4),
        "chosen_log_probs": floats(4, 2),
        "logsumexp": floats(4, dtype=torch.float64),
        "threads": 2,
    },
    "logits_state": lambda: {
        "logits": floats(4, V),
        "tokens": integers(0, 5, -1, 9),
        "temperature": 0.7,
        "temperatures": floats(4).abs(),
        "scale": 1.5,
        "softcap": 5.0,
        "chosen": integers(0, 1, -1, 2, 3, 3, 5, 0).view(4, 2),
        "first": 4,
        "ids": 12,
        "before": floats(4, 7, dtype=torch.float64),
        "state": floats(4, 7, dtype=torch.float64),
        "threads": 2,
    },
    "logits_gradient": lambda: {
        "logits": floats(4, V),
        "tokens": integers(0, 5, -1, 2),
        "temperature": 0.7,
        "temperatures": floats(4).abs(),
        "scale": 1.5,
        "softcap": 5.0,
        "chosen": integers(0, 1, -1, 2, 3, 3, 5, 0).view(4, 2),
        "first": 0,
        "ids": 6,
        "logsumexp": floats(4, dtype=torch.float64),
        "entropies": floats(4),
        "squares": floats(4),
        "grad_log_probs": floats(4),
        "grad_entropies": floats(4),
        "grad_squares": floats(4),
        "grad_chosen": floats(4, 2),
        "grad": floats(4, V),
        "threads": 2,
    },
    "divergence": lambda: {
        "student": floats(4, V),
        "teacher": floats(4, V),
        "other": floats(4, V),
        "weights": floats(4),
        "mask": torch.tensor([True, False, True, True]),
        "kind": 0,
        "share": 0.5,
        "temperature": 0.7,
        "values": floats(4),
        "entropies": floats(4),
        "saved": floats(4, 3).double(),
        "threads": 2,
    },
    "divergence_gradient": lambda: {
        "student": floats(4, V),
        "teacher": floats(4, V),
        "other": None,
        "weights": None,
        "mask": None,
        "kind": 1,
        "share": 0.5,
        "temperature": 0.7,
        "saved": floats(4, 3).double(),
        "grad_values": floats(4),
        "grad": floats(4, V),
        "threads": 2,
    },
    "divergence_top": lambda: {
        "student": floats(4, V),
        "ids": torch.tensor([[0, 1], [2, 3], [4, 5], [1, 0]]),
        "log_probs": torch.full((4, 2), -1.0),
        "mask": None,
        "kind": 0,
        "share": 0.5,
        "outside": 0,
        "temperature": 0.7,
        "values": floats(4),
        "entropies": floats(4),
        "saved": floats(4, 2).double(),
        "slopes": floats(4, 2).double(),
        "threads": 2,
    },
    "divergence_top_gradient": lambda: {
        "student": floats(4, V),
        "ids": torch.tensor([[0, 1], [2, 3], [4, 5], [1, 0]]),
        "mask": None,
        "temperature": 0.7,
        "saved": floats(4, 2).double(),
        "slopes": floats(4, 2).double(),
        "grad_values": floats(4),
        "grad": floats(4, V),
        "threads": 2,
    },
    "baseline": lambda: {
        "log_probs": floats(N),
        "squares": floats(N),
        "rewards": floats(N),
        **spans(),
        "group": integers(0, 1, 0),
        "groups": 2,
        "epsilon": 1e-8,
        "advantages": floats(N),
        "returns": floats(N),
        "threads": 2,
    },
    "repack": lambda: {
        "x": floats(N),
        "from": integers(5, 0, 0),
        "to": integers(1, 4, 4),
        "length": integers(2, 0, 3),
        "y": floats(8),
        "threads": 2,
    },
    "piece_offsets": lambda: {
        "marks": torch.arange(N) % 3 == 1,
        "begin": integers(0, 4, 4),
        "end": integers(3, 4, 12),
        "cut": 0,
        "offset": integers(*[0] * (R + 1)),
    },
    "pieces": lambda: {
        "marks": torch.arange(N) % 3 == 1,
        "begin": integers(0, 4, 4),
        "end": integers(3, 4, 12),
        "offset": integers(0, 2, 3, 7),
        "cut": 0,
        **{name: integers(*[0] * 7) for name in ("piece_begin", "piece_end", "row", "at")},
    },
    "log_deviation": lambda: {
        "x": floats(N).abs(),
        **spans(),
        "quantile": 0.8,
        "floor": 1e-8,
        "positive": False,
        "y": floats(N),
        "statistics": floats(4).double(),
        "threads": 2,
    },
    "pair_link": lambda: {
        "scores": floats(4),
        "divisors": integers(1, 2, 3, 4),
        "pairs": integers(0, 1, 3, 2).view(2, 2),
        "weights": floats(2, dtype=torch.float64),
        "functions": [0, 1],
        "numbers": [1.0] * 10,
        "scale": 0.5,
        "total": torch.zeros(()),
        "slopes": floats(4),
        "table": floats(2, len(_C.PAIR_COLUMNS), dtype=torch.float64),
    },
    "row_weights": lambda: {
        "lengths": integers(2, 0, 4),
        "given": -1,
        "counted": 1,
        "by_length": True,
        "length": 1.0,
        "factor": 1.0,
        "y": floats(3, dtype=torch.float64),
    },
    "score_bounds": lambda: {
        "score": floats(N),
        "low": 0.2,
        "high": 0.3,
        "widen": 1.0,
        "below": floats(N),
        "above": floats(N),
        "threads": 2,
    },
    "score_factor": lambda: {
        "score": floats(N),
        "log_probs": floats(N),
        "reference": floats(N),
        "advantages": floats(R),
        "begin": integers(0, 4, 4),
        "end": integers(3, 4, 12),
        "low_bound": floats(N),
        "high_bound": floats(N).abs(),
        "low": 0.0,
        "high": 0.0,
        "widen": 0.0,
        "strength": 1.0,
        "clamp_low": -9.0,
        "clamp_high": 9.0,
        "y": floats(N),
        "threads": 2,
    },
}


def call(name, arguments):
    getattr(_C, "select" if name == "kth" else name)(*arguments.values())


@pytest.mark.parametrize("name", VALID)
def test_the_table_is_valid(name):
    call(name, VALID[name]())


def test_every_function_is_in_the_table():
    functions = {name for name in dir(_C) if callable(getattr(_C, name)) and not name.startswith("_")}
    assert functions - {"build_info", "empty", "empty_cache"} == set(VALID) - {"kth"}


FAR = 10**8
WRONG = {
    "scan": [
        ("begin, end", {"begin": integers(0, 4, FAR), "end": integers(3, 4, FAR + 4)}),
        ("begin, end", {"begin": integers(0, 2, 4)}),  # overlapping
        ("begin, end", {"begin": integers(-1, 4, 4)}),
        ("begin, end", {"end": integers(3, 4, N + 1)}),
        ("begin, end", {"begin": integers(0, 4, 8), "end": integers(3, 4, 6)}),  # backwards
        ("begin", {"begin": integers(0, 4, 4).int()}),
        ("end", {"end": integers(3, 4)}),
        ("mask", {"mask": torch.ones(N)}),
        ("x", {"x": integers(*range(N))}),
        ("carry_in", {"carry_in": floats(R + 1)}),
        ("decays", {"decays": floats(R + 1)}),
        ("y", {"y": floats(N, dtype=torch.float64)}),
    ],
    "segment_rows": [("reduction", {"reduction": 99}), ("begin, end", {"end": integers(3, 4, 2**62)})],
    "pieces": [
        ("offset", {"offset": integers(0, 2, 4, 7)}),
        ("offset", {"offset": integers(0, FAR, 3, 7)}),
        ("cut", {"cut": 3}),
        ("begin, end", {"end": integers(3, 4, FAR)}),
        ("piece_end", {"piece_end": integers(0)}),
    ],
    "piece_offsets": [("offset", {"offset": integers(0)}), ("mask", {"marks": floats(N)})],
    "log_deviation": [
        ("quantile", {"quantile": math.nan}),
        ("begin, end", {"begin": integers(0, 4, -FAR)}),
        ("statistics", {"statistics": floats(3).double()}),
    ],
    "pair_link": [
        ("pairs", {"pairs": integers(0, 1, 3, 4)}),
        ("pairs", {"pairs": integers(0, 1, -1, 2)}),
        ("pairs", {"pairs": integers(0, 1, 2)}),
        ("scores", {"scores": floats(3), "pairs": None, "divisors": None}),
        ("scores", {"scores": floats(4).half()}),
        ("functions", {"functions": [0, 6]}),
        ("functions, numbers", {"functions": [0] * 5, "numbers": [1.0] * 25}),
        ("functions, numbers", {"numbers": [1.0] * 9}),
        ("weights", {"weights": floats(3, dtype=torch.float64)}),
        ("table", {"table": floats(2, 3, dtype=torch.float64)}),
    ],
    "row_weights": [
        ("counted", {"counted": 2}),
        ("lengths", {"lengths": floats(3)}),
        ("y", {"by_length": False}),
    ],
    "score_factor": [
        ("high_bound", {"high_bound": None}),
        ("log_probs", {"log_probs": floats(3)}),
        ("advantages", {"advantages": floats(N)}),
        ("begin, end", {"end": integers(3, 4, FAR)}),
    ],
    "weighted_moments": [("weights", {"weights": floats(N)}), ("x", {"x": floats(N).half()})],
    "segment_ids": [("reduction", {"reduction": -1}), ("ids", {"ids": integers(0)})],
    "tree_build": [
        ("group", {"group": integers(0, 2, 0)}),
        ("group", {"group": integers(0, -1, 0)}),
        ("groups", {"groups": 2**40}),
        ("tokens", {"tokens": floats(N)}),
        ("leaf", {"leaf": integers(0)}),
    ],
    "tree_pack": [
        ("tokens", {"tokens": floats(N)}),
        ("contexts", {"contexts": integers(5, 5, 5, 6).int()}),
        ("context_begin, context_end", {"context_end": integers(2, 2, 5)}),
        ("context_begin, context_end", {"context_begin": integers(0, 3, 1)}),
        ("context_begin, context_end", {"context_begin": integers(-1, 0, 1)}),
        ("begin, end", {"end": integers(4, 6, FAR)}),
        ("wanted", {"wanted": None}),
        ("context_tags", {"context_tags": None}),
        ("tags", {"tags": integers(0)}),
        ("group", {"group": integers(0, 2, 0)}),
        ("together", {"together": integers(0, 7)}),
        ("budget, predictions, bin_cost, ranks", {"ranks": 0}),
        ("tokens", {"allocate": lambda size, dtype: torch.empty(size + 1, dtype=getattr(torch, dtype))}),
        ("tokens", {"allocate": lambda size, dtype: None}),
    ],
    "tree_fold": [
        ("leaf", {"leaf": integers(0, V, 0)}),
        ("leaf", {"leaf": integers(0, -1, 0)}),
        ("parent", {"parent": integers(-1, 0, 0, 4, -1, -1)}),
        ("parent", {"parent": integers(-1, 0, 2, 1, -1, -1)}),  # its own parent
        ("parent", {"parent": integers(-2, 0, 0, 1, -1, -1)}),
        ("x", {"x": floats(R).bfloat16(), "y": floats(V)}),
    ],
    "tree_mean": [
        ("leaf", {"leaf": integers(0, -1, 0)}),
        ("parent", {"parent": integers(-1, 0, 2, 1, -1, -1)}),
        ("counts", {"counts": torch.tensor([True, False])}),
        ("y", {"y": floats(V).double()}),
    ],
    "standardize": [
        ("group", {"group": integers(0, 2, 0)}),
        ("group", {"group": integers(0, -1, 0)}),
        ("moments", {"moments": floats(2, 5)}),
        ("moments", {"moments": floats(2, 4).double()}),
        ("standard", {"standard": 9}),
        ("x", {"x": floats(R).bfloat16()}),
        ("y", {"y": floats(R + 1)}),
    ],
    "row_affine": [
        ("x", {"x": floats(N).bfloat16()}),
        ("factor", {"factor": floats(R)}),
        ("factor", {"factor": floats(R + 1).double()}),
        ("shift", {"shift": floats(1).double()}),
        ("begin, end", {"end": integers(3, 4, FAR)}),
        ("y", {"y": floats(N - 1)}),
    ],
    "expand": [
        ("leaf", {"leaf": integers(0, 1, FAR)}),
        ("parent", {"parent": integers(1, 0, 0, 1, -1, -1)}),
        ("depth", {"depth": integers(0, -1, 0, 2, 0, 0)}),
        ("depth", {"depth": integers(0, 4, 0, 5, 0, 0)}),  # begins behind the end of its row
        ("depth", {"depth": integers(0, 2, 0, 1, 0, 0)}),  # before its parent
        ("y", {"y": floats(N).bfloat16()}),
        ("depth", {"depth": None}),
    ],
    "policy_loss": [
        *((name, {name: 99}) for name in ("surrogate", "source", "on", "value")),
        ("operands", {"numbers": [0.0]}),
        ("reference", {"reference": None}),
        ("stats", {"stats": floats(R, 2, dtype=torch.float64)}),
        ("advantages", {"operands": [None, floats(R + 1, 1), *[None] * 7]}),
    ],
    "scale_rows": [("x", {"x": floats(N).bfloat16()}), ("begin, end", {"end": integers(3, 4, N + 1)})],
    "logits": [
        ("tokens", {"tokens": integers(0, V, 0, 0)}),
        ("tokens", {"tokens": integers(0, -2, 0, 0)}),
        ("logits", {"logits": floats(4 * V)}),
        ("logits", {"logits": integers(*range(4 * V)).view(4, V)}),
        ("logits", {"logits": floats(V, 4).t()}),
        ("logits", {"logits": floats(V).expand(4, V)}),
        ("logits", {"logits": floats(4 * V).as_strided((4, V), (V - 1, 1))}),
        ("logits", {"logits": floats(4 * V).as_strided((2, 2, V), (V, V, 1))}),
        ("temperatures", {"temperatures": floats(3)}),
        ("temperatures", {"temperatures": floats(4).double()}),
        ("scale", {"scale": 0.0}),
        ("softcap", {"softcap": math.nan}),
        ("softcap", {"softcap": 1e39}),
        ("softcap", {"softcap": 1e-39}),
        ("chosen", {"chosen": integers(0, 1, -1, V, 3, 3, 5, 0).view(4, 2)}),
        ("chosen", {"chosen": integers(0, 1, -1, -2, 3, 3, 5, 0).view(4, 2)}),
        ("chosen", {"chosen": integers(0, 1, 2, 3)}),
        ("chosen", {"chosen": integers(0, 1, -1, 2, 3, 3, 5, 0).view(4, 2).int()}),
        ("squares", {"squares": floats(3)}),
        ("chosen_log_probs", {"chosen_log_probs": floats(4)}),
    ],
    "logits_state": [
        ("first", {"first": -1}),
        ("first", {"first": 13}),
        ("tokens", {"tokens": integers(0, 12, 0, 0)}),
        ("before", {"before": floats(4, 5, dtype=torch.float64)}),
        ("state", {"state": floats(4, 7)}),
    ],
    "logits_gradient": [
        ("grad", {"grad": floats(4, V).double()}),
        ("grad", {"grad": floats(4, V - 1)}),
        ("grad", {"grad": floats(4, 2 * V)[:, ::2]}),
        ("grad", {"grad": floats(V).expand(4, V)}),
        ("grad", {"logits": floats(4, V).bfloat16(), "grad": floats(4, V).half()}),
        ("squares", {"squares": None}),
        ("grad_chosen", {"grad_chosen": floats(4, 3)}),
    ],
    "divergence": [
        ("teacher", {"teacher": floats(4, V + 1)}),
        ("teacher", {"teacher": floats(4, V).double()}),
        ("kind", {"kind": 99}),
        ("mask", {"mask": floats(4)}),
        ("weights", {"weights": floats(3)}),
        ("values", {"values": floats(5)}),
    ],
    "divergence_gradient": [("grad_values", {"grad_values": floats(3)}), ("grad", {"grad": floats(4, V - 1)})],
    "divergence_top": [
        ("ids", {"ids": torch.tensor([[0, 1], [2, V], [4, 5], [1, 0]])}),
        ("log_probs", {"log_probs": floats(4, 3)}),
        ("outside", {"outside": 99}),
    ],
    "divergence_top_gradient": [("slopes", {"slopes": floats(4, 3).double()}), ("grad", {"grad": floats(3, V)})],
    "baseline": [
        ("group", {"group": integers(0, 2, 0)}),
        ("groups", {"groups": -1}),
        ("rewards", {"rewards": floats(R)}),
    ],
    "repack": [
        ("from, length", {"from": integers(5, 0, N)}),
        ("from, length", {"from": integers(-1, 0, 0)}),
        ("from, length", {"length": integers(2, -1, 3)}),
        ("from, length", {"length": integers(2, 0, 2**63 - 1)}),
        ("to, length", {"to": integers(1, 2, 4)}),
        ("to, length", {"to": integers(1, 4, 6)}),
        ("y", {"y": floats(8, dtype=torch.float64)}),
    ],
}


@pytest.mark.parametrize(("name", "argument", "changed"), [(n, a, c) for n, cases in WRONG.items() for a, c in cases])
def test_wrong_arguments_are_named(name, argument, changed):
    said = name.split("_")[0] if name.startswith(("segment", "divergence", "logits")) else name
    with pytest.raises((ValueError, TypeError), match=f"^{said}: {argument}: expected .*, got "):
        call(name, VALID[name]() | changed)


@pytest.mark.parametrize("rank", [-1, -(2**63), 2**63 - 1])
def test_ranks_that_do_not_exist(rank):
    arguments = VALID["kth"]() | {"rank": integers(rank, 0)}
    call("kth", arguments)
    assert arguments["y"].isnan().tolist() == [True, False]


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.bool)
DTYPES += (torch.uint8, torch.complex64)
PLACES = (-(2**63), -1, 0, 1, 2, 3, 5, N, N + 1, FAR, 2**62, 2**63 - 1)


@st.composite
def tensors(draw):
    """Tensors of every kind, and things that are none."""
    kind = draw(st.sampled_from(["plain", "plain", "places", "places", "strided", "empty", "special"]))
    size = draw(st.sampled_from([0, 1, 2, R, 4, V, 8, N, N + 1, 40]))
    dtype = draw(st.sampled_from(DTYPES))
    if kind == "places":
        return integers(*draw(st.lists(st.sampled_from(PLACES), min_size=0, max_size=N)))
    if kind == "strided":
        base = torch.zeros(2 * size + 1, dtype=dtype)
        return draw(st.sampled_from([base[::2], base[:1].expand(size), base[1 : 1 + size], base[: 2 * size : 2, None]]))
    if kind == "empty":
        return torch.empty(draw(st.sampled_from([(0,), (0, 1), (3, 0), (1, 0, 2)])), dtype=dtype)
    if kind == "special":
        return draw(
            st.sampled_from(
                [
                    None,
                    3,
                    [1.0],
                    "x",
                    torch.ones(N).numpy(),
                    torch.ones(N).to_sparse(),
                    torch.ones(N).conj(),
                    torch.full((N,), math.nan),
                    torch.nn.Parameter(torch.full((N,), math.inf)),
                    torch.tensor(1.0),
                    torch.ones(R, 1),
                    torch.ones(N, requires_grad=True),
                ]
            )
        )
    shape = draw(st.sampled_from([(size,), (size, 1), (1, size), ()]))
    return torch.zeros(shape, dtype=dtype)


JUNK_NUMBERS = st.sampled_from([-(2**31), -1, 0, 1, 2, 5, 99, 2**31 - 1, 2**40, 0.5, math.nan, -math.inf, 1e308, None])


@st.composite
def calls(draw):
    """A valid call with one to four arguments replaced; half of the time by parts of a valid one."""
    name = draw(st.sampled_from(sorted(VALID)))
    arguments = VALID[name]()
    chosen = draw(st.lists(st.sampled_from(sorted(arguments)), min_size=1, max_size=4, unique=True))
    for argument in chosen:
        old = arguments[argument]
        if isinstance(old, list):
            junk = st.lists(tensors() if argument == "operands" else JUNK_NUMBERS, min_size=8, max_size=9)
        elif isinstance(old, torch.Tensor) or old is None:
            junk = tensors()
        else:
            junk = JUNK_NUMBERS
        arguments[argument] = draw(junk)
        if isinstance(old, torch.Tensor) and old.dtype == torch.int64 and draw(st.booleans()):
            arguments[argument] = integers(
                *draw(st.lists(st.sampled_from(PLACES), min_size=len(old), max_size=len(old)))
            )
    return name, arguments


@given(calls())
@settings(max_examples=600)
def test_junk_raises_or_computes(made):
    name, arguments = made
    with contextlib.suppress(ValueError, TypeError, RuntimeError):
        call(name, arguments)


def test_offsets_of_pieces_of_other_marks_are_an_error():
    marks, numbers = torch.tensor([False, True, True, True]), [torch.zeros(2, dtype=torch.int64) for _ in range(4)]
    begin, end = torch.tensor([0, 2]), torch.tensor([2, 4])
    for offsets in ([0, 1, 2], [0, 2, 5], [2**40, 0, 0], [-1, 1, 2]):
        with pytest.raises(ValueError, match="pieces: offset: expected those of piece_offsets"):
            _C.pieces(marks, begin, end, torch.tensor(offsets), 0, *numbers)
