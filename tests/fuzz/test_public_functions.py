"""Every public function with malformed arguments: it returns or raises, and the process lives.

The short form runs in the suite; ``make fuzz`` runs many more cases under address and undefined-behaviour sanitizers.
"""

import inspect
from contextlib import suppress

import malformed
import pytest
import tokcredit as tc
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokcredit.blocks import divergence, head, length, log_probs, scan, segment, select, tree, tree_pack, values

RAISED = (TypeError, ValueError, RuntimeError, IndexError, NotImplementedError, OverflowError)
N, R, G, V = 12, 4, 2, 5


def spans(mask=True):
    return tc.Spans(
        torch.tensor([0, 3, 5, 5]), torch.tensor([3, 5, 5, 11]), N, torch.arange(N) % 4 != 1 if mask else None
    )


def rollouts(**inputs):
    tokens = torch.tensor([1, 2, 3, 1, 2, 1, 2, 4, 4, 0, 1, 2])
    edges, groups, rewards = (
        torch.tensor([0, 3, 5, 5, N]),
        torch.tensor([7, 3, 7, 3]),
        torch.tensor([1.0, 0.0, 0.5, 1.0]),
    )
    return tc.Rollouts(tokens, edges, groups, rewards, torch.arange(N) % 4 != 1, old_log_probs=-torch.rand(N), **inputs)


def floats(*shape):
    return torch.randn(*shape)


def forest():
    return {"parent": torch.tensor([-1, 0, 0, -1]), "leaf": torch.tensor([1, 2, 3]), "x": floats(3)}


PER_ROW = {"x": floats(R), "by": tc.segment.Ids(torch.tensor([0, 1, 1, 0]), G)}
PER_TOKEN = {"x": floats(N), "by": spans()}
LOGITS = {"logits": floats(N, V), "tokens": torch.arange(N) % V}

