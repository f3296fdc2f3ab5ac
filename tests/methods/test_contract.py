"""What every method promises, whatever it does; finds methods and stages by itself."""

import dataclasses
import importlib.util
import inspect
import math
import pickle
import random
import re
from pathlib import Path

import naive
import pytest
import tokcredit as tc
import tokcredit.mixing
import torch
from tokcredit.rollouts import FIELDS
from tokcredit.stages.base import Stage

ROOT = Path(__file__).parents[2]
METHODS = tc.methods.names()
POLICY_GRADIENT = [name for name in METHODS if isinstance(tc.methods.load(name), tc.Objective)]
each = pytest.mark.parametrize("name", METHODS)
WIDTH = 7


def carried(objective, seed=0):
    """A batch of the objective's kind with all inputs it requires, and the variable that its loss is given."""
    make = naive.random_pairs if isinstance(objective, tc.Preference) else naive.random_batch
    batch, current = make(seed, length=WIDTH)
    return naive.with_inputs(batch, objective.required_inputs), current


def prepare(objective, batch, **counts):
    return objective.prepare(batch, progress=0.5 if objective.is_scheduled else None, **counts)


def loss(objective, batch, variable):
    return naive.loss_of(objective, prepare(objective, batch), variable)


def gradient(objective, batch, variable):
    variable = variable.clone().requires_grad_()
    out = loss(objective, batch, variable)
    out.loss.backward()
    return out, variable.grad


def of_fixed_length(objective):
    """The objective with a denominator that does not depend on the rows at hand."""
    if isinstance(getattr(objective, "aggregation", None), tc.aggregation.sequence_sum):
        return dataclasses.replace(objective, aggregation=tc.aggregation.sequence_sum(WIDTH))
    return objective


def partition(objective, batch, seed):
    """Rows in random order, cut into parts that the objective can bear: groups that it compares stay whole."""
    g = torch.Generator().manual_seed(seed)
    if not objective.couples_rows:
        return torch.randperm(batch.num_rows, generator=g).split(5)
    order = torch.randperm(batch.num_groups, generator=g)
    parts = order.split(4 if isinstance(objective, tc.Preference) else 2)
    return [torch.cat([(batch.group_index == group).nonzero()[:, 0] for group in part]) for part in parts]


@each
def test_is_documented_and_tested(name):
    function = getattr(tc.methods, name)
    text = inspect.getdoc(function)
    first, *rest = text.split("\n")
    assert first.endswith(".") and len(first) > 20 and rest[0] == ""
    for heading in ("Cost: ", "References: "):
        assert len(re.findall(f"^{heading}", text, re.M)) == 1
    assert "arXiv" in text or name == "sft"
    differences = re.split(r"^Differences from the (?:paper|released code):\n", text, flags=re.M)[1:]
    assert differences and all(x.startswith("    - ") for x in differences)
    for argument in inspect.signature(function).parameters:
        assert re.search(rf"^    {argument}: ", text, re.M), argument
    assert importlib.import_module(f"tokcredit.methods.{name}").__doc__.count("\n") == 0
    test = (ROOT / f"tests/methods/test_{name}.py").read_text()
    assert "def test_by_hand" in test
    assert "def test_defaults" in test, "every value that the method chooses, so that none moves unseen"
    assert "naive" in test or "reference" in test


@each
def test_code_in_documentation_runs(name):
    """Whatever a docstring says can be called is called; a mixture must differ from the method itself."""
    text = inspect.getdoc(getattr(tc.methods, name))
    for code in re.findall(r"``((?:tokcredit|tc)\.[^`]*)``", text):
        if code.startswith("tokcredit.train."):  # needs more packages
            assert (ROOT / "python" / (code.replace(".", "/") + ".py")).exists()
            continue
        value = eval(" ".join(code.split()), {"tokcredit": tc, "tc": tc})
        assert value is not None
        if isinstance(value, Stage):
            batch, current = carried(value)
            assert naive.loss_of(value, prepare(value, batch), current).loss.isfinite()
            assert value != tc.methods.load(name)
    for reference in re.findall(r":func:`~?([\w.]+)`", text):
        functions = {"tokcredit": tc, **{x: getattr(tc.methods, x) for x in METHODS}}
        assert callable(eval(reference, functions))


