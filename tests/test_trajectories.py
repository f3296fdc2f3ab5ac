"""Trajectories of several rows: nothing depends on how an episode is cut."""

import dataclasses
import itertools
import random

import episodes
import naive
import pytest
import tokcredit as tc
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

MIXED = {
    "weighted_pairs": tc.mix("dpo", token_weights="raised(given(entropies), 0.5)"),
    "turn_mean": tc.mix("grpo", token_weights="turn_mean()"),
    "turn_count": tc.mix("dapo", filters="top_share(0.5, given(entropies))", token_weights="turn_count()"),
    "unbiased_turns": tc.mix("grpo", credit="returns(0.9, turn, others)"),
}
METHODS = [*tc.methods.names(), *MIXED]
EDGES = torch.tensor([0, 2, 4, 6])


def make(**changes):
    arguments = {
        "tokens": torch.arange(6),
        "cu_seqlens": EDGES,
        "group_ids": torch.tensor([3, 3, 8]),
        "rewards": torch.tensor([1.0, 1.0, 2.0]),
        "trajectory_ids": torch.tensor([4, 4, 9]),
    }
    return tc.Rollouts(**arguments | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_ids": torch.tensor([3, 8, 8])}, "group_ids: expected the same in all rows of a trajectory, got 8 in"),
        ({"rewards": torch.tensor([1.0, 0.5, 2.0])}, r"rewards: expected the same in .*, got 0.5 in row 1 beside 1.0"),
        ({"rewards": torch.tensor([[1.0, 2], [2, 1], [0, 0]])}, r"rewards: expected the same .* got \[2.0, 1.0\] in"),
        ({"rewards": torch.tensor([[1.0], [1], [float("nan")]])}, "rewards: expected finite numbers"),
        ({"rewards": torch.ones(3, 0)}, r"rewards: expected \[3\] or \[3, K\] with K at least 1, got float32 \[3, 0\]"),
        ({"rewards": torch.ones(2, 2)}, r"rewards: expected .* \[3, 2\], got float32 \[2, 2\]"),
        ({"trajectory_ids": torch.tensor([4, 4])}, r"trajectory_ids: expected .* \[3\], got int64 \[2\]"),
        ({"token_rewards": torch.ones(5)}, r"token_rewards: expected .* \[6\], got float32 \[5\]"),
        (
            {"token_rewards": torch.full((6,), torch.nan)},
            "token_rewards: expected finite numbers, .* got nan at token 0",
        ),
        (
            {"token_rewards": torch.ones(6), "response_mask": torch.arange(6) < 5},
            "token_rewards: expected finite numbers, and 0 where response_mask is False, got 1.0 at token 5",
        ),
        (
            {"token_rewards": torch.tensor([0.5, 0, 0.5, 0, 2, 0])},
            "rewards: expected outcomes beside token_rewards, got the sums of token_rewards",
        ),
        (
            # A third trajectory without a token that the policy chose has no sum to compare with.
            {
                "trajectory_ids": None,
                "rewards": torch.tensor([0.5, 2.0, 7.0]),
                "response_mask": torch.arange(6) < 4,
                "token_rewards": torch.tensor([0.5, 0, 0, 2, 0, 0]),
            },
            "rewards: expected outcomes beside token_rewards, got the sums of token_rewards",
        ),
        (
            {"extras": {"turn_ids": torch.tensor([0, 1, 0, 1, 0, 0])}},
            "turn_ids: expected ids that do not descend along a trajectory, got 0 after 1",
        ),
        (
            {"extras": {"expert": torch.tensor([True, False, True])}},
            "expert: expected the same in all rows of a trajectory, got False in row 1 beside True",
        ),
        (
            {"extras": {"truncated": torch.tensor([True, False, True])}},
            "truncated: expected the same in all rows of a trajectory, got True in row 0 beside False",
        ),
    ],
)
def test_what_belongs_to_a_trajectory_is_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_inputs_that_are_added_are_checked():
    batch = make()
    for named in ({"expert": torch.tensor([True, False, True])}, {"turn_ids": torch.tensor([0, 1, 0, 1, 0, 0])}):
        with pytest.raises(ValueError, match=f"{next(iter(named))}: expected "):
            batch.with_inputs(**named)
    with pytest.raises(ValueError, match="token_rewards: expected finite"):
        batch.with_inputs(token_rewards=torch.full((6,), torch.inf))