# Well-formed arguments of every public function of the blocks. One or two of them are replaced by malformed ones.
CALLS = {
    "spans": (
        tc.Spans,
        {
            "begin": torch.tensor([0, 3]),
            "end": torch.tensor([3, 9]),
            "size": N,
            "mask": torch.ones(N, dtype=torch.bool),
        },
    ),
    "spans, packed": (
        tc.Spans.from_cu_seqlens,
        {"cu_seqlens": torch.tensor([0, 3, N]), "mask": torch.ones(N, dtype=torch.bool)},
    ),
    "spans, padded": (
        tc.Spans.from_padded,
        {"lengths": torch.tensor([3, 0, 4]), "width": 4, "mask": torch.ones(3, 4, dtype=torch.bool)},
    ),
    "scan.cumulative": (scan.cumulative, {"x": floats(N), "spans": spans(), "carry": floats(R)}),
    "scan.positions": (scan.positions, {"spans": spans()}),
    "scan.returns": (scan.returns, {"rewards": floats(N), "spans": spans(), "discount": 0.9}),
    "scan.following": (scan.following, {"x": floats(N), "spans": spans(), "last": floats(R)}),
    "scan.generalized_advantages": (
        scan.generalized_advantages,
        {
            "rewards": floats(N),
            "values": floats(N),
            "spans": spans(),
            "discount": 1.0,
            "trace": 0.9,
            "bootstrap": floats(R),
        },
    ),
    **{
        f"segment.{f.__name__}, rows": (f, PER_TOKEN)
        for f in (
            segment.sum,
            segment.mean,
            segment.var,
            segment.minimum,
            segment.maximum,
            segment.logsumexp,
            segment.moments,
        )
    },
    **{
        f"segment.{f.__name__}, ids": (f, PER_ROW)
        for f in (
            segment.sum,
            segment.mean,
            segment.var,
            segment.minimum,
            segment.maximum,
            segment.logsumexp,
            segment.moments,
        )
    },
    "segment.moment_table": (segment.moment_table, PER_ROW),
    "segment.standardize": (
        segment.standardize,
        {
            "x": floats(R),
            "group": torch.zeros(R, dtype=torch.int64),
            "moments": floats(2, 5).double(),
            "standard": "normalized",
            "epsilon": 1e-6,
            "dtype": torch.float32,
        },
    ),
    "segment.weighted_sum": (segment.weighted_sum, {"x": floats(N), "spans": spans(), "weights": floats(N)}),
    "segment.count": (segment.count, {"by": PER_ROW["by"]}),
    "segment.keys": (segment.keys, {"ids": torch.tensor([0, 1, 1]), "others": torch.tensor([2, 2, 0])}),
    "segment.runs": (segment.runs, {"spans": spans()}),
    "segment.moment_table, weighted": (
        segment.moment_table,
        {"x": floats(N), "by": spans(), "ddof": 0.0, "weights": torch.rand(N)},
    ),
    "segment.pieces": (segment.pieces, {"marks": spans().mask & (torch.arange(N) % 3 == 0), "spans": spans()}),
    "head.log_probs_and_entropies": (
        head.log_probs_and_entropies,
        {
            "hidden": floats(N, 3),
            "weight": floats(V, 3),
            "tokens": torch.arange(N) % V,
            "bias": floats(V),
            "rows": torch.arange(N),
            "squares": True,
            "chosen": torch.tensor([0, -1, 2]),
            "temperature": 0.7,
            "softcap": 5.0,
            "scale": 1.5,
            "vocabulary": V,
            "tile_bytes": 100,
        },
    ),
    "select.sizes": (select.sizes, {"spans": spans(), "by": PER_ROW["by"]}),
    "select.everything": (select.everything, {"spans": spans()}),
    "select.top_k": (
        select.top_k,
        {"score": floats(N), "k": torch.tensor([1, 2]), "spans": spans(), "by": PER_ROW["by"]},
    ),
    "select.kth": (select.kth, {"x": floats(N), "rank": 1, "spans": spans(), "by": PER_ROW["by"]}),
    "select.quantile": (select.quantile, {"x": floats(N), "q": 0.3, "spans": spans(), "by": None}),
    "select.quantile_nearest": (
        select.quantile_nearest,
        {"x": floats(N), "q": 0.3, "spans": spans(), "by": PER_ROW["by"]},
    ),
    "select.within_mean": (select.within_mean, {"x": floats(N), "budget": 0.5, "spans": spans(), "least": 1}),
    "select.diverse": (
        select.diverse,
        {"score": floats(N), "vectors": floats(N, 3), "k": 2, "spans": spans(), "weight": 0.5},
    ),
    "select.sensitivity": (
        select.sensitivity,
        {"project": torch.tanh, "x": floats(N, 3), "directions": floats(2, 3), "step": 0.1},
    ),
    "select.top_share": (
        select.top_share,
        {
            "score": floats(N),
            "k": 2,
            "spans": spans(),
            "words": torch.arange(N) // 2,
            "protected": torch.arange(N) % 5 == 0,
            "segments": torch.arange(N) // 4,
            "segment_weights": floats(N),
            "reduce": "sum",
        },
    ),
    "select.frequency.agreement": (
        select.frequency.agreement,
        {"query": floats(2, 4), "keys": floats(2, 5, 4), "k": 2, "layout": "half", "rotated": 4},
    ),
    "select.frequency.dominant": (
        select.frequency.dominant,
        {"agreement": floats(2, 5), "threshold": 0.5, "least": 1, "most": 2},
    ),
    "select.frequency.scores": (
        select.frequency.scores,
        {"query": floats(2, 4), "keys": floats(2, 5, 4), "chunks": torch.ones(2, 2, dtype=torch.bool)},
    ),
    "select.frequency.keys": (select.frequency.keys, {"scores": floats(2, 5), "budget": 2}),
    "select.maximum_variance": (select.maximum_variance, {"x": floats(R), "k": 2, "by": PER_ROW["by"]}),
    "tree.build": (tree.build, {"batch": rollouts()}),
    "tree.context_keys": (
        tree.context_keys,
        {"tokens": torch.arange(N), "spans": spans(), "start": torch.zeros(R, dtype=torch.int64)},
    ),
    "tree.expand": (
        lambda **x: tree.build(rollouts()).expand(**x),
        {"body": floats(2 * R), "head": floats(2 * R), "row": floats(R)},
    ),
    "tree_pack.pack": (
        tree_pack.pack,
        {
            "batch": rollouts(extras={"prompt_tokens": torch.tensor([[1, 2], [-1, 2], [1, 2], [-1, 3]])}),
            "budget": 20,
            "wanted": torch.ones(N, dtype=torch.bool),
            "tags": (torch.zeros(R, 2, dtype=torch.int64), torch.zeros(N, dtype=torch.int64)),
            "together": torch.tensor([0, 1, 1, 0]),
            "predictions": 20,
            "bin_cost": 1,
            "ranks": 2,
        },
    ),
    "values.monte_carlo": (
        lambda **x: values.monte_carlo(tree.build(rollouts()), **x),
        {"rewards": floats(R), "counted": torch.ones(R, dtype=torch.bool)},
    ),
    "values.monte_carlo_change": (
        lambda **x: values.monte_carlo_change(tree.build(rollouts()), **x),
        {"rewards": floats(R), "counted": torch.ones(R, dtype=torch.bool)},
    ),
    "values.monte_carlo_ends": (
        lambda **x: values.monte_carlo_ends(tree.build(rollouts(extras={"context_keys": torch.arange(R)})), **x),
        {"rewards": floats(R), "counted": torch.ones(R, dtype=torch.bool)},
    ),
    "values.mean_of_children": (
        lambda **x: values.mean_of_children(tree.build(rollouts()), **x),
        {"rewards": floats(R)},
    ),
    "values.leave_one_out": (lambda **x: values.leave_one_out(tree.build(rollouts()), **x), {"rewards": floats(R)}),
    "values.temporal_difference": (
        lambda **x: values.temporal_difference(tree.build(rollouts()), **x),
        {"value": floats(2 * R)},
    ),
    "values.fold_means": (values.fold_means, forest()),
    "log_probs.with_entropies": (log_probs.with_entropies, {**LOGITS, "temperature": 1.0}),
    "log_probs.from_logits": (log_probs.from_logits, {**LOGITS, "temperature": 1.0}),
    "log_probs.squared_probs": (log_probs.squared_probs, {**LOGITS, "temperature": 0.7}),
    "log_probs.normalizers": (log_probs.normalizers, {"logits": floats(N, V), "batch": rollouts()}),
    "log_probs.group_vocabulary": (log_probs.group_vocabulary, {"batch": rollouts()}),
    "log_probs.group_probs": (log_probs.group_probs, {"logits": floats(N, V), "batch": rollouts()}),
    "length.remaining": (length.remaining, {"spans": spans()}),
    "length.targets": (length.targets, {"spans": spans(), "gamma": 0.9, "values": floats(N), "trace": 0.5}),
    "length.advantages": (
        length.advantages,
        {
            "values": floats(N),
            "spans": spans(),
            "gamma": 0.9,
            "trace": 1.0,
            "truncated": torch.ones(R, dtype=torch.bool),
        },
    ),
    "length.squared": (length.squared, {"z": floats(N), "target": floats(N), "spans": spans(), "floor": 0.1}),
    "length.cross_entropy": (length.cross_entropy, {"z": floats(N), "target": -torch.rand(N), "spans": spans()}),
    "length.tokens": (length.tokens, {"z": floats(N), "gamma": 0.9}),
    "length.tokens_of_value": (length.tokens_of_value, {"value": -torch.rand(N), "gamma": 0.9}),
    "length.gamma_for": (length.gamma_for, {"length": 10.0, "resolved": 0.9}),
    **{
        f"divergence.{f.__name__}": (
            f,
            {
                "student": floats(N, V),
                "teacher": divergence.Mixture(floats(N, V), floats(N, V), floats(N)),
                "kind": "js",
                "share": 0.5,
                "temperature": 0.7,
                "mask": torch.arange(N) % 3 != 1,
                "overwrite": False,
            },
        )
        for f in (divergence.with_entropies, divergence.between)
    },
    "divergence.kl": (divergence.kl, {"p_logits": floats(N, V), "q_logits": floats(N, V), "temperature": 1.0}),
    "divergence.js": (
        divergence.js,
        {"p_logits": floats(N, V), "q_logits": floats(N, V), "temperature": 1.0, "top_p": 0.9},
    ),
    "divergence.nucleus": (divergence.nucleus, {"log_p": floats(N, V).log_softmax(-1), "top_p": 0.9}),
    "divergence.disagreement": (
        divergence.disagreement,
        {"logits": floats(N, V), "batch": rollouts(), "padded": False},
    ),
}
POSITIONAL = {"segment.keys"}


