import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.methods.spo_tree import edges


def values_of(batch):
    """Value of every row's node and of its parent, and the spread of the parent's children, by recursion."""
    node, parent, r = (x.tolist() for x in (batch.extras["node_ids"], batch.extras["parent_ids"], batch.rewards))
    group = batch.group_index.tolist()

    def children(g, name):
        return [i for i in range(len(node)) if group[i] == g and parent[i] == name]

    def value(i):
        below = children(group[i], node[i])
        return sum(map(value, below)) / len(below) if below else r[i]

    out = []
    for i in range(len(node)):
        known = parent[i] in {node[j] for j in range(len(node)) if group[j] == group[i]}
        names = {node[j] for j in range(len(node)) if group[j] == group[i]}
        siblings = (
            children(group[i], parent[i])
            if known
            else [j for j in range(len(node)) if group[j] == group[i] and parent[j] not in names]
        )
        own = [value(j) for j in siblings]
        mean = sum(own) / len(own)
        out.append((value(i), mean, (sum((x - mean) ** 2 for x in own) / len(own)) ** 0.5))
    return out


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_formula(scale, seed):
    batch, current = naive.random_batch(seed, size=6)
    batch = naive.with_inputs(batch, {"node_ids", "parent_ids"})

    def formula(batch, log_probs):
        losses, old = [], batch.old_log_probs
        for (value, above, std), tokens in zip(values_of(batch), naive.rows_of(batch), strict=True):
            a = (value - above) / (std + 1e-8 if scale else 1.0)
            kept = [t for t in tokens if old[t].exp() < 0.9 and abs(a) > 1e-9]
            losses += [naive.clipped(a, (log_probs[t] - old[t]).exp(), 0.8, 1.2) for t in kept]
        return sum(losses) / len(losses)

    naive.check(tc.methods.spo_tree(scale=scale), batch, current, formula)


# The tree [[1, 0], 1, [0, [1, 1]]]: edges (0) (0,0) (0,1) (1) (2) (2,0) (2,1) (2,1,0) (2,1,1).
NODES = [10, 11, 12, 20, 30, 31, 32, 33, 34]
PARENTS = [-1, 10, 10, -1, -1, 30, 30, 32, 32]
REWARDS = [7.0, 1, 0, 1, 7, 0, 7, 1, 1]  # an inner edge's own reward is not read
CHANGES = [-1 / 6, 0.5, -0.5, 1 / 3, -1 / 6, -0.5, 0.5, 0, 0]


def tree(order, copies=1):
    """The edges in any order, one token each; every copy is a group of its own with the same node ids."""
    order = [i for _ in range(copies) for i in order]
    return tc.Rollouts(
        torch.arange(len(order)),
        torch.arange(len(order) + 1),
        torch.arange(copies).repeat_interleave(len(order) // copies),
        torch.tensor(REWARDS)[order],
        old_log_probs=torch.full((len(order),), -1.0),
        extras={"node_ids": torch.tensor(NODES)[order], "parent_ids": torch.tensor(PARENTS)[order]},
    )


@pytest.mark.parametrize("order", [list(range(9)), [8, 3, 6, 0, 1, 7, 5, 4, 2]])
def test_by_hand(order):
    prepared = tc.methods.spo_tree().prepare(tree(order, copies=2))
    expected = [CHANGES[i] for i in order] * 2
    assert prepared.advantages.tolist() == pytest.approx(expected, abs=1e-6)
    assert prepared.mask.tolist() == [x != 0 for x in expected]


def test_whitening_leaves_dropped_edges_out():
    prepared = tc.methods.spo_tree(whiten=True).prepare(tree(list(range(9))))
    credit = torch.tensor(CHANGES[:7])
    white = (credit - credit.mean()) / credit.std()
    assert prepared.advantages.tolist() == pytest.approx([*white.tolist(), 0, 0], abs=1e-5)
    assert prepared.mask.sum() == 7


def test_what_is_not_a_tree_is_an_error():
    batch = tree(list(range(9)))
    batch.extras["node_ids"][3] = 10
    with pytest.raises(ValueError, match="node_ids: expected each to occur once in its group"):
        tc.methods.spo_tree().prepare(batch)
    batch = tree(list(range(9)))
    batch.extras["parent_ids"][0] = 12
    with pytest.raises(ValueError, match="parent_ids: expected a tree, got a cycle"):
        tc.methods.spo_tree().prepare(batch)


def star(rewards, dtype):
    """Edges from the prompt to leaves with these rewards, of one token each."""
    n = len(rewards)
    return tc.Rollouts(
        torch.arange(n),
        torch.arange(n + 1),
        torch.zeros(n, dtype=torch.long),
        torch.tensor(rewards, dtype=dtype),
        old_log_probs=torch.full((n,), -1.0),
        extras={"node_ids": torch.arange(n), "parent_ids": torch.full((n,), -1)},
    )


def trained(objective, batch):
    return objective.prepare(batch).mask.tolist()


@pytest.mark.parametrize("scale", [False, True])
def test_small_changes_train_and_rounding_does_not(scale):
    objective = tc.methods.spo_tree(scale=scale)
    # The first reward is the mean but for the rounding of float32 or float64.
    for dtype in (torch.float32, torch.float64):
        assert trained(objective, star([0.1, 0.3, 0.0, 0.0], dtype)) == [False, True, True, True]
    # A difference of 1e-10 is far above the rounding of float64.
    assert trained(objective, star([0.5, 0.5 + 1e-10], torch.float64)) == [True, True]
    assert trained(objective, star([0.5, 0.5 + 1e-4], torch.float32)) == [True, True]
    # 0.1 + 0.2 + 0.3 is not 0.6: what is left of the middle edge is rounding.
    assert (0.1 + 0.2 + 0.3) / 3 != 0.2
    assert trained(objective, star([0.1, 0.2, 0.3], torch.float64)) == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_siblings_have_no_advantage(dtype):
    for n in range(1, 40):
        for reward in (0.1, 0.7, -1.1, 1e-20, 1e20):
            batch = star([reward] * n, dtype)
            assert not tc.methods.spo_tree().credit(batch).any()
            assert not tc.methods.spo_tree(scale=True).credit(batch).any()


def test_tiny_rewards_have_their_advantages():
    """The size of a change is compared with the values beside it, not with 1."""
    rewards = [3e-12, 1e-12, 2e-12]
    got = tc.methods.spo_tree().credit(star(rewards, torch.float64))[:, 0]
    assert got.tolist() == pytest.approx([1e-12, -1e-12, 0], abs=1e-24)


def test_defaults():
    assert tc.methods.spo_tree() == tc.Objective(
        credit=edges(scale=False, epsilon=1e-8),
        filters=(tc.filters.nonzero_advantage(), tc.filters.improbable(0.9)),
        ratio=tc.ratio.token(bound=10.0, to="old_log_probs"),
        aggregation=tc.aggregation.token_mean(),
    )