def test_tables_are_those_of_the_methods():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs/tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    for document in ("docs/methods.md", "docs/hosts.md", "README.md"):
        text = (ROOT / document).read_text()
        assert text == tables.filled(text), f"{document} is out of date: python docs/tables.py"
    rows, readme = (ROOT / "docs/methods.md").read_text(), (ROOT / "README.md").read_text()
    for name in METHODS:
        parts = tables.sections(name)
        assert f"| [`{name}`](#{name}) | {tables.table_cell(parts['Summary'])} |" in rows
        assert f"| `{name}` | {tables.table_cell(parts['Summary'])} |" in readme
        facts = [x for heading, body in parts.items() if heading.startswith("Differences") for x in tables.facts(body)]
        assert facts and all(x.endswith(".") and f"- {x}\n" in rows for x in facts)
        assert len(facts) == sum(body.count("\n    - ") for body in parts.values())


@each
def test_prints_compares_pickles_and_converts(name):
    objective = tc.methods.load(name)
    assert objective == tc.methods.load(name)
    assert pickle.loads(pickle.dumps(objective)) == objective
    assert eval(repr(objective), vars_of_stages()) == objective
    assert set(dataclasses.asdict(objective)) == {f.name for f in dataclasses.fields(objective)}


def vars_of_stages():
    return {**tokcredit.mixing.inner(), "inf": float("inf")}


@each
def test_reads_registered_inputs(name):
    assert tc.methods.load(name).required_inputs <= tc.inputs.names()


@each
def test_ints_are_taken_for_floats(name):
    function = getattr(tc.methods, name)
    for setting, parameter in inspect.signature(function).parameters.items():
        if "float" not in str(parameter.annotation):
            continue
        for whole in (1, 0, 2, -1):
            try:
                expected = function(**{setting: float(whole)})
                batch, current = carried(expected)
                of_float = loss(expected, batch, current).loss
            except ValueError:
                continue  # out of range
            objective = function(**{setting: whole})
            assert objective == expected
            assert torch.equal(loss(objective, batch, current).loss, of_float)
            if not objective.is_scheduled:
                assert repr(objective) == repr(expected)


@each
def test_types_of_settings_are_checked(name):
    """Also where a setting decides which stages there are, or is computed with before a stage sees it."""
    function = getattr(tc.methods, name)
    for setting, parameter in inspect.signature(function).parameters.items():
        annotation = str(parameter.annotation)
        named = annotation == "InputName" or annotation.startswith("Literal")
        wrong = [("1", ValueError if named else TypeError), (object(), TypeError)]
        if annotation == "bool":
            wrong += [(1, TypeError), (None, TypeError), (math.nan, TypeError)]
        elif annotation.startswith("float"):
            wrong += [(True, TypeError), (math.nan, ValueError)]
        elif annotation.startswith("int"):
            wrong += [(1.5, TypeError), (True, TypeError), (-1, ValueError)]
        for value, error in wrong:
            with pytest.raises(error, match=r"\w+: \w+: expected "):
                function(**{setting: value})


@each
@pytest.mark.parametrize("seed", range(3))
def test_micro_batches_add_up(name, seed):
    objective = tc.methods.load(name)
    batch, current = carried(objective)
    prepared = prepare(objective, batch)
    whole = current.clone().requires_grad_()
    total = naive.loss_of(objective, prepared, whole).loss
    total.backward()
    parts = current.clone().requires_grad_()
    added = sum(naive.loss_of(objective, prepared.select(r), parts[r]).loss for r in partition(objective, batch, seed))
    added.backward()
    torch.testing.assert_close(added, total)
    torch.testing.assert_close(parts.grad, whole.grad)
    assert whole.grad.abs().sum() > 0


@each
def test_ranks_average_to_the_whole(name):
    """Each rank has its own groups; where rows of different groups are compared, it takes its rows from the whole."""
    objective = of_fixed_length(tc.methods.load(name))
    batch, current = carried(objective)
    whole = current.clone().requires_grad_()
    prepared = prepare(objective, batch)
    naive.loss_of(objective, prepared, whole).loss.backward()
    parts = current.clone().requires_grad_()
    trained = torch.stack([x.any() for x in prepared.mask.split(WIDTH)])
    for rank in range(2):
        rows = (batch.group_index % 2 == rank).nonzero()[:, 0]
        if objective.compares_groups:
            local = prepare(objective, batch, dp_size=2).select(rows)
        else:
            local = prepare(
                objective,
                batch.select(rows),
                batch_num_tokens=int(prepared.lengths.sum()),
                global_batch_size=int(trained.sum()),
                global_num_groups=len(set(batch.group_index[trained].tolist())),
                dp_size=2,
            )
        (naive.loss_of(objective, local, parts[rows]).loss / 2).backward()
    torch.testing.assert_close(parts.grad, whole.grad)


