import math
from dataclasses import replace

import pytest
import ragged
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokcredit import Rollouts, Spans
from tokcredit.blocks import segment

TOKENS = torch.arange(6)
EDGES = torch.tensor([0, 2, 2, 6])
GROUPS = torch.tensor([3, 3, 8])
REWARDS = torch.tensor([1.0, 0.0, 2.0])


def make(**changes):
    arguments = {"tokens": TOKENS, "cu_seqlens": EDGES, "group_ids": GROUPS, "rewards": REWARDS} | changes
    return Rollouts(**arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tokens": TOKENS.float()}, TypeError, r"tokens: expected int32 or int64 \[6\], got float32 \[6\]"),
        ({"tokens": [1, 2]}, TypeError, "tokens: expected torch.Tensor, got list"),
        ({"tokens": TOKENS.view(2, 3)}, ValueError, r"tokens: expected .* \[6\], got int64 \[2, 3\]"),
        (
            {"cu_seqlens": torch.tensor([0, 4, 2, 6])},
            ValueError,
            r"cu_seqlens: expected ascending offsets from 0, got \[0, 4, 2, 6\]",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 2, 2, 5])},
            ValueError,
            "cu_seqlens: expected offsets from 0 to 6, the number of tokens, got 5",
        ),
        (
            {"cu_seqlens": torch.tensor([[0, 2], [2, 6]])},
            ValueError,
            r"cu_seqlens: expected int64 \[R \+ 1\], got int64 \[2, 2\]",
        ),
        ({"cu_seqlens": [0, 2, 2, 6]}, ValueError, r"cu_seqlens: expected int64 \[R \+ 1\], got list"),
        ({"cu_seqlens": EDGES.float()}, TypeError, "cu_seqlens: expected int32 or int64"),
        ({"group_ids": GROUPS[:2]}, ValueError, r"group_ids: expected .* \[3\], got int64 \[2\]"),
        ({"rewards": REWARDS / 0 * 0}, ValueError, "rewards: expected finite numbers, got"),
        ({"rewards": REWARDS.long()}, TypeError, "rewards: expected float32"),
        (
            {"response_mask": torch.ones(5, dtype=torch.bool)},
            ValueError,
            r"response_mask: expected bool \[6\], got bool \[5\]",
        ),
        ({"response_mask": torch.ones(6)}, TypeError, "response_mask: expected bool"),
        (
            {"old_log_probs": torch.zeros(6, device="meta")},
            ValueError,
            "old_log_probs: expected a tensor on cpu, got one on meta",
        ),
        ({"entropies": torch.zeros(7)}, ValueError, r"entropies: expected .* \[6\], got float32 \[7\]"),
    ],
)
def test_bad_input_names_the_argument(changes, error, message):
    with pytest.raises(error, match=message):
        make(**changes)


def test_padded_and_packed_describe_the_same_rows():
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    attention = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    padded = Rollouts.from_padded(torch.arange(12).view(3, 4), mask, GROUPS, REWARDS, attention)
    assert (padded.end - padded.begin).tolist() == [3, 0, 4]
    assert padded.lengths.tolist() == [2, 0, 4]
    assert padded.group_index.tolist() == [0, 0, 1] and padded.num_groups == 2
    assert padded.tokens.data_ptr() == padded.shaped(padded.tokens).data_ptr()
    assert make().to_padded(TOKENS).tolist() == [[0, 1, 0, 0], [0, 0, 0, 0], [2, 3, 4, 5]]


def test_padded_input_is_checked():
    tokens, mask = torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3)
    arguments = (torch.tensor([0, 1]), torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match="attention_mask: expected real tokens first"):
        Rollouts.from_padded(tokens, mask, *arguments, torch.tensor([[0, 1, 1], [1, 1, 1]]))
    with pytest.raises(ValueError, match="response_mask: expected False on padding"):
        Rollouts.from_padded(tokens, mask, *arguments, torch.tensor([[1, 1, 0], [1, 1, 1]]))
    with pytest.raises(ValueError, match=r"response_mask: expected bool \[2, 3\]"):
        Rollouts.from_padded(tokens, mask[:1], *arguments)
    with pytest.raises(ValueError, match=r"old_log_probs: expected float \[2, 3\]"):
        Rollouts.from_padded(tokens, mask, *arguments, old_log_probs=torch.zeros(2))
    with pytest.raises(TypeError, match="logprobs: expected one of old_log_probs"):
        Rollouts.from_padded(tokens, mask, *arguments, logprobs=torch.zeros(2, 3))