def test_rewards_of_every_shape():
    rewards = torch.tensor([[1.0, 0.5], [1.0, 0.5], [0.0, 2.0]])
    batch = make(rewards=rewards, token_rewards=torch.tensor([0.0, 0.25, 0, 1, 0, 3]))
    assert batch.outcome_rewards.tolist() == [1.5, 1.5, 2.0]
    whole = batch.whole
    assert whole.rewards.tolist() == [2.75, 5.0] and whole.outcome_rewards.tolist() == [1.5, 2.0]
    assert whole.reward_components.tolist() == [[1.0, 0.5], [0.0, 2.0]]
    assert whole.whole is whole and whole.num_rows == 2
    dense = make(rewards=None, token_rewards=torch.tensor([0.0, 0.25, 0, 1, 0, 3]))
    assert dense.rewards.tolist() == [0, 0, 0] and dense.whole.rewards.tolist() == [1.25, 3.0]
    plain = make(trajectory_ids=None)
    assert plain.whole is plain and plain.trajectories is None
    kept = whole.keeping(torch.tensor([False, True]))
    assert kept.rewards.tolist() == [5.0] and kept.outcome_rewards.tolist() == [2.0]
    assert dataclasses.replace(batch, rewards=torch.zeros(3)).whole.rewards.tolist() == [1.25, 3.0]


def test_inputs_of_rows():
    prompts = torch.tensor([[1], [2], [3]])
    batch = make(extras={"truncated": torch.tensor([False, True, False]), "prompt_tokens": prompts})
    assert batch.whole.input("truncated").tolist() == [True, False]
    assert batch.whole.input("prompt_tokens").tolist() == [[1], [3]]


def test_adjacent_rows_are_not_copied():
    batch = make()
    assert batch.whole.tokens is batch.tokens
    apart = make(trajectory_ids=torch.tensor([4, 9, 4]), group_ids=torch.tensor([3, 8, 3]), rewards=torch.ones(3))
    assert apart.whole.tokens.tolist() == [0, 1, 4, 5, 2, 3]


def test_gaps_between_rows_do_not_count():
    spans = tc.Spans(torch.tensor([0, 3, 5]), torch.tensor([2, 4, 6]), size=6)
    batch = make(cu_seqlens=spans)
    assert batch.whole.lengths.tolist() == [3, 1]


@pytest.mark.parametrize("padded", [True, False])
def test_turns(padded):
    """Runs of decisions along the trajectory, over the end of a row and over padding, or the turns that are given."""
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 1, 0], [1, 1, 1]]).bool()
    real = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 1, 0], [1, 1, 1]]).bool()
    ids, groups = torch.tensor([0, 0, 0, 1]), torch.zeros(4, dtype=torch.long)
    names = torch.tensor([[2, 2, 9], [3, 9, 9], [9, 3, 9], [0, 0, 4]])
    for extras, expected in (({}, [0, 0, 0, 1, 0, 0, 0]), ({"turn_ids": names}, [0, 0, 1, 1, 0, 0, 1])):
        tokens = torch.arange(12).view(4, 3)
        batch = tc.Rollouts.from_padded(tokens, mask, groups, torch.zeros(4), real, trajectory_ids=ids, extras=extras)
        if not padded:
            keep = real.reshape(-1)
            batch = tc.Rollouts(
                tokens[real],
                torch.tensor([0, 2, 4, 6, 9]),
                groups,
                torch.zeros(4),
                mask[real],
                trajectory_ids=ids,
                extras={name: x.reshape(-1)[keep] for name, x in extras.items()},
            )
        turns, whole = batch.whole.turns, batch.whole
        numbers = tc.ops.spread(turns.number, turns.spans)[whole.response_mask]
        assert numbers.tolist() == expected
        assert turns.counts.tolist() == [2, 1 + ("turn_ids" in extras)]
        assert whole.tokens[turns.last].tolist() == ([3, 7, 11] if not extras else [1, 7, 10, 11])


