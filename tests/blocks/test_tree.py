import pytest
import ragged
import reference.tree as reference
import tokcredit as tc
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokcredit import ops
from tokcredit.blocks import tree, values

pytestmark = pytest.mark.usefixtures("device")

EXAMPLE = ([list(b"abcE"), list(b"abdE"), list(b"aefE"), list(b"ghE")], [0] * 4, [1.0, 0.0, 1.0, 0.0])


def per_row(batch, x):
    x = batch.flat(x)
    return [x[b:e].tolist() for b, e in zip(batch.begin.tolist(), batch.end.tolist(), strict=True)]


@given(ragged.grouped(), st.booleans())
def test_nodes_are_sets_of_sharers(data, padded):
    sequences, groups, _ = data
    batch = ragged.batch(*data, padded=padded)
    t = tree.build(batch)
    size = int(t.size)
    node = per_row(batch, batch.shaped(t.node))
    branch = per_row(batch, batch.shaped(t.is_branch))
    seen = {}
    order = []
    for i, s in enumerate(sequences):
        for k in range(len(s)):
            key = (groups[i], frozenset(reference.sharers(sequences, groups, i, k + 1)))
            v = node[i][k]
            assert seen.setdefault(v, key) == key
            assert t.count[v] == len(key[1])
            assert t.depth[v] <= k < t.depth[v] + t.length[v]
            assert branch[i][k] == reference.is_branch(sequences, groups, i, k)
            assert batch.group_index[i] == t.group[v]
            order.append(v)
    assert len(set(seen.values())) == len(seen)
    assert (t.count[size:] == 0).all() and (t.parent[size:] == -1).all()
    assert all(t.parent[v] < v for v in range(size))
    assert size <= sum(2 * groups.count(g) - 1 for g in set(groups))
    offsets, nodes = t.runs
    for i, s in enumerate(sequences):
        path = nodes[offsets[i] : offsets[i + 1]]
        assert int(t.length[path].sum()) == len(s)
        assert path[-1] == t.leaf[i]
    first = list(dict.fromkeys(nodes.tolist()))
    assert first == sorted(first), "numbered by first appearance"


def test_worked_example():
    t = tree.build(ragged.batch(*EXAMPLE))
    assert int(t.size) == 7
    assert t.parent[:7].tolist() == [-1, 0, 1, 2, 2, 1, 0]
    assert t.count[:7].tolist() == [4, 3, 2, 1, 1, 1, 1]
    assert t.depth[:7].tolist() == [0, 0, 1, 2, 2, 1, 0]
    assert t.length[:7].tolist() == [0, 1, 1, 2, 2, 3, 3]
    assert t.degree[:7].tolist() == [2, 2, 2, 1, 1, 1, 1]
    torch.testing.assert_close(values.monte_carlo(t)[:4].tolist(), [0.5, 2 / 3, 0.5, 1.0])


@given(ragged.grouped(), st.booleans())
def test_values(data, padded):
    sequences, groups, rewards = data
    batch = ragged.batch(*data, padded=padded)
    t = tree.build(batch)
    mean = per_row(batch, batch.shaped(t.expand(body=values.monte_carlo(t))))
    change = per_row(batch, batch.shaped(t.expand(head=values.temporal_difference(t, values.monte_carlo(t)))))
    children = per_row(batch, batch.shaped(t.expand(body=values.mean_of_children(t))))
    others = per_row(batch, batch.shaped(values.leave_one_out(t)))
    for i, s in enumerate(sequences):
        for k in range(len(s)):
            after = reference.mean_after(sequences, groups, rewards, i, k + 1)
            before = reference.mean_after(sequences, groups, rewards, i, k)
            assert mean[i][k] == pytest.approx(after)
            assert change[i][k] == pytest.approx(after - before)
            assert children[i][k] == pytest.approx(reference.mean_of_children(sequences, groups, rewards, i, k + 1))
            shared = next(
                n for n in range(k + 1, -1, -1) if n == 0 or len(reference.sharers(sequences, groups, i, n)) > 1
            )
            rest = [rewards[j] for j in reference.sharers(sequences, groups, i, shared) if j != i]
            assert others[i][k] == pytest.approx(sum(rest) / len(rest) if rest else 0.0)


@given(ragged.grouped(), st.integers(0, 9), st.sampled_from([torch.float32, torch.float64]))
def test_values_over_rows_that_count(data, seed, dtype):
    sequences, groups, rewards = data
    counted = torch.rand(len(groups), generator=ragged.generator(seed), device="cpu") < 0.6
    t = tree.build(ragged.batch(*data))
    given = torch.tensor(rewards, dtype=dtype)
    mean = values.monte_carlo(t, given, counted.to(given.device))
    change = values.monte_carlo_change(t, given, counted.to(given.device))
    assert mean.dtype == change.dtype == dtype
    at = per_row(t.batch, t.expand(body=mean.double(), head=None))
    moved = per_row(t.batch, t.expand(head=change))

    def expected(i, k):
        own = [rewards[j] for j in reference.sharers(sequences, groups, i, k) if counted[j]]
        return sum(own) / len(own) if own else 0.0

    for i, s in enumerate(sequences):
        for k in range(len(s)):
            assert at[i][k] == pytest.approx(expected(i, k + 1), rel=1e-6, abs=1e-7)
            assert moved[i][k] == pytest.approx(expected(i, k + 1) - expected(i, k), abs=1e-6)


