import random

import pytest
import reference.tree_pack as reference
import tokcredit as tc
import torch
from tokcredit.blocks.tree_pack import pack

EXAMPLE = ([list(b"pq")] * 3, [list(b"abc"), list(b"abde"), list(b"fg")], [[True] * 3, [True] * 4, [True] * 2])


def batch_of(contexts, rows, wanted, groups=None, dtype=torch.int64, padded=False):
    width = max(map(len, contexts), default=0)
    prompts = torch.tensor([[-1] * (width - len(c)) + list(c) for c in contexts], dtype=torch.int64)
    groups = torch.tensor(groups or [0] * len(rows), dtype=torch.int64)
    extras = {"prompt_tokens": prompts.reshape(len(rows), width)}
    if padded:
        length = max(map(len, rows)) + 1
        tokens = torch.tensor([row + [9] * (length - len(row)) for row in rows])
        mask = torch.tensor([m + [False] * (length - len(m)) for m in wanted])
        real = torch.tensor([[t < len(row) for t in range(length)] for row in rows])
        return tc.Rollouts.from_padded(tokens, mask, groups, torch.zeros(len(rows)), real, extras=extras)
    return tc.Rollouts(
        torch.tensor([t for row in rows for t in row], dtype=dtype),
        torch.tensor([0, *map(len, rows)]).cumsum(0),
        groups,
        torch.zeros(len(rows)),
        torch.tensor([want for mask in wanted for want in mask], dtype=torch.bool),
        extras=extras,
    )


def drawn(generator, most_rows=9):
    """Contexts, rows and masks over few tokens, so that rows share, repeat and end inside each other."""
    vocabulary = generator.randint(2, 4)
    count = generator.randint(1, most_rows)

    def text(low, high):
        return [generator.randrange(vocabulary) for _ in range(generator.randint(low, high))]

    contexts = [text(1, 4) for _ in range(generator.randint(1, 2))]
    contexts = [contexts[generator.randrange(len(contexts))] for _ in range(count)]
    rows = [text(0, 6) for _ in range(count)]
    if generator.random() < 0.5:  # a later step sends an earlier one again
        contexts[-1] = contexts[0] + rows[0]
    wanted = [[generator.random() < generator.choice([0.3, 1.0]) for _ in row] for row in rows]
    return contexts, rows, wanted


def shown(plan, part):
    names = ("tokens", "position_ids", "parent", "end", "source", "target")
    spans = plan.batch.selection(part.rows).spans
    index = [x for b, e in zip(spans.begin.tolist(), spans.end.tolist(), strict=True) for x in part.index[b:e].tolist()]
    return {"rows": part.rows.tolist(), **{name: getattr(part, name).tolist() for name in names}, "index": index}


def test_by_hand():
    plan = pack(batch_of(*EXAMPLE))
    a = plan.arrays
    assert bytes(a.tokens.tolist()) == b"pqabdf" and bytes(a.target.tolist()) == b"abcdefg"
    assert plan.position_ids.tolist() == [0, 1, 2, 3, 4, 2] and plan.parent.tolist() == [-1, 0, 1, 2, 3, 1]
    assert plan.end.tolist() == [6, 6, 5, 5, 5, 6]
    assert a.segment_begin.tolist() == [0, 2, 5, 6] and a.segment_parent.tolist() == [-1, 1, 1]
    assert a.source.tolist() == [1, 2, 3, 3, 4, 1, 5] and a.index.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6]
    assert (plan.num_tokens, plan.num_places, plan.num_predictions) == (15, 6, 7)


def test_by_hand_in_two_bins():
    plan = pack(batch_of(*EXAMPLE), budget=5)
    assert [bytes(part.tokens.tolist()) for part in plan] == [b"pqabd", b"pqf"]
    assert [part.rows.tolist() for part in plan] == [[0, 1], [2]]
    assert plan.part(1).source.tolist() == [1, 2] and plan.part(1).index.tolist() == [0, 1]
    assert plan.arrays.row_bin.tolist() == [0, 0, 1]


@pytest.mark.parametrize("seed", range(8))
def test_random_batches(seed):
    generator = random.Random(seed)
    for _ in range(50):
        check_random_batch(generator)


def check_random_batch(generator):
    data = drawn(generator)
    groups = [generator.choice([7, -3]) for _ in data[1]]
    dtype = generator.choice([torch.int32, torch.int64])
    longest = max((len(r[0]) - 1 for r in reference.full_rows(*data) if r), default=1)
    budget = generator.choice([None, longest + generator.randint(0, 6)])
    settings = {"predictions": generator.choice([None, 6]), "bin_cost": generator.randint(0, 3)}
    settings["ranks"] = generator.choice([1, 1, 2, 3])
    if generator.random() < 0.3:
        settings["together"] = torch.tensor([generator.randrange(4) for _ in data[1]])
        budget, settings["predictions"] = None, None
    plan = pack(batch_of(*data, groups, dtype, generator.random() < 0.3), budget, **settings)
    seen = []
    for part in plan:
        chosen = sorted(part.rows.tolist())
        expected = reference.bin_arrays(*data, chosen)
        found = shown(plan, part)
        assert found == expected
        assert budget is None or len(found["tokens"]) <= budget
        assert settings["predictions"] is None or len(found["source"]) <= settings["predictions"]
        seen += chosen
    assert sorted(seen) == [r for r, mask in enumerate(data[2]) if any(mask)]
    assert plan.arrays.segment_begin.tolist() == [*reference.segments(plan.parent.tolist()), plan.num_places]
    assert plan.arrays.segment_parent.tolist() == plan.parent[plan.arrays.segment_begin[:-1]].tolist()