@each
def test_packed_equals_padded(name):
    objective = of_fixed_length(tc.methods.load(name))
    batch, current = carried(objective)
    spans = list(zip(batch.begin.tolist(), batch.end.tolist(), strict=True))
    keep = torch.cat([torch.arange(b, e) for b, e in spans])

    def pick(name):
        x = batch.input(name)
        return x[keep] if tc.inputs.get(name).per == "token" else x

    packed = tc.Rollouts(
        batch.tokens[keep],
        torch.tensor([0, *(e - b for b, e in spans)]).cumsum(0),
        batch.group_ids,
        batch.rewards,
        batch.response_mask[keep],
        **{name: pick(name) for name in FIELDS if getattr(batch, name) is not None},
        extras={name: pick(name) for name in batch.extras},
    )
    a = loss(objective, batch, current).loss
    b = loss(objective, packed, current.reshape(-1)[keep]).loss
    torch.testing.assert_close(a, b)


@each
def test_masked_tokens_cannot_leak(name):
    """Inputs are NaN where the mask is False, and whatever the log-probs are there changes nothing."""
    objective = tc.methods.load(name)
    batch, current = carried(objective)
    _, clean = gradient(objective, batch, current)
    mask = batch.shaped(batch.response_mask)
    for poison in (float("nan"), float("inf"), 1e30):
        old = batch.shaped(batch.old_log_probs).masked_fill(~mask, -poison).reshape(-1)
        poisoned = dataclasses.replace(batch, old_log_probs=old)
        out, dirty = gradient(objective, poisoned, current.masked_fill(~mask, poison))
        assert out.loss.isfinite() and all(m.isfinite() for m in out.metrics.values())
        torch.testing.assert_close(dirty, clean)


@each
def test_nan_at_a_training_token_reaches_loss_and_gradient(name):
    """A NaN variable gives NaN at that token's gradient, and a loss is never NaN beside a finite gradient."""
    objective = tc.methods.load(name)
    batch, current = carried(objective)
    clean = gradient(objective, batch, current)[1].reshape(-1)
    trains = prepare(objective, batch).mask
    row_of = torch.arange(batch.num_tokens) // WIDTH
    for t in trains.nonzero()[:, 0].tolist():
        dirty = current.clone()
        dirty.view(-1)[t] = math.nan
        out, grad = gradient(objective, batch, dirty)
        grad = grad.reshape(-1)
        assert bool(out.loss.isnan()) == bool(grad[t].isnan())
        assert grad[t].isnan() or clean[t] == 0
        if isinstance(objective, tc.Objective) and isinstance(objective.clip, tc.clip.soft | tc.clip.ppo):
            own = trains & (row_of == row_of[t])
            alone = own & (torch.arange(len(own)) == t)
            coupled = any(stage.couples_tokens for stage in (objective.ratio, *objective.scales))
            reached = own if coupled else alone
            torch.testing.assert_close(grad[~reached], clean[~reached])
            certain = own if isinstance(objective.ratio, tc.ratio.sequence) else alone
            assert grad[certain & (clean != 0)].isnan().all()
        if isinstance(objective, tc.Objective):
            assert out.metrics["nonfinite_log_probs"] == 1


@each
def test_variables_are_float_tensors(name):
    """An integer tensor has no gradient, so a loss of it would train nothing."""
    objective = tc.methods.load(name)
    batch, current = carried(objective)
    prepared, further = prepare(objective, batch), naive.further(objective, current)
    for wrong in objective.variables:
        given = {objective.variables[0]: current, **further}
        given[wrong] = given[wrong].long()
        with pytest.raises(TypeError, match=f"{wrong}: expected a float tensor, got int64"):
            objective.loss(prepared, given.pop(objective.variables[0]), **given)