def test_turns_follow_the_ids_and_the_mask():
    """A batch that is made of another does not keep turns that no longer are its own."""
    mask = torch.tensor([True, True, False, True, True, True])
    batch = tc.Rollouts(torch.arange(6), torch.tensor([0, 6]), torch.tensor([0]), torch.tensor([1.0]), mask)
    assert batch.turns is batch.turns and batch.turns.first.tolist() == [0, 3]
    assert batch.with_rewards(torch.tensor([0.0])).turns is batch.turns
    named = batch.with_inputs(turn_ids=torch.tensor([0, 1, 1, 1, 2, 2]))
    assert named.turns.first.tolist() == [0, 1, 4]
    assert named.with_inputs(turn_ids=None).turns.first.tolist() == [0, 3]
    assert batch.with_mask(~mask).turns.first.tolist() == [2]
    assert batch.filtered(mask & (torch.arange(6) > 3)).turns.first.tolist() == [0, 3]
    assert batch.keeping(torch.tensor([False])).turns.first.tolist() == []


def test_a_batch_without_decisions_has_no_turns():
    batch = make(response_mask=torch.zeros(6, dtype=torch.bool))
    assert batch.whole.turns.counts.tolist() == [0, 0] and batch.whole.turns.last.tolist() == []


def prepared(objective, batch):
    return objective.prepare(batch, progress=0.5 if objective.is_scheduled else None)


def evaluated(objective, batch, current):
    """Loss, advantages ``[N]`` and gradient ``[N]`` of a batch."""
    ready = prepared(objective, batch)
    variable = current.clone().requires_grad_()
    out = naive.loss_of(objective, ready, variable)
    out.loss.backward()
    return out.loss.detach(), ready.advantages.reshape(-1), variable.grad.reshape(-1), ready


def of_tokens(objective, seed):
    """A batch of one row per trajectory, and log-probs."""
    make = naive.random_pairs if isinstance(objective, tc.Preference) else naive.random_batch
    batch, current = make(seed, length=6)
    turns = torch.arange(6).div(2, rounding_mode="floor").repeat(12)
    batch = dataclasses.replace(batch, tokens=batch.tokens + 3 * of_replies(batch))
    batch = naive.with_inputs(batch.with_inputs(turn_ids=turns), objective.required_inputs)
    return dataclasses.replace(batch, trajectory_ids=torch.arange(12)), current


def of_replies(batch):
    """The length of the run of masked tokens that a token is in.

    With it no prefix of what a tool says is what it says elsewhere, or what the policy chooses. Rows that leave out a
    reply then hide no context of another row.
    """
    runs = (~batch.response_mask).tolist()
    edges = [0, *(t for t in range(1, len(runs)) if runs[t] != runs[t - 1] or t in batch.begin.tolist()), len(runs)]
    return torch.tensor([runs[t] * (b - a) for a, b in itertools.pairwise(edges) for t in range(a, b)])


def in_rows(objective, batch, current, seed):
    """The same trajectories in several rows each; see :mod:`episodes`."""
    compares = any(stage.compares_prefixes for stage in objective.stages())
    cut = episodes.cut_in_context if compares else episodes.cut
    return cut(batch, current, random.Random(seed).randint, padded=seed % 2 == 0, shuffled=seed % 3 == 0)


def load(name):
    """The objective of a method, or of stages that no method has."""
    return MIXED.get(name) or tc.methods.load(name)


def bears(name):
    objective = load(name)
    whole_groups = objective.couples_rows and not isinstance(objective, tc.Preference)
    return not whole_groups and not any(stage.reads_contexts for stage in objective.stages())