def seeds(count):
    return pytest.mark.parametrize("seed", range(count))


@seeds(60)
def test_the_cut_is_the_best_one(seed):
    generator = random.Random(seed)
    contexts, rows, wanted = drawn(generator, most_rows=7)
    longest = max((len(r[0]) - 1 for r in reference.full_rows(contexts, rows, wanted) if r), default=1)
    budget, bin_cost = longest + generator.randint(0, 8), generator.randint(0, 4)
    plan = pack(batch_of(contexts, rows, wanted), budget, bin_cost=bin_cost)
    order = plan.arrays.row_order.tolist()
    if order:
        found = plan.num_places + bin_cost * plan.num_bins
        assert found == reference.fewest(contexts, rows, wanted, order, budget, bin_cost)


@seeds(20)
def test_rows_together_stay_together(seed):
    generator = random.Random(seed)
    contexts, rows, wanted = drawn(generator)
    ids = [generator.randrange(4) for _ in rows]
    packed = [r for r, mask in enumerate(wanted) if any(mask)]
    units = {i: [r for r in packed if ids[r] == i] for i in ids}
    needed = max((reference.places(contexts, rows, wanted, unit) for unit in units.values() if unit), default=1)
    batch = batch_of(contexts, rows, wanted)
    plan = pack(batch, max(needed, 1), together=torch.tensor(ids), bin_cost=0)
    bins = plan.arrays.row_bin.tolist()
    assert all(len({bins[r] for r in unit}) <= 1 for unit in units.values())
    assert all(part.tokens.numel() <= needed for part in plan)
    if needed > 1:
        with pytest.raises(ValueError, match=rf"budget: .* at least {needed} places, which the rows of together id \d"):
            pack(batch, needed - 1, together=torch.tensor(ids))


@seeds(20)
def test_ranks(seed):
    generator = random.Random(seed)
    data = drawn(generator)
    ranks = generator.randint(2, 4)
    plan = pack(batch_of(*data), ranks=ranks, budget=20)
    parts = [plan.for_rank(rank) for rank in range(ranks)]
    assert len({len(own) for own in parts}) == 1
    found = sorted(r for own in parts for part in own for r in part.rows.tolist())
    assert found == [r for r, mask in enumerate(data[2]) if any(mask)]
    units = len(found)
    empty = [part for own in parts for part in own if not part.rows.size]
    assert plan.num_bins == min(units, plan.num_bins + len(empty))
    for part in empty:
        assert part.tokens.tolist() == [0] and part.end.tolist() == [1] and part.source.numel() == 0
    for round_ in zip(*parts, strict=True):
        sizes = [part.tokens.numel() for part in round_]
        assert sizes == sorted(sizes, reverse=True)


def test_the_largest_bin_of_several_ranks_is_smallest():
    rows = [[i] * n for i, n in enumerate([4, 1, 1, 2, 3, 3])]
    batch = batch_of([[9]] * 6, rows, [[True] * len(row) for row in rows])
    # All but the last token of a row have a place: 3 0 0 1 2 2, and the context has one in each bin.
    assert pack(batch, ranks=2).arrays.bin_places.diff().tolist() == [5, 5]
    assert pack(batch, ranks=3).arrays.bin_places.diff().tolist() == [4, 4, 3]


def test_tags_part_equal_tokens():
    contexts, rows = [[5, 6]] * 3, [[1, 2, 3]] * 3
    batch = batch_of(contexts, rows, [[True] * 3] * 3)
    of_contexts = torch.tensor([[0, 0], [0, 0], [0, 1]])
    of_rows = torch.tensor([0, 0, 0, 0, 0, 4, 0, 0, 0])
    plan = pack(batch, tags=(of_contexts, of_rows))
    # Rows 0 and 1 differ in the tag of their last token, row 2 in that of its context.
    assert plan.arrays.row_shared.tolist() == [0, 4, 1] and plan.arrays.tokens.tolist() == [5, 6, 1, 2, 6, 1, 2]
    assert pack(batch).num_places == 4