@each
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinity_at_a_training_token(name, value):
    """The loss is as its formula says; where that is NaN, so is the gradient of the token."""
    objective = tc.methods.load(name)
    batch, current = carried(objective)
    for t in prepare(objective, batch).mask.nonzero()[:, 0].tolist():
        dirty = current.clone()
        dirty.view(-1)[t] = value
        out, grad = gradient(objective, batch, dirty)
        assert bool(out.loss.isnan()) <= bool(grad.view(-1)[t].isnan())
        if isinstance(objective, tc.Objective):
            assert out.metrics["nonfinite_log_probs"] == 1


WITH_EPSILON = [name for name in METHODS if "epsilon" in inspect.signature(getattr(tc.methods, name)).parameters]


@pytest.mark.parametrize("name", WITH_EPSILON)
def test_equal_rewards_without_epsilon(name):
    """A method that allows an epsilon of 0 does not divide 0 by 0 where the rewards of a group are equal."""
    try:
        objective = tc.methods.load(name, epsilon=0.0)
    except ValueError as error:
        assert "epsilon: expected a number above 0, got 0" in str(error)
        return
    batch, current = carried(objective)
    equal = batch.with_rewards(torch.full_like(batch.rewards, 0.1))
    assert prepare(objective, equal).credit.isfinite().all()
    assert loss(objective, equal, current).loss.isfinite()


@each
def test_all_masked_is_constant_and_attached(name):
    objective = tc.methods.load(name)
    batch, current = carried(objective)
    none = None if batch.token_rewards is None else torch.zeros_like(batch.token_rewards)
    batch = dataclasses.replace(batch, response_mask=torch.zeros_like(batch.response_mask), token_rewards=none)
    out, grad = gradient(objective, batch, current)
    zero = torch.zeros(1, dtype=torch.float64)  # the score of an empty row
    empty = objective.link(zero, zero).item() if isinstance(objective, tc.Preference) else 0.0
    assert out.loss.item() == pytest.approx(empty) and not grad.any()
    assert not prepare(objective, batch).has_gradient.any()


@each
@pytest.mark.parametrize("width", [WIDTH, 0])
def test_a_padded_batch_of_no_rows(name, width):
    objective = tc.methods.load(name)
    tokens, none = torch.zeros(0, width, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    batch = tc.Rollouts.from_padded(tokens, tokens > 0, none, torch.zeros(0), old_log_probs=tokens.float())
    batch = naive.with_inputs(batch, objective.required_inputs)
    out, grad = gradient(objective, batch, tokens.float())
    assert out.loss == 0 and grad.shape == (0, width)
    assert prepare(objective, batch).select([]).has_gradient.shape == (0,)
    assert all(m.isfinite() for m in out.metrics.values())


@each
def test_rows_without_advantage_have_no_gradient(name):
    objective = tc.methods.load(name)
    batch, current = carried(objective)
    if not isinstance(objective, tc.Preference):
        batch = dataclasses.replace(batch, rewards=torch.where(batch.group_index == 0, 1.0, batch.rewards))
    prepared = prepare(objective, batch)
    _, grad = gradient(objective, batch, current)
    has_gradient = prepared.has_gradient
    assert has_gradient.any()
    assert not grad[~has_gradient].any()
    terms = getattr(objective, "terms", ())
    if all(term.after_filters for term in terms):
        assert not grad[~prepared.mask.view(batch.shape)].any()
    if not isinstance(objective, tc.Preference) and not terms:  # both rows of a pair are needed if one of them is
        assert not has_gradient[~torch.stack([row.any() for row in prepared.advantages])].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "tempo"])
def test_equal_rewards_cancel_exactly(name, dtype):
    """Sums of equal numbers are not always their multiple; divided by a spread of 0 the difference would be large."""
    objective = tc.methods.load(name)
    for size in range(2, 33):
        rewards = torch.cat([torch.full((size,), r, dtype=dtype) for r in (0.1, 0.7, 0.9, 1.1, -0.3)])
        tokens = torch.stack([torch.zeros(5 * size), torch.arange(5.0 * size)], 1).long()
        groups = torch.arange(5).repeat_interleave(size)
        batch = tc.Rollouts.from_padded(tokens, torch.ones_like(tokens), groups, rewards)
        prepared = objective.prepare(batch)
        assert not prepared.advantages.any() and not prepared.has_gradient.any()