@given(ragged.grouped(), st.booleans(), st.data())
def test_select_keeps_rows(data, padded, draw):
    sequences, groups, rewards = data
    rows = draw.draw(st.lists(st.integers(0, len(sequences) - 1), max_size=6))
    batch = ragged.batch(*data, padded=padded)
    part = batch.select(torch.tensor(rows, dtype=torch.long))
    for k, r in enumerate(rows):
        assert part.tokens[part.begin[k] : part.end[k]].tolist() == sequences[r]
        assert part.rewards[k] == rewards[r] and part.group_ids[k] == groups[r]


@given(ragged.grouped(), st.booleans(), st.data())
def test_keeping_leaves_rows_where_they_are(data, padded, draw):
    """The buffers are those of the whole batch; everything else agrees with the copy that ``select`` makes."""
    sequences, *_ = data
    whole = ragged.batch(*data, padded=padded)
    taken = torch.tensor(draw.draw(st.lists(st.booleans(), min_size=len(sequences), max_size=len(sequences)))).bool()
    whole = whole.with_inputs(truncated=~taken, length_values=whole.shaped(torch.rand(whole.num_tokens)))
    part, copy = whole.keeping(taken), whole.select(taken)
    rows = taken.nonzero()[:, 0].tolist()
    assert part.tokens.data_ptr() == whole.tokens.data_ptr()
    for name in ("rewards", "group_ids", "group_index", "num_groups", "lengths"):
        assert torch.equal(torch.as_tensor(getattr(part, name)), torch.as_tensor(getattr(copy, name)))
    assert part.extras["truncated"].tolist() == copy.extras["truncated"].tolist()
    assert part.extras["length_values"] is whole.extras["length_values"]

    def packed(b, name):
        return b.to_packed(b.shaped(getattr(b, name))).tolist()

    for name in ("tokens", "response_mask"):
        assert packed(part, name) == packed(part.select(torch.arange(len(rows))), name) == packed(copy, name)
    alone = [t for r in range(len(sequences)) for t in [r in rows] * len(sequences[r])]
    assert packed(replace(whole, response_mask=part.response_mask), "response_mask") == alone


def test_keeping_takes_a_mask():
    with pytest.raises(TypeError, match=r"rows: expected bool \[3\], got int64 \[2\]"):
        make().keeping(torch.tensor([2, 0]))


def test_select_rejects_what_is_not_a_row():
    with pytest.raises(ValueError, match="rows: expected numbers from 0 to 2, got 3"):
        make().select(torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"rows: expected integers \[M\] or bool \[3\], got bool \[1\]"):
        make().select(torch.tensor([True]))


@pytest.mark.parametrize("width", [1, 7, 8, 16, 33])
@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
def test_rows_end_after_their_last_true(width, density):
    """Whatever the width, and where the mask begins in its storage."""
    torch.manual_seed(0)
    for offset in (0, 3, 8):
        mask = (torch.rand(offset + 5 * width) < density)[offset:].view(5, width)
        for m in (mask, mask.t().contiguous().t()):
            batch = Rollouts.from_padded(torch.zeros(5, width, dtype=torch.long), m, torch.arange(5), torch.zeros(5))
            lengths = [max((t + 1 for t in range(width) if row[t]), default=0) for row in m.tolist()]
            assert (batch.end - batch.begin).tolist() == lengths


def test_rewards_are_finite_and_never_whole_numbers_by_accident():
    for wrong in (math.inf, -math.inf, math.nan):
        with pytest.raises(ValueError, match=r"rewards: expected finite numbers, got \[(inf|-inf|nan)\]"):
            make(rewards=torch.tensor([1.0, wrong, 0.0]))
    with pytest.raises(TypeError, match=r"rewards: expected .*, got int64 \[3\]; convert with rewards\.float\(\)"):
        make(rewards=torch.tensor([1, 0, 1]))
    assert make(rewards=REWARDS.half()).rewards.dtype == torch.float32
    assert make(rewards=REWARDS.double()).rewards.dtype == torch.float64