def sized(x):
    return x.numel() if isinstance(x, torch.Tensor) else R


@st.composite
def arguments(draw, well_formed):
    """The well-formed arguments with one or two of them malformed."""
    made = dict(well_formed)
    for name in draw(st.lists(st.sampled_from(sorted(made)), min_size=1, max_size=2, unique=True)):
        x = made[name]
        if isinstance(x, tc.Spans) and draw(st.booleans()):
            parts = [draw(malformed.anything(sized(part))) for part in (x.begin, x.end)]
            with suppress(*RAISED):
                made[name] = tc.Spans(*parts, draw(st.sampled_from([N, 0, -1, 1 << 40])), x.mask)
        elif isinstance(x, torch.Tensor) and draw(st.booleans()):
            made[name] = draw(malformed.changed(x))
        else:
            made[name] = draw(malformed.anything(sized(x)))
    return made


def survives(function, *positional, **named):
    """Call a function with malformed arguments; it must return or raise an error that tells what is wrong."""
    try:
        function(*positional, **named)
    except RAISED as error:
        assert str(error), "an error without a message"


def public(module):
    return {
        name
        for name, x in vars(module).items()
        if inspect.isfunction(x) and x.__module__ == module.__name__ and not name.startswith("_")
    }


def test_every_public_function_is_here():
    for module in (scan, segment, select, tree, values, log_probs, length, divergence):
        short = module.__name__.rpartition(".")[2]
        missing = public(module) - {name.partition(",")[0].removeprefix(f"{short}.") for name in CALLS}
        assert not missing - {"check_gamma"}, f"{short}: {sorted(missing)}"