def compares_rewards():
    """Methods whose advantages are 0 if all rewards are equal, whatever those of other groups are."""
    for name in POLICY_GRADIENT:
        objective = tc.methods.load(name)
        if objective.credit.compares_groups and tc.filters.mixed_groups() not in objective.filters:
            continue
        batch = dataclasses.replace(carried(objective)[0], rewards=torch.ones(12))
        if not prepare(objective, batch).advantages.any() and not objective.terms:
            yield name


@pytest.mark.parametrize("name", list(compares_rewards()))
def test_groups_of_equal_rewards_have_no_advantage(name):
    objective = tc.methods.load(name)
    batch, _ = carried(objective)
    batch = dataclasses.replace(batch, rewards=torch.where(batch.group_index == 0, 0.7, batch.rewards))
    prepared = prepare(objective, batch)
    assert not prepared.has_gradient[batch.group_index == 0].any()
    assert prepared.has_gradient.any()


@pytest.mark.parametrize(
    "name", [name for name in POLICY_GRADIENT if "old_log_probs" not in tc.methods.load(name).required_inputs]
)
def test_absent_old_log_probs_mean_on_policy(name):
    objective = tc.methods.load(name)
    batch, current = carried(objective)
    grads = [
        gradient(objective, dataclasses.replace(batch, old_log_probs=old), current)[1]
        for old in (None, current.reshape(-1))
    ]
    torch.testing.assert_close(*grads)
    assert grads[0].abs().sum() > 0


def in_dtype(batch, dtype):
    """The batch with all floats in a dtype."""
    floats = {name: x.to(dtype) for name, x in batch.extras.items() if x.is_floating_point()}
    fields = {name: x.to(dtype) for name in FIELDS if (x := getattr(batch, name)) is not None}
    return dataclasses.replace(batch, rewards=batch.rewards.to(dtype), extras={**batch.extras, **floats}, **fields)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_default_dtype_changes_nothing(name, dtype):
    batch, current = carried(tc.methods.load(name))
    batch, current = in_dtype(batch, dtype), current.to(dtype)
    found = []
    for default in (torch.float32, torch.bfloat16, torch.float64):
        before = torch.get_default_dtype()
        torch.set_default_dtype(default)
        try:
            objective = tc.methods.load(name)
            out, grad = gradient(objective, batch, current)
            metrics = {key: x.item() for key, x in out.metrics.items()}
            found.append((out.loss, grad, prepare(objective, batch).advantages, metrics))
        finally:
            torch.set_default_dtype(before)
    for other in found[1:]:
        for x, y in zip(found[0][:3], other[:3], strict=True):
            assert x.dtype == y.dtype and torch.equal(x, y)
        assert found[0][3] == other[3]
    assert found[0][1].dtype == dtype and found[0][1].any()


def is_differentiated(name):
    """Whether the gradient is that of the value of the loss, with nothing held fixed."""
    objective = tc.methods.load(name)
    cumulative = isinstance(getattr(objective, "ratio", None), tc.ratio.cumulative)
    return naive.is_integral(prepare(objective, carried(objective)[0])) and not cumulative


@pytest.mark.parametrize("name", list(filter(is_differentiated, METHODS)))
def test_float64_stays_float64(name):
    """A step of 1e-9, far below the precision of float32, moves the loss along its gradient."""
    objective = tc.methods.load(name)
    batch, current = carried(objective)
    out, grad = gradient(objective, batch, current)
    assert out.loss.dtype == grad.dtype == torch.float64
    step = 1e-9
    further = naive.further(objective, current)
    moved = objective.loss(prepare(objective, batch), current + step * grad.sign(), **further).loss
    torch.testing.assert_close((moved - out.loss) / step, grad.abs().sum(), rtol=1e-5, atol=0)


@each
def test_inputs_attached_to_a_graph(name):
    objective = tc.methods.load(name)
    batch, current = carried(objective)
    _, expected = gradient(objective, batch, current)

    def attached(x):
        return x.clone().requires_grad_() * 1 if x.is_floating_point() else x

    fields = {name: attached(x) for name in FIELDS if (x := getattr(batch, name)) is not None}
    extras = {name: attached(x) for name, x in batch.extras.items()}
    graph = dataclasses.replace(batch, extras=extras, rewards=attached(batch.rewards), **fields)
    prepared = prepare(objective, graph)
    assert not prepared.advantages.requires_grad
    variable = current.clone().requires_grad_()
    out = naive.loss_of(objective, prepared, variable)
    out.loss.backward()
    assert torch.equal(variable.grad, expected)
    for x in (*fields.values(), *extras.values()):
        assert x.grad_fn is None or x.requires_grad