@pytest.mark.parametrize("name", list(filter(bears, METHODS)))
@settings(max_examples=4)
@given(seed=st.integers(0, 999))
def test_any_cut_gives_the_same(name, seed):
    objective = load(name)
    batch, current = of_tokens(objective, seed)
    loss, advantages, grad, _ = evaluated(objective, batch, current)
    other, moved, there, here = in_rows(objective, batch, current, seed)
    other_loss, other_advantages, other_grad, ready = evaluated(objective, other, moved)
    torch.testing.assert_close(other_loss, loss, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(other_advantages[there], advantages[here], rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(other_grad[there], grad[here], rtol=1e-10, atol=1e-13)
    rest = torch.ones_like(other.response_mask).index_fill_(0, there, False)
    assert not other_grad[rest].any() and not other_advantages[rest].any()
    needed = tc.ops.spread(ready.has_gradient, other.all_spans)
    assert not other_grad[~needed].any()


@pytest.mark.parametrize("name", [name for name in METHODS if not bears(name)])
def test_methods_that_cannot_bear_it_say_so(name):
    objective = load(name)
    batch = in_rows(objective, *of_tokens(objective, 0), 0)[0]
    with pytest.raises(ValueError, match="trajectory_ids: expected one row in each trajectory because "):
        prepared(objective, batch)


def test_methods_that_compare_prefixes_need_keys_of_contexts():
    objective = load("tempo")
    batch = in_rows(objective, *of_tokens(objective, 0), 0)[0].with_inputs(context_keys=None)
    with pytest.raises(ValueError, match="context_keys: expected for trajectories of several rows because of tempo_"):
        prepared(objective, batch)


@pytest.mark.parametrize("name", list(filter(bears, METHODS)))
def test_micro_batches_of_rows_add_up(name):
    """Rows go anywhere, unless the loss couples the tokens of a trajectory; then they stay together, in any order."""
    objective = load(name)
    batch, current, *_ = in_rows(objective, *of_tokens(objective, 3), 3)
    loss, _, grad, ready = evaluated(objective, batch, current)
    rng = random.Random(3)
    rows = list(range(batch.num_rows))
    parts = [rows[k::5] for k in range(5)]
    pairs = isinstance(objective, tc.Preference)
    if pairs or ready.couples_tokens:
        with pytest.raises(ValueError, match=r"rows: expected all [23] rows of a trajectory because the loss of a "):
            for part in parts:
                ready.select(part)
        together = batch.group_ids.tolist() if pairs else batch.trajectory_ids.tolist()
        parts = [[], *([r for r in rows if together[r] // 3 % 3 == k] for k in range(3))]
    total, found = 0, torch.zeros_like(grad)
    for part in parts:
        rng.shuffle(part)
        chosen = batch.selection(part)
        variable = chosen.of_tokens(current.reshape(-1)).requires_grad_()
        out = naive.loss_of(objective, ready.select(part), ready.select(part).batch.shaped(variable))
        out.loss.backward()
        total += out.loss.detach()
        if chosen.tokens is None:
            found.view(batch.shape)[chosen.rows] += variable.grad.view(chosen.shape)
        else:
            found[chosen.tokens] += variable.grad
    torch.testing.assert_close(total, loss)
    torch.testing.assert_close(found, grad)


def abc(cut, **changes):
    """The example of three episodes a, b and c: turns of 2, 1, 2 tokens, of 1, 2, and of 3; in rows of whole turns."""
    lengths = torch.tensor([0, *cut])
    ends = lengths.cumsum(0).tolist()
    of_token = torch.tensor([0] * 5 + [1] * 3 + [2] * 3)
    trajectory = of_token[torch.tensor(ends[:-1])]
    arguments = {
        "tokens": torch.arange(11),
        "cu_seqlens": torch.tensor(ends),
        "group_ids": torch.zeros_like(trajectory),
        "rewards": torch.tensor([1.0, 0, 1], dtype=torch.float64)[trajectory],
        "trajectory_ids": trajectory,
        "extras": {"turn_ids": torch.tensor([0, 0, 1, 2, 2, 0, 1, 1, 0, 0, 0])},
    }
    return tc.Rollouts(**arguments | changes)


CUTS = pytest.mark.parametrize("cut", [(5, 3, 3), (2, 1, 2, 1, 2, 3), (5, 1, 2, 3), (1, 1, 1, 2, 3, 1, 1, 1)])


@CUTS
def test_statistics_count_each_episode_once(cut):
    """Statistics over rows would give 0.645 and -1.291 for the second cut."""
    batch = abc(cut)

    def advantages(credit):
        return tc.Objective(credit()).prepare(batch).advantages.tolist()

    a = advantages(tc.credit.group_normalized)
    assert a == pytest.approx([0.57734927] * 5 + [-1.15469854] * 3 + [0.57734927] * 3)
    assert advantages(tc.credit.leave_one_out) == pytest.approx([0.5] * 5 + [-1] * 3 + [0.5] * 3)


@CUTS
def test_weights_of_rows_repair_a_mean_over_rows(cut):
    """As docs/agents.md says, for a host whose loss is the mean over rows of the mean over tokens."""
    batch = abc(cut)
    rows, whole = batch.lengths.double(), batch.whole.lengths.double()
    weights = batch.num_rows * rows / (len(whole) * whole[batch.trajectory_ids])
    means = tc.blocks.segment.mean(torch.arange(1.0, 12).double(), batch.spans)
    assert (weights * means).mean().item() == pytest.approx(20 / 3)


@CUTS
def test_denominators_count_each_episode_once(cut):
    """The loss is the aggregation of 1 to 11. Weights of rows would give 5.417 in place of 6.667 for the second cut."""
    batch, losses = abc(cut), torch.arange(1.0, 12)
    found = {}
    for name, stage in (
        ("token_mean", tc.aggregation.token_mean()),
        ("sequence_mean", tc.aggregation.sequence_mean()),
        ("sequence_sum_8", tc.aggregation.sequence_sum(8)),
        ("sequence_sum", tc.aggregation.sequence_sum()),
        ("ba", tc.methods.load("ba").aggregation),
    ):
        ready = tc.Objective(aggregation=stage).prepare(batch)
        weights = ready.row_weights.expand(batch.num_rows, 1)
        found[name] = (tc.ops.spread(weights[:, 0], batch.spans) * losses).sum().item()
    expected = {"token_mean": 6, "sequence_mean": 20 / 3, "sequence_sum_8": 2.75, "sequence_sum": 4.4, "ba": 6.0833333}
    assert found == pytest.approx(expected)


@CUTS
def test_turns_have_equal_weights(cut):
    """The loss is the aggregation of 1 to 11, in turns of 2, 1, 2 tokens, of 1, 2, and of 3."""
    batch, losses, found = abc(cut), torch.arange(1.0, 12), []
    for weight, aggregation in (
        (tc.token_weights.turn_mean(), tc.aggregation.sequence_mean()),
        (tc.token_weights.turn_count(), tc.aggregation.token_mean()),
    ):
        ready = tc.Objective(token_weights=(weight,), aggregation=aggregation).prepare(batch)
        x, rows = ready.multiplier, ready.row_weights.expand(batch.num_rows, 1)[:, 0]
        found.append(tc.ops.spread(rows, batch.spans) * (x if x.dim() == 1 else tc.ops.spread(x[:, 0], batch.spans)))
    assert [(x * losses).sum().item() for x in found] == pytest.approx([6.58333333, 8.27272727])
    assert found[0].sum().item() == pytest.approx(1)
    divisors = 1 / (3 * found[1][[0, 5, 8]])
    assert divisors.sum().item() == pytest.approx(11)


def test_weights_of_turns_count_tokens_that_train():
    """A turn without such tokens is no turn, and a trajectory without them changes nothing."""
    batch = abc((5, 3, 3))
    chosen = torch.tensor([1, 0, 1, 0, 0, 0, 0, 0, 1, 1, 1]).bool()
    some = batch.whole.filtered(chosen)
    weight = tc.token_weights.turn_mean()(some, torch.ones(3, 1, dtype=torch.float64))
    assert weight.tolist() == [1, 0, 1, 0, 0, 0, 0, 0, 1, 1, 1]
    assert tc.token_weights.turn_count()(some, torch.ones(3, 1)).flatten().tolist() == [0.75, 1.5, 1.5]


@pytest.mark.parametrize("edges", [[0, 4], [0, 2, 4], [0, 1, 3, 4], [0, 2, 2, 4]])
def test_ratios_go_on_from_row_to_row(edges):
    """Rows alone would begin again at their first token, with 1.0513 and 1.4191 for the last two."""
    rows = len(edges) - 1
    batch = tc.Rollouts(
        torch.arange(4),
        torch.tensor(edges),
        torch.zeros(rows, dtype=torch.long),
        torch.ones(rows, dtype=torch.float64),
        old_log_probs=torch.zeros(4, dtype=torch.float64),
        trajectory_ids=torch.zeros(rows, dtype=torch.long),
    )
    d = torch.tensor([0.1, -0.2, 0.05, 0.3], dtype=torch.float64)
    for ratio, expected in (
        (tc.ratio.cumulative(), [1.10517092, 0.90483742, 0.95122942, 1.28402542]),
        (tc.ratio.sequence(), [1.06449446] * 4),
    ):
        objective = tc.Objective(
            tc.credit.constant(1.0), ratio=ratio, clip=tc.clip.unclipped(), aggregation=tc.aggregation.token_sum()
        )
        current = d.clone().requires_grad_()
        objective.loss(objective.prepare(batch), current).loss.backward()
        assert (-current.grad).tolist() == pytest.approx(expected)
    engine = batch.with_inputs(rollout_log_probs=-torch.tensor([1.3, 1.4, 0.9, 1.2], dtype=torch.float64).log())
    weighted = tc.Objective(token_weights=(tc.token_weights.importance("sum"),)).prepare(engine)
    assert weighted.multiplier[:, 0].tolist() == pytest.approx([1.9656] * rows)
    bounds = tc.Objective(clip=tc.clip.growing(0.1, 0.1, 1.0)).prepare(batch).by_token().window.high
    assert bounds.tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_a_row_that_the_loss_couples_is_selected_once():
    ready = tc.methods.gspo().prepare(abc((2, 1, 2, 1, 2, 3), old_log_probs=torch.zeros(11)))
    with pytest.raises(ValueError, match="rows: expected each row of a trajectory once, got one twice"):
        ready.select([5, 5])
    assert ready.select([4, 3]).joined.batch.tokens.tolist() == [5, 6, 7]  # the order along the trajectory


def test_denominators_of_other_ranks_count_trajectories():
    batch = abc((2, 1, 2, 1, 2, 3))
    ready = tc.Objective().prepare(batch, batch_num_tokens=22, global_batch_size=6, dp_size=2)
    assert ready.row_weights[:, 0].tolist() == pytest.approx([2 / 30] * 3 + [2 / 18] * 3)
    own = ready.minibatch([0, 1, 2, 5])
    assert own.row_weights[:, 0].tolist() == pytest.approx([1 / 10] * 3 + [1 / 6])
    assert own.lengths.tolist() == [2, 1, 2, 3]


@pytest.mark.parametrize("name", ["grpo", "ctpo", "gspo", "sft", "growing", "dpo"])
@pytest.mark.parametrize("seed", [2, 3])
def test_from_hidden_states(name, seed):
    """Rows that are cut into tiles, and rows that the loss joins, give what the loss of log-probs gives."""
    objective = tc.mix("grpo", clip="growing(0.05, 0.1)") if name == "growing" else load(name)
    batch, current, *_ = in_rows(objective, *of_tokens(objective, seed), seed)
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*current.shape, 4, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 4, generator=g, dtype=torch.float64)
    ready = prepared(objective, batch)
    out = objective.loss_from_hidden(ready, hidden, weight)
    out.loss.backward()
    again = hidden.detach().clone().requires_grad_()
    chosen = (again @ weight.T).log_softmax(-1).gather(-1, batch.shaped(batch.tokens)[..., None])[..., 0]
    expected = objective.loss(ready, chosen)
    expected.loss.backward()
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(hidden.grad, again.grad)
    assert again.grad.abs().sum() > 0
