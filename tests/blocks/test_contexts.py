"""Keys of contexts, and trees over trajectories whose rows begin with contexts of their own."""

import pytest
import tokcredit as tc
import torch
from tokcredit.blocks import tree, values

PROMPT = [60, 61]


def spans(*lengths):
    return tc.Spans.from_cu_seqlens(torch.tensor([0, *lengths]).cumsum(0))


def keys(*contexts, start=None):
    tokens = torch.tensor([t for context in contexts for t in context], dtype=torch.long)
    return tree.context_keys(tokens, spans(*map(len, contexts)), start)


def expected_key(context, key=0):
    """The chain in whole numbers."""
    full = (1 << 64) - 1
    for token in context:
        z = token + 0x9E3779B97F4A7C15 & full
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & full
        z = (z ^ z >> 27) * 0x94D049BB133111EB & full
        key = 0xD6E8FEB86659FD93 * key + (z ^ z >> 31) & full
    return key - (1 << 64) if key >> 63 else key


def test_matches_definition():
    contexts = [[5, 0, -1], [], [2**40], [5, 0, -1, 7], [0], [0, 0]]
    found = keys(*contexts)
    assert found.tolist() == [expected_key(context) for context in contexts]
    assert len(set(found.tolist())) == len(contexts)
    assert keys(*contexts, start=found).tolist() == [expected_key(context * 2) for context in contexts]
    empty = tree.context_keys(torch.empty(0, dtype=torch.long), spans(0, 0), torch.tensor([3, -4]))
    assert empty.tolist() == [3, -4]


def test_gaps_and_narrow_tokens():
    tokens = torch.tensor([9, 1, 2, 9, 9, 3, 9], dtype=torch.int32)
    rows = tc.Spans(torch.tensor([1, 5]), torch.tensor([3, 6]), size=7, mask=torch.zeros(7, dtype=torch.bool))
    assert tree.context_keys(tokens, rows).tolist() == [expected_key([1, 2]), expected_key([3])]