@pytest.mark.parametrize("name", CALLS)
def test_well_formed_arguments_pass(name):
    function, well_formed = CALLS[name]
    function(*well_formed.values()) if name in POSITIONAL else function(**well_formed)


def floating(found):
    """The float tensors of a result."""
    if isinstance(found, torch.Tensor):
        return [found] if found.is_floating_point() else []
    return [x for part in found for x in floating(part)] if isinstance(found, (tuple, list)) else []


@pytest.mark.parametrize("name", CALLS)
def test_an_argument_without_gradient_is_documented(name):
    """What requires gradient gets it, or is refused, or the docstring says that there is none."""
    function, well_formed = CALLS[name]
    module, _, short = name.partition(",")[0].rpartition(".")
    documented = {"tree": tree.PrefixTree, "values": values}.get(module)  # of which CALLS has lambdas
    text = " ".join((inspect.getdoc(getattr(documented, short, function)) or "").split())
    for key, x in well_formed.items():
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            continue
        own = x.clone().requires_grad_()
        given = {**well_formed, key: own}
        try:
            results = floating(function(*given.values()) if name in POSITIONAL else function(**given))
        except ValueError as error:
            assert str(error).startswith(f"{key}: expected a tensor without gradient")
            continue
        total = sum((result.double().sum() for result in results), torch.zeros(()))
        got = total.requires_grad and torch.autograd.grad(total, own, allow_unused=True)[0] is not None
        assert got or not results or "without gradient" in text, key


def test_a_trace_with_gradient_is_refused():
    trace = torch.full((R,), 0.9)
    function, well_formed = CALLS["scan.generalized_advantages"]
    function(**{**well_formed, "trace": trace})
    with pytest.raises(ValueError, match="trace: expected a tensor without gradient, got one that requires it"):
        function(**{**well_formed, "trace": trace.requires_grad_()})


@pytest.mark.parametrize("name", CALLS)
@given(data=st.data())
@settings(suppress_health_check=list(HealthCheck))
def test_malformed_arguments(name, data):
    function, well_formed = CALLS[name]
    made = data.draw(arguments(well_formed))
    survives(function, *made.values()) if name in POSITIONAL else survives(function, **made)