def kinds(objective):
    return {
        f.name: getattr(objective, f.name) for f in dataclasses.fields(objective) if f.metadata["range"].kind == "stage"
    }


@each
@pytest.mark.parametrize("base", ["grpo", "dpo", "sft"])
def test_mixing_by_name_gives_exactly_that_stage(name, base):
    plain, objective = tc.methods.load(base), tc.methods.load(name)
    for kind, stage in kinds(objective).items():
        if kind not in kinds(plain):
            with pytest.raises(TypeError, match=f"^{kind}: expected one of"):
                tc.mix(base, **{kind: name})
            continue
        each_stage = stage if isinstance(stage, tuple) else (stage,)
        never_supervised = ("before_credit", "needs_bounds", "reads_signs")
        if base == "sft" and any(getattr(x, flag, False) for x in each_stage for flag in never_supervised):
            with pytest.raises(ValueError, match=f"^{kind}: expected .*, got "):
                tc.mix(base, **{kind: name})
            continue
        mixed = tc.mix(base, **{kind: name})
        assert kinds(mixed) == {**kinds(plain), kind: stage}
        assert mixed == dataclasses.replace(plain, **{kind: stage})
        if isinstance(stage, Stage):
            assert tc.mix(base, **{kind: repr(stage)}) == mixed


@pytest.mark.parametrize("seed", range(40))
def test_any_mixture_keeps_the_contract(seed):
    """Stages of different methods together: finite, the sum of its micro-batches, and open about NaN."""
    rng = random.Random(seed)
    stages = ("credit", "filters", "token_weights", "ratio", "clip", "scales", "aggregation")
    chosen = {kind: rng.choice(POLICY_GRADIENT) for kind in stages if rng.random() < 0.6}
    try:
        objective = of_fixed_length(tc.mix(rng.choice(POLICY_GRADIENT), **chosen))
    except ValueError as error:
        assert re.match("clip: expected a stage with bounds because of outside_center", str(error))
        return
    batch, current = carried(objective, seed)
    prepared = prepare(objective, batch)
    out, grad = gradient(objective, batch, current)
    assert out.loss.isfinite() and grad.isfinite().all()
    assert not grad[~prepared.has_gradient].any()
    if all(term.after_filters for term in objective.terms):
        assert not grad[~prepared.mask.view(batch.shape)].any()
    parts = current.clone().requires_grad_()
    added = sum(naive.loss_of(objective, prepared.select(r), parts[r]).loss for r in partition(objective, batch, seed))
    added.backward()
    torch.testing.assert_close(added, out.loss)
    torch.testing.assert_close(parts.grad, grad)
    for t in prepared.mask.nonzero()[:, 0].tolist()[seed % 3 :: 9]:
        dirty = current.clone()
        dirty.view(-1)[t] = math.nan
        out, grad = gradient(objective, batch, dirty)
        assert bool(out.loss.isnan()) == bool(grad.view(-1)[t].isnan())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tc.Objective(tc.ratio.token()), r"Objective: credit: expected a credit stage, got token\("),
        (lambda: tc.clip.growing(-0.1, 0.1), r"clip.growing: low: expected a number at least 0 .*got -0.1"),
        (lambda: tc.clip.soft(0, 0), r"clip.soft: tau_positive: expected a number above 0 .*got 0"),
        (lambda: tc.ratio.sequence(high=-5), r"ratio.sequence: high: expected a number at least 0.* got -5"),
        (
            lambda: tc.mix("match_tir", credit="turns(discount=7)"),
            r"credit: turns: discount: expected .* at most 1, got 7",
        ),
        (
            lambda: tc.mix("hapo", clip="soft"),
            r"clip: expected a stage with bounds because of outside_center.*got soft",
        ),
        (
            lambda: tc.methods.load("sapo", tau_positive=0),
            r"sapo: tau_positive: expected a number above 0 .*got 0",
        ),
    ],
)
def test_combinations_and_settings_that_mean_nothing(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_unknown_names_and_settings_are_errors():
    with pytest.raises(ValueError, match=f"name: expected one of {METHODS[0]}, {METHODS[1]}, "):
        tc.methods.load("ppo2")
    with pytest.raises(TypeError, match="beta: expected one of clip_low"):
        tc.methods.load("tempo", beta=1)