def test_the_mean_of_equal_rewards_is_exact():
    sequences = [[1, 2, 3], [1, 2, 4], [1, 5], [6]] * 3
    t = tree.build(ragged.batch(sequences, [0] * 12, [0.1] * 12))
    rewards = torch.full((12,), 0.1, dtype=torch.float64)
    size = int(t.size)
    assert values.monte_carlo(t, rewards)[:size].tolist() == [0.1] * size
    assert values.monte_carlo_change(t, rewards).tolist() == [0.0] * 24


@given(ragged.grouped())
def test_changes_cancel_over_children(data):
    t = tree.build(ragged.batch(*data))
    change = values.temporal_difference(t, values.monte_carlo(t)) * t.count
    balance = torch.zeros(t.parent.numel(), dtype=torch.float64)
    inner = t.parent >= 0
    balance.index_add_(0, t.parent[inner], change[inner])
    ends = torch.zeros_like(balance).index_add_(0, t.leaf, t.batch.rewards - values.monte_carlo(t)[t.leaf])
    torch.testing.assert_close(balance + ends, torch.zeros_like(balance))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(1000, 40, 1000), (6, 100_000, 3)])
def test_large(dtype, shape):
    rows, length, group = shape
    generator = ragged.generator(1)
    tokens = torch.randint(0, 50_000, (rows, length), generator=generator, dtype=dtype)
    shared = torch.randint(0, length, (rows,), generator=generator)
    ids = torch.arange(rows) // group
    for r in range(rows):
        tokens[r, : shared[r]] = tokens[int(ids[r]) * group, : shared[r]]
    batch = tc.Rollouts.from_padded(
        tokens, torch.ones(rows, length, dtype=torch.bool), ids, torch.rand(rows, generator=generator)
    )
    t = tree.build(batch)
    node = batch.shaped(t.node)
    for g in range(rows // group):
        block = tokens[g * group : (g + 1) * group]
        # Two rows share a node exactly as far as their tokens agree.
        same = (block == block[0]).int().cumprod(1).bool()
        assert torch.equal(node[g * group : (g + 1) * group] == node[g * group], same)


@pytest.mark.parametrize("rows", [2049, 12_289])  # CUDA puts as many in order in other ways
def test_many_rows_of_interleaved_groups(rows):
    generator = ragged.generator(2)
    tokens = torch.randint(0, 2, (rows, 2), generator=generator)
    ids = torch.randint(0, rows // 16, (rows,), generator=generator)
    mask, rewards = torch.ones(rows, 2, dtype=torch.bool), torch.rand(rows, generator=generator)
    t = tree.build(tc.Rollouts.from_padded(tokens, mask, ids, rewards))
    _, kind, count = torch.unique(4 * ids + 2 * tokens[:, 0] + tokens[:, 1], return_inverse=True, return_counts=True)
    assert torch.equal(t.count[t.leaf], count[kind])


def test_duplicates_prefixes_and_empty_rows():
    sequences = [[1, 2, 3], [1, 2, 3], [1, 2], [], [9]]
    batch = ragged.batch(sequences, [0, 0, 0, 0, 5], [1.0, 0.0, 0.0, 1.0, 1.0])
    t = tree.build(batch)
    assert t.leaf[0] == t.leaf[1]
    assert t.leaf[2] == t.parent[t.leaf[0]]
    assert t.length[t.leaf[3]] == 0 and t.count[t.leaf[3]] == 4
    assert t.is_branch.tolist() == [True, False, True] * 2 + [True, False] + [False]


def test_thread_count_does_not_change_anything(monkeypatch):
    batch = ragged.batch([[i % 3, i % 2, i] for i in range(64)], [i % 5 for i in range(64)], [0.0] * 64)
    monkeypatch.setattr(ops.call, "_threads", 1)
    one = tree.build(batch)
    monkeypatch.setattr(ops.call, "_threads", 7)
    many = tree.build(batch)
    for name in ("leaf", "parent", "depth", "length", "count", "degree"):
        assert torch.equal(getattr(one, name), getattr(many, name))


def test_opcheck():
    b = ragged.batch(*EXAMPLE)
    t = tree.build(b)
    call = (b.tokens, b.begin, b.end, b.group_index, b.num_groups, 1)
    torch.library.opcheck(torch.ops.tokcredit.tree_build.default, call)
    torch.library.opcheck(torch.ops.tokcredit.tree_fold.default, (t.leaf, t.parent, None, b.rewards))
    torch.library.opcheck(torch.ops.tokcredit.tree_mean.default, (t.leaf, t.parent, None, b.rewards, True))
    head = values.monte_carlo(t)
    torch.library.opcheck(
        torch.ops.tokcredit.expand.default,
        (
            *b.spans.arrays,
            b.num_tokens,
            head.dtype,
            b.rewards,
            t.leaf,
            t.parent,
            t.depth,
            head,
            head,
            1,
        ),
    )


def test_compiles_without_graph_breaks():
    batch = ragged.batch(*EXAMPLE)
    assert batch.num_groups == 1  # groups are counted outside of the graph, because that waits for the device

    def credit(rewards):
        t = tree.build(batch)
        return t.expand(head=values.temporal_difference(t, values.monte_carlo(t, rewards)))

    compiled = torch.compile(credit, fullgraph=True, backend="aot_eager")(batch.rewards)
    torch.testing.assert_close(compiled, credit(batch.rewards))


def test_expand_by_hand():
    batch = ragged.batch(*EXAMPLE)
    t = tree.build(batch)
    head = values.temporal_difference(t, values.monte_carlo(t))
    out = t.expand(head=head, row=batch.rewards)
    assert out[:4].tolist() == pytest.approx([1 + 1 / 6, 1 - 1 / 6, 1.5, 1.0])