def test_rejects_wrong_arguments():
    with pytest.raises(ValueError, match=r"start: expected int64 \[2\], got int64 \[1\]"):
        keys([1], [2], start=torch.tensor([1]))
    with pytest.raises(TypeError, match=r"start: expected int64 \[1\], got int32 \[1\]"):
        keys([1], start=torch.tensor([1], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"tokens: expected .* \[2\], got int64 \[3\]"):
        tree.context_keys(torch.arange(3), spans(2))
    with pytest.raises(ValueError, match=r"context_keys: expected integer \[1\], got int64 \[2\]"):
        tc.Rollouts(
            torch.arange(1), spans(1), torch.tensor([0]), torch.ones(1), extras={"context_keys": torch.tensor([1, 2])}
        )


def episodes(*rows, rewards, groups=None):
    """A batch of rows: the trajectory, what the policy saw before, and the tokens, negative ones masked."""
    trajectory = torch.tensor([of for of, _, _ in rows], dtype=torch.long)
    tokens = torch.tensor([t for _, _, row in rows for t in row], dtype=torch.long)
    return tc.Rollouts(
        tokens.abs(),
        spans(*(len(row) for _, _, row in rows)),
        torch.zeros_like(trajectory) if groups is None else torch.tensor(groups)[trajectory],
        torch.tensor(rewards, dtype=torch.float64)[trajectory],
        tokens > 0,
        trajectory_ids=trajectory,
        extras={"context_keys": keys(*(context for _, context, _ in rows))},
    )


def advantages(batch):
    return tc.methods.tempo(scale=False).prepare(batch).advantages.tolist()


@pytest.mark.parametrize("first", [[(0, PROMPT, [1, 2, -8, 5])], [(0, PROMPT, [1, 2]), (0, [*PROMPT, 1, 2, 8], [5])]])
@pytest.mark.parametrize(
    "second",
    [[(1, PROMPT, [1, 3, -9, 5])], [(1, PROMPT, [1, 3, -9]), (1, PROMPT, [-1, -3, -9, 5])], [(1, PROMPT, [1])]],
)
def test_tempo_by_hand(first, second):
    """Joined at the root, the second rows of both would have 0.1667 and -0.8333 at their last tokens."""
    if len(second[0][2]) == 1:
        second = [*second, (1, [*PROMPT, 1], [3]), (1, [*PROMPT, 1, 3, 9], [5])]
    batch = episodes(*first, *second, (2, PROMPT, [4]), rewards=[1, 0, 1])
    found = [a for a, chosen in zip(advantages(batch), batch.response_mask.tolist(), strict=True) if chosen]
    assert found == pytest.approx([1 / 6, 5 / 6, 1 / 3, -5 / 6, -7 / 6, -2 / 3, 2 / 3])


def test_a_context_that_is_reached_in_two_ways():
    """The first trajectory thinks (1), answers (2), and goes on without its thought, as the second began."""
    batch = episodes(
        (0, PROMPT, [1, 2]), (0, [*PROMPT, 2], [3]), (1, PROMPT, [2, 4]), (2, PROMPT, [5]), rewards=[1, 0, 0]
    )
    # V of the prompt is 1/3, after 1 it is 1, after 2 it is 1/2.
    expected = [2 / 3 + 2 / 3, 2 / 3, 2 / 3 + 1 / 2, -1 / 3 + 1 / 6, -1 / 3 - 1 / 2, -1 / 3 - 1 / 3]
    assert advantages(batch) == pytest.approx(expected)


def test_a_trajectory_counts_once_at_a_context():
    """Two rows of the first one begin with 1: V is 1/2 after it, and not 2/3."""
    batch = episodes((0, PROMPT, [1]), (0, PROMPT, [-1, 2]), (1, PROMPT, [1, 3]), rewards=[1, 0])
    assert advantages(batch) == pytest.approx([1 / 2, 0, 1, -1 / 2, -1])
    trees = tree.build(batch)
    assert trees.pieces is not None and trees.count[: trees.size].tolist() == [2, 1, 1]


def test_the_same_context_in_two_groups():
    rows = ((0, PROMPT, [1, 2]), (0, [*PROMPT, 1, 2], [3]), (1, PROMPT, [1, 4]))
    one = episodes(
        *rows,
        (2, PROMPT, [1, 2]),
        (2, [*PROMPT, 1, 2], [3]),
        (3, PROMPT, [1, 4]),
        rewards=[1, 0, 0, 5],
        groups=[0, 0, 1, 1],
    )
    other = episodes(*rows, rewards=[0, 5])
    assert advantages(one)[:5] == pytest.approx(advantages(episodes(*rows, rewards=[1, 0])))
    assert advantages(one)[5:] == pytest.approx(advantages(other))


def test_private_keys():
    """Rows after the first that share no context with another row have the advantage of their trajectory."""
    batch = episodes(
        (0, PROMPT, [1]), (0, [*PROMPT, 1, 8], [2]), (1, PROMPT, [1]), (1, [*PROMPT, 1, 8], [3]), rewards=[1, 0]
    )
    assert advantages(batch) == pytest.approx([1 / 2, 1, -1 / 2, -1])
    private = batch.with_inputs(context_keys=torch.tensor([0, 1, 0, 2]))
    assert advantages(private) == pytest.approx([1 / 2, 1 / 2, -1 / 2, -1 / 2])


def test_without_a_second_context_trees_are_those_of_rows():
    rows = [(0, PROMPT, [1, 2]), (1, PROMPT, [1, 3]), (2, PROMPT, [4])]
    batch = episodes(*rows, rewards=[1, 0, 1])
    trees = tree.build(batch)
    assert trees.pieces is None and values.mean_of_children(trees)[0] == 0.75
    assert advantages(batch) == advantages(batch.with_inputs(context_keys=None))


def test_what_needs_whole_rows_says_so():
    batch = episodes((0, PROMPT, [1]), (0, [*PROMPT, 1], [2]), (1, PROMPT, [1, 3]), rewards=[1, 0])
    trees = tree.build(batch)
    for function in (values.mean_of_children, values.leave_one_out):
        with pytest.raises(ValueError, match="tree: expected trees of whole rows, got pieces of rows because of"):
            function(trees)
    with pytest.raises(ValueError, match="tree: expected trees of pieces, got trees of rows"):
        values.monte_carlo_ends(tree.build(episodes((0, PROMPT, [1]), rewards=[1])))
    with pytest.raises(ValueError, match="context_keys: expected for trajectories of several rows, got None"):
        tree.build(batch.with_inputs(context_keys=None))
    with pytest.raises(ValueError, match="context_keys: expected in the batch of the rows, got them for whole"):
        batch.whole.with_inputs(context_keys=torch.tensor([1, 2]))


@pytest.mark.parametrize("rows", [[], [(0, PROMPT, []), (0, PROMPT, [])], [(0, PROMPT, [-1]), (0, [*PROMPT, 1], [])]])
def test_batches_without_decisions(rows):
    batch = episodes(*rows, rewards=[1])
    assert advantages(batch) == [0.0] * batch.num_tokens


def test_paths_and_nodes_of_pieces():
    batch = episodes(
        (0, PROMPT, [1, 2]), (0, [*PROMPT, 1, 2], [3]), (1, PROMPT, [1, 2, 3]), (2, PROMPT, [4]), rewards=[1, 0, 0]
    )
    trees = tree.build(batch)
    node = trees.node.tolist()
    assert node[:3] == node[3:6] and node[0] == node[1] != node[2] and node[6] not in node[:6]
    assert trees.is_branch.tolist() == [True, False, False, True, False, False, True]
    assert trees.group[: trees.size].tolist() == [0] * int(trees.size)
    assert values.monte_carlo(trees)[trees.node].tolist() == pytest.approx([0.5] * 6 + [0])