def test_ids_may_be_any_integers_in_any_order():
    for ids in ([2**62, -(2**62), 2**62], [0, 0, 0], [5, 4, 3]):
        batch = make(group_ids=torch.tensor(ids))
        names = sorted(set(ids))
        assert batch.group_index.tolist() == [names.index(x) for x in ids] and batch.num_groups == len(names)
    small = make(group_ids=torch.tensor([1, 0, 1], dtype=torch.uint8))
    assert small.group_index.tolist() == [1, 0, 1]
    with pytest.raises(TypeError, match="group_ids: expected"):
        make(group_ids=torch.tensor([1.0, 0.0, 1.0]))


def test_rows_with_gaps_between_them():
    spans = Spans(torch.tensor([0, 3, 4]), torch.tensor([2, 3, 6]), 6)
    batch = make(cu_seqlens=spans)
    assert batch.lengths.tolist() == [2, 0, 2] and batch.width == 2
    assert batch.to_packed(TOKENS).tolist() == [0, 1, 4, 5]
    assert batch.to_padded(TOKENS).tolist() == [[0, 1], [0, 0], [4, 5]]
    assert batch.select([2, 0]).tokens.tolist() == [4, 5, 0, 1]
    with pytest.raises(ValueError, match="cu_seqlens: expected offsets from 0 to 6, the number of tokens, got 7"):
        make(cu_seqlens=Spans(torch.tensor([0]), torch.tensor([2]), 7), group_ids=GROUPS[:1], rewards=REWARDS[:1])


def test_another_mask():
    batch = make(old_log_probs=torch.zeros(6))
    assert batch.groups.count == batch.num_groups == 2  # sorted now, and not again for the other mask
    mask = torch.tensor([True, False, True, True, False, True])
    other = batch.with_mask(mask)
    assert other.lengths.tolist() == [1, 0, 3] and other.spans.mask is mask and batch.lengths.tolist() == [2, 0, 4]
    assert other.old_log_probs is batch.old_log_probs and other.groups is batch.groups
    assert other.all_spans.mask is None
    assert segment.count(batch.nonempty_groups).tolist() == [1, 1]
    nothing = batch.with_mask(torch.zeros(6, dtype=torch.bool))
    assert segment.count(nothing.nonempty_groups).tolist() == [0, 0]
    with pytest.raises(TypeError, match="mask: expected bool"):
        batch.with_mask(torch.ones(6))


def test_layouts():
    batch = make()
    assert batch.flat(TOKENS) is not None and batch.shaped(TOKENS) is TOKENS
    with pytest.raises(ValueError, match=r"log_probs: expected \[6\], got \[2, 3\]"):
        batch.flat(TOKENS.view(2, 3), "log_probs")
    with pytest.raises(TypeError, match=r"log_probs: expected torch\.Tensor \[6\], got list"):
        batch.flat([1, 2], "log_probs")
    padded = Rollouts.from_padded(torch.arange(6).view(2, 3), torch.ones(2, 3), GROUPS[:2], REWARDS[:2])
    assert padded.flat(torch.arange(6).view(2, 3)).tolist() == list(range(6))
    with pytest.raises(ValueError, match=r"x: expected \[2, 3\], got \[6\]"):
        padded.flat(torch.arange(6))


def test_inputs_of_a_padded_batch_in_either_layout():
    padded = Rollouts.from_padded(torch.arange(6).view(2, 3), torch.ones(2, 3), GROUPS[:2], REWARDS[:2])
    x = torch.arange(6.0)
    for given_as in (x, x.view(2, 3)):
        batch = padded.with_inputs(old_log_probs=given_as, state_values=given_as, entropies=given_as)
        for name in ("old_log_probs", "state_values", "entropies"):
            assert torch.equal(batch.input(name), x)
            assert batch.select([1]).input(name).tolist() == [3, 4, 5]
    with pytest.raises(ValueError, match=r"old_log_probs: expected .* \[6\], got float32 \[3, 2\]"):
        padded.with_inputs(old_log_probs=x.view(3, 2))
