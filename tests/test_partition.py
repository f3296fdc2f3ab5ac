"""Micro-batches, mini-batches and losses: what they are, and which operations they may dispatch."""

from collections import Counter

import naive
import numpy as np
import pytest
import tokcredit as tc
import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique",
    "_unique2",
    "unique_dim",
    "sort",
    "argsort",
    "item",
)
PIECES = [[4, 0, 2], [11, 1], [3, 5, 6, 7, 8, 9, 10]]
METHODS = [name for name in naive.OF_GROUPS if name not in ("sft", "tip")]


class Dispatched(TorchDispatchMode):
    """Counts the operations that torch dispatches, views left out."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    def check_waits_for_nothing(self):
        assert not set(WAITING) & set(self.names), self.names


def prepared_of(name, padded=True):
    batch, current = naive.random_batch()
    objective = tc.methods.load(name)
    batch = naive.with_inputs(batch, objective.required_inputs)
    if not padded:
        batch, current = batch.select(list(range(12))), current
        packed = batch.to_packed(current)
        batch = tc.Rollouts(
            batch.to_packed(batch.shaped(batch.tokens)),
            torch.cat([torch.zeros(1, dtype=torch.long), torch.from_numpy(batch.sizes).cumsum(0)]),
            batch.group_ids,
            batch.rewards,
            batch.to_packed(batch.shaped(batch.response_mask)),
            old_log_probs=batch.to_packed(batch.shaped(batch.old_log_probs)),
        )
        current = packed
    return objective, objective.prepare(batch, progress=0.5), current


def piece_of(prepared):
    """Rows that the objective takes as a part."""
    return (prepared.batch.group_index == 0).nonzero()[:, 0].tolist() if prepared.objective.couples_rows else PIECES[0]


def log_probs_of(prepared, current, rows):
    return current[rows] if prepared.batch.shape else prepared.batch.selection(rows).of_tokens(current)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("name", ["grpo", "tempo", "ctpo", "gspo", "ba"])
def test_losses_of_a_partition_add_up(name, padded):
    objective, prepared, current = prepared_of(name, padded)
    x = current.clone().requires_grad_()
    whole = objective.loss(prepared, x)
    whole.loss.backward()
    y = current.clone().requires_grad_()
    parts = [objective.loss(prepared.select(rows), log_probs_of(prepared, y, rows)) for rows in PIECES]
    sum(p.loss for p in parts).backward()
    torch.testing.assert_close(sum(p.loss for p in parts), whole.loss)
    torch.testing.assert_close(y.grad, x.grad)
    assert x.grad.any() and sum(p.metrics["tokens"] for p in parts) == whole.metrics["tokens"]


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_select_minibatch_and_loss_wait_for_nothing(name, padded):
    objective = tc.methods.load(name)
    if not padded and objective.required_inputs - {"old_log_probs"}:
        padded = True
    objective, prepared, current = prepared_of(name, padded)
    prepared.batch.sizes  # noqa: B018  the one thing that the first selection fetches from the device
    piece = piece_of(prepared)
    with Dispatched() as select:
        part = prepared.select(piece)
    select.check_waits_for_nothing()
    own = log_probs_of(prepared, current, piece).clone().requires_grad_()
    further = {name: own.detach() for name in objective.variables[1:]}
    with Dispatched() as loss:
        out = objective.loss(part, own, **further)
        out.loss.backward()
    loss.check_waits_for_nothing()
    with Dispatched() as metrics:
        dict(out.metrics)
    metrics.check_waits_for_nothing()


@pytest.mark.parametrize("over", ["token", "turn", "mean", "max"])
def test_a_scale_over_turns_waits_for_nothing(over):
    batch, current = naive.random_batch()
    objective = tc.Objective(scales=(tc.scale.within("k3", over, high=0.01),))
    prepared = objective.prepare(batch)
    prepared.batch.sizes  # noqa: B018
    with Dispatched() as seen:
        out = objective.loss(prepared.select(PIECES[0]), current[PIECES[0]].clone().requires_grad_())
        out.loss.backward()
    seen.check_waits_for_nothing()


@pytest.mark.parametrize("name", METHODS)
def test_a_minibatch_waits_for_nothing(name):
    objective, prepared, _ = prepared_of(name)
    prepared.batch.sizes  # noqa: B018
    piece = piece_of(prepared)
    with Dispatched() as minibatch:
        part = prepared.minibatch(piece)
    if not objective.aggregation.reads_signs and "groups" not in objective.aggregation.counts:
        minibatch.check_waits_for_nothing()
    assert part.batch.num_rows == len(piece)


def test_how_many_operations_a_selection_dispatches():
    """Bounds, so that the cost of a micro-batch is noticed when it grows. On a GPU each is a launch."""
    limits = {"padded": {"grpo": 26, "ctpo": 26, "tempo": 28}, "packed": {"grpo": 24, "ctpo": 24, "tempo": 25}}
    counted = {}
    for layout, of in limits.items():
        for name in of:
            _, prepared, _ = prepared_of(name, layout == "padded")
            prepared.batch.sizes  # noqa: B018
            with Dispatched() as select:
                prepared.select(PIECES[0])
            counted[layout, name] = sum(select.names.values())
    assert all(counted[layout, name] <= limit for layout, of in limits.items() for name, limit in of.items()), counted


def test_supervised_and_pairs_wait_for_nothing():
    batch, current = naive.random_batch()
    sft = tc.methods.sft()
    prepared = sft.prepare(batch)
    prepared.batch.sizes  # noqa: B018
    with Dispatched() as seen:
        sft.loss(prepared.select(PIECES[1]), current[PIECES[1]].requires_grad_()).loss.backward()
        prepared.minibatch(PIECES[0])
    seen.check_waits_for_nothing()
    tokens, mask = torch.ones(3, 4, dtype=torch.long), torch.ones(3, 4, dtype=torch.bool)
    ref = (torch.rand(3, 4), torch.rand(3, 4))
    pairs = tc.Rollouts.from_pairs(tokens, tokens, mask, mask, ref_log_probs=ref)
    dpo = tc.methods.dpo()
    prepared = dpo.prepare(pairs)
    prepared.batch.sizes  # noqa: B018
    with Dispatched() as seen:
        dpo.loss(prepared.select([0, 1, 4, 5]), torch.rand(4, 4, requires_grad=True)).loss.backward()
        prepared.minibatch([2, 3])
    seen.check_waits_for_nothing()


@pytest.mark.parametrize("name", sorted(set(tc.methods.names()) - set(naive.OF_GROUPS)))
def test_pairs_of_every_method_wait_for_nothing(name):
    objective = tc.methods.load(name)
    batch, current = naive.random_pairs()
    prepared = objective.prepare(naive.with_inputs(batch, objective.required_inputs))
    prepared.batch.sizes  # noqa: B018
    rows = batch.group_index.argsort(stable=True)[2:6].tolist()
    with Dispatched() as seen:
        out = naive.loss_of(objective, prepared.select(rows), current[rows].requires_grad_())
        out.loss.backward()
        dict(out.metrics)
        prepared.minibatch(rows)
    seen.check_waits_for_nothing()


@pytest.mark.parametrize(
    "rows",
    [
        [2, 0],
        (2, 0),
        np.array([2, 0]),
        np.array([2, 0], dtype=np.int32),
        torch.tensor([2, 0]),
        torch.tensor([2, 0]).int(),
    ],
)
def test_rows_may_be_given_in_any_form(rows):
    _objective, prepared, _current = prepared_of("tempo")
    part = prepared.select(rows)
    assert part.batch.rewards.tolist() == prepared.batch.rewards[[2, 0]].tolist()
    assert torch.equal(part.advantages, prepared.advantages[[2, 0]])
    assert torch.equal(part.lengths, prepared.lengths[[2, 0]]) and part.batch.shape == (2, 7)


def test_masks_over_rows():
    _, prepared, _ = prepared_of("tempo")
    mask = torch.arange(12) % 5 == 0
    for rows in (mask, mask.numpy(), mask.tolist()):
        assert torch.equal(prepared.select(rows).advantages, prepared.advantages[mask])
    assert prepared.select([]).batch.num_rows == 0
    assert prepared.select(torch.zeros(12, dtype=torch.bool)).batch.num_rows == 0


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([0, 12], ValueError, "rows: expected numbers from 0 to 11, got 12"),
        ([-1], ValueError, "rows: expected numbers from 0 to 11, got -1"),
        ([0.0, 1.0], TypeError, r"rows: expected integers \[M\] or bool \[12\], got float64"),
        (torch.zeros(12), TypeError, r"rows: expected integers \[M\] or bool \[12\], got float32"),
        ([True] * 11, ValueError, r"rows: expected integers \[M\] or bool \[12\], got bool \[11\]"),
        (torch.zeros(2, 2, dtype=torch.long), ValueError, r"rows: expected .*, got shape \[2, 2\]"),
        (3, ValueError, r"rows: expected .*, got shape \[\]"),
        (["a"], TypeError, "rows: expected integers"),
        (None, TypeError, "rows: expected integers"),
    ],
)
def test_what_is_no_row_is_refused(rows, error, message):
    _, prepared, _ = prepared_of("grpo")
    for call in (prepared.select, prepared.minibatch, prepared.batch.select, prepared.batch.selection):
        with pytest.raises(error, match=message):
            call(rows)


def test_a_part_of_a_part():
    _objective, prepared, _current = prepared_of("ctpo", padded=False)
    twice = prepared.select([5, 3, 0, 7]).select([2, 0])
    once = prepared.select([0, 5])
    assert torch.equal(twice.advantages, once.advantages) and torch.equal(twice.row_weights, once.row_weights)
    assert (
        torch.equal(twice.batch.tokens, once.batch.tokens)
        and twice.batch.group_ids.tolist() == once.batch.group_ids.tolist()
    )
    with pytest.raises(ValueError, match="rows: expected numbers from 0 to 3, got 4"):
        prepared.select([5, 3, 0, 7]).select([4])


def test_a_selection_of_a_packed_batch_by_hand():
    batch = tc.Rollouts(
        torch.arange(6),
        torch.tensor([0, 2, 3, 6]),
        torch.tensor([4, 9, 4]),
        torch.tensor([1.0, 2.0, 3.0]),
        torch.tensor([True, False, True, True, True, False]),
    )
    chosen = batch.selection([2, 0])
    assert chosen.of_tokens(batch.tokens).tolist() == [3, 4, 5, 0, 1] and chosen.of_rows(batch.rewards).tolist() == [
        3,
        1,
    ]
    assert (
        chosen.spans.begin.tolist() == [0, 3]
        and chosen.spans.end.tolist() == [3, 5]
        and chosen.sizes.tolist() == [3, 2]
    )
    part = batch.select([2, 0])
    assert part.lengths.tolist() == [2, 1] and part.num_groups == 1 and part.width == 3
    assert part.response_mask.tolist() == [True, True, False, True, False]


def test_the_order_of_rows_and_repetitions():
    objective, prepared, current = prepared_of("grpo")
    a = objective.loss(prepared.select([3, 4]), current[[3, 4]]).loss
    b = objective.loss(prepared.select([4, 3]), current[[4, 3]]).loss
    twice = objective.loss(prepared.select([3, 4, 3, 4]), current[[3, 4, 3, 4]]).loss
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(twice, 2 * a)
    assert a != 0