def test_the_bits_do_not_depend_on_threads_or_groups():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 3, (40 * 5000,), generator=generator)
    tokens.view(40, 5000)[1::2, :4000] = tokens.view(40, 5000)[::2, :4000]
    edges, prompts = torch.arange(0, 40 * 5000 + 1, 5000), torch.ones(40, 3, dtype=torch.int64)
    threads, plans = tc.num_threads(), []
    try:
        for count, groups in ((1, torch.zeros(40)), (3, torch.arange(40) // 4), (2, torch.arange(40) % 7)):
            tc.set_num_threads(count)
            batch = tc.Rollouts(tokens, edges, groups.long(), torch.zeros(40), extras={"prompt_tokens": prompts})
            plans.append(pack(batch, 20_000).arrays)
    finally:
        tc.set_num_threads(threads)
    assert all(torch.equal(x, vars(plans[0])[name]) for plan in plans[1:] for name, x in vars(plan).items())


def test_nothing_to_pack():
    empty = batch_of([], [], [])
    unwanted = batch_of([[1], [2]], [[3, 4], []], [[False, False], []])
    for batch in (empty, unwanted):
        plan = pack(batch, 5, predictions=2, ranks=2)
        assert (plan.num_bins, plan.num_places, plan.num_predictions) == (0, 0, 0)
        assert not list(plan) and plan.for_rank(1) == []
        assert plan.arrays.index.tolist() == [-1] * batch.num_tokens


def test_first_tokens_without_a_context():
    batch = batch_of([[1], []], [[3, 4], [3, 4]], [[True, True], [False, True]])
    plan = pack(batch)
    assert plan.arrays.tokens.tolist() == [1, 3, 3] and plan.arrays.index.tolist() == [0, 1, -1, 2]
    with pytest.raises(ValueError, match=r"wanted: expected False at the first token .* in row 1"):
        pack(batch, wanted=torch.ones(4, dtype=torch.bool))


WRONG = {
    "budget: expected at least 5 places, which row 1 needs, got 4": {"budget": 4},
    "budget: expected at least 1": {"budget": 0},
    "predictions: expected at least 4 for row 1, got 3": {"predictions": 3},
    "wanted: expected bool": {"wanted": torch.ones(9)},
    r"wanted: .*\[9\], got bool \[3\]": {"wanted": torch.ones(3, dtype=torch.bool)},
    "tags: expected a pair": {"tags": torch.zeros(9)},
    r"tags\[1\]: .*\[9\], got int64 \[8\]": {"tags": (torch.zeros(3, 2).long(), torch.zeros(8).long())},
    r"together: .*\[3\]": {"together": torch.zeros(2).long()},
    "bin_cost: expected at least 0": {"bin_cost": -1},
    "ranks: expected at least 1": {"ranks": 0},
}


@pytest.mark.parametrize("message", WRONG)
def test_malformed_arguments_are_named(message):
    with pytest.raises((TypeError, ValueError), match=message):
        pack(batch_of(*EXAMPLE), **WRONG[message])


def test_no_such_rank():
    with pytest.raises(ValueError, match="rank: expected a number from 0 to 0, got 1"):
        pack(batch_of(*EXAMPLE)).for_rank(1)


def test_gather_and_its_gradient():
    part = pack(batch_of(*EXAMPLE)).part(0)
    x = torch.arange(7.0, dtype=torch.float64, requires_grad=True)
    assert part.to_rows(x).tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6]
    assert torch.autograd.gradcheck(part.to_rows, x)
    with pytest.raises(ValueError, match=r"x: expected \[7\], got float32 \[8\]"):
        part.to_rows(torch.zeros(8))


def test_nan_reaches_the_rows_that_want_it_and_no_others():
    contexts, rows = [[1]] * 2, [[2, 3], [2, 3]]
    part = pack(batch_of(contexts, rows, [[True, True], [False, True]])).part(0)
    x = torch.tensor([float("nan"), 1.0], requires_grad=True)
    out = part.to_rows(x)
    assert out.isnan().tolist() == [True, False, False, False]
    out.backward(torch.tensor([1.0, 2.0, float("nan"), 3.0]))
    assert x.grad.tolist() == [1.0, 5.0]


def test_printed():
    assert str(pack(batch_of(*EXAMPLE, groups=[7, 3, 7]), budget=5)).splitlines() == [
        "3 of 3 rows in 2 bins: 15 tokens, 8 forwarded (1.88 times fewer), 7 predictions of 9 tokens",
        "  bin 0: 2 rows, 5 places, 5 predictions",
        "  bin 1: 1 rows, 3 places, 2 predictions",
        "  group 3: 1 rows, 6 tokens, 6 distinct",
        "  group 7: 2 rows, 9 tokens, 9 distinct",
    ]
    alone, shared = pack(batch_of(*EXAMPLE, groups=[7, 3, 7])).groups()
    assert alone == (3, 1, 6, 6) and shared == (7, 2, 9, 7)


@seeds(20)
def test_distinct_tokens_of_groups(seed):
    generator = random.Random(seed)
    data = drawn(generator)
    ids = [generator.choice([1, 2, 3]) for _ in data[1]]
    full = reference.full_rows(*data)
    for group, rows, tokens, distinct in pack(batch_of(*data, groups=ids)).groups():
        own = [r for r, i in enumerate(ids) if i == group and full[r]]
        assert (rows, tokens) == (len(own), sum(len(full[r][0]) for r in own))
        assert distinct == len(reference.distinct(full, own))
