import dataclasses
import math

import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.methods.ba import balanced
from tokcredit.methods.pods import most_varied
from tokcredit.methods.tempo import tempo_credit
from tokcredit.stages import within as predicate

ENTROPIES = tc.token_score.given("entropies")


def batch_of(entropies, lengths):
    return tc.Rollouts(
        torch.arange(sum(lengths)),
        torch.tensor([0, *lengths]).cumsum(0),
        torch.zeros(len(lengths), dtype=torch.long),
        torch.zeros(len(lengths)),
        entropies=torch.tensor(entropies),
    )


def test_mixed_groups_are_those_whose_rewards_differ():
    batch = tc.Rollouts(
        torch.arange(6), torch.arange(7), torch.tensor([3, 1, 3, 1, 2, 1]), torch.tensor([1.0, 0, 1, 0, 5, 0.5])
    )
    assert tc.filters.mixed_groups()(batch, None)[:, 0].tolist() == [False, True, False, True, False, True]
    # A row without a token that the policy chose does not make its group mixed.
    mask = torch.tensor([True, True, True, True, True, False])
    assert not tc.filters.mixed_groups()(batch.with_mask(mask), None).any()


@pytest.mark.parametrize("credit", [tc.credit.group_normalized(), tempo_credit()])
def test_rows_that_a_filter_rejects_are_as_if_they_were_not_there(credit):
    """With credit per row and per token, the result is that of the batch without these rows."""
    batch, current = naive.random_batch(size=6)
    objective = tc.Objective(credit, aggregation=balanced(), filters=(most_varied(3),))
    kept = objective.filters[0](batch, None)[:, 0]
    assert 0 < kept.sum() < batch.num_rows
    alone = dataclasses.replace(objective, filters=())
    grads = []
    for o, b, x in ((objective, batch, current), (alone, batch.select(kept), current[kept])):
        log_probs = x.clone().requires_grad_()
        o.loss(o.prepare(b), log_probs).loss.backward()
        grads.append(log_probs.grad)
    torch.testing.assert_close(grads[0][kept], grads[1])
    assert not grads[0][~kept].any() and grads[1].any()


def test_a_filter_that_keeps_nothing_trains_nothing():
    batch, current = naive.random_batch()
    batch = dataclasses.replace(batch, rewards=torch.ones(12))
    objective = dataclasses.replace(tc.methods.tempo(), filters=(tc.filters.mixed_groups(),))
    prepared = objective.prepare(batch)
    assert not prepared.mask.any() and objective.loss(prepared, current).loss == 0
    with pytest.raises(ValueError, match="count: expected a whole number at least 1, got 0"):
        most_varied(0)


def test_nonzero_advantage():
    batch = batch_of([0.0] * 6, [2, 2, 2])
    chosen = tc.filters.nonzero_advantage()(batch, torch.tensor([[0.0], [-1e-30], [2.0]]))
    assert chosen[:, 0].tolist() == [False, True, True]
    per_token = torch.tensor([0.0, 0.0, 0.0, -1.0, math.nan, 0.0])
    assert tc.filters.nonzero_advantage()(batch, per_token)[:, 0].tolist() == [False, True, True]


def test_improbable():
    old = torch.tensor([0.95, 0.9, 0.89, 0.1, 0.0]).log()
    batch = batch_of([0.0] * 5, [5]).with_inputs(old_log_probs=old)
    assert tc.filters.improbable(0.9)(batch, None).tolist() == [False, bool(old[1] < math.log(0.9)), True, True, True]
    assert not tc.filters.improbable(0.0)(batch, None).any()
    assert tc.filters.improbable().required_inputs == {"old_log_probs"}


@pytest.mark.parametrize(
    ("share", "per_row", "round_up", "expected"),
    [
        (0.5, False, True, [0, 1, 0, 1, 1]),  # 2.5 becomes 3
        (0.5, False, False, [0, 1, 0, 1, 0]),
        (0.5, True, True, [0, 1, 1, 1, 0]),  # 1.5 of the first three
        (0.5, True, False, [0, 1, 0, 1, 0]),
        (0.01, True, False, [0, 1, 0, 1, 0]),  # at least one
        (1.0, False, True, [1, 1, 1, 1, 1]),
    ],
)
def test_top_share(share, per_row, round_up, expected):
    batch = batch_of([0.1, 0.9, 0.2, 0.8, 0.3], [3, 2])
    chosen = tc.filters.top_share(share, ENTROPIES, per_row=per_row, round_up=round_up)(batch, torch.ones(2, 1))
    assert chosen.int().tolist() == expected


@pytest.mark.parametrize("tenths", range(1, 11))
def test_a_share_of_ten_tokens_is_that_many(tenths):
    batch = batch_of([0.5] * 10, [10])
    for round_up in (True, False):
        chosen = tc.filters.top_share(tenths / 10, ENTROPIES, round_up=round_up)(batch, torch.ones(1, 1))
        assert chosen.sum() == tenths


def test_top_share_times_the_advantage():
    batch = batch_of([0.5, 0.9, 0.5, 0.6], [2, 2])
    for advantages in (torch.tensor([[0.1], [-2.0]]), torch.tensor([0.1, 0.1, -2.0, -2.0])):
        chosen = tc.filters.top_share(0.5, ENTROPIES, times_advantage=True)(batch, advantages)
        assert chosen.tolist() == [False, False, True, True]


@pytest.mark.parametrize("share", [0.0, 1.1, -1.0, math.nan])
def test_wrong_shares_are_errors(share):
    with pytest.raises(
        ValueError, match=r"top_share: share: expected a number above 0 and at most 1 \(or a schedule\), got"
    ):
        tc.filters.top_share(share, ENTROPIES)


def test_later_filters_do_not_see_what_earlier_ones_rejected():
    batch = batch_of([0.9, 0.1, 0.5, 0.4], [2, 2])
    batch = dataclasses.replace(batch, old_log_probs=torch.tensor([0.95, 0.1, 0.1, 0.1]).log())
    filters = (tc.filters.improbable(0.9), tc.filters.top_share(0.3, ENTROPIES))
    objective = tc.Objective(tc.credit.constant(), filters=filters)
    assert objective.prepare(batch).mask.tolist() == [False, False, True, False]
    back = dataclasses.replace(objective, filters=filters[::-1])
    assert back.prepare(batch).mask.tolist() == [False, False, True, False]
    one = dataclasses.replace(objective, filters=(tc.filters.top_share(0.25, ENTROPIES), filters[0]))
    assert not one.prepare(batch).mask.any()


def test_kept_tokens_have_the_ratio_of_their_whole_row():
    """A token that does not train is still part of the sequence whose probability changed."""
    batch, current = naive.random_batch()
    objective = tc.Objective(
        ratio=tc.ratio.sequence(),
        filters=(tc.filters.improbable(0.6),),
        clip=tc.clip.unclipped(),
        aggregation=tc.aggregation.token_mean(),
    )

    def formula(batch, log_probs):
        losses, old = [], batch.old_log_probs
        for a, tokens in zip(naive.group_advantages(batch), naive.rows_of(batch), strict=True):
            mean = sum((log_probs[t] - old[t]).item() for t in tokens) / max(len(tokens), 1)
            kept = [t for t in tokens if old[t].exp() < 0.6]
            losses += [-a * (mean + log_probs[t] - log_probs[t].detach()).exp() for t in kept]
        return sum(losses) / len(losses)

    naive.check(objective, batch, current, formula)


def test_marked_rows_and_tokens():
    batch, _ = naive.random_batch()
    batch = naive.with_inputs(batch, {"expert", "planning_tokens"})
    rows = tc.filters.marked("expert")(batch, None)
    assert rows.shape == (12, 1) and torch.equal(rows[:, 0], batch.input("expert"))
    assert torch.equal(tc.filters.marked("expert", inverted=True)(batch, None), ~rows)
    tokens = tc.filters.marked("planning_tokens")(batch, None)
    assert torch.equal(tokens, batch.input("planning_tokens"))
    assert tc.filters.marked("expert").required_inputs == {"expert"}
    with pytest.raises(ValueError, match="marked: name: input: expected a registered name"):
        tc.filters.marked("experts")
    with pytest.raises(TypeError, match="marked: name: expected a bool input, got old_log_probs, a float"):
        tc.filters.marked("old_log_probs")(batch, None)


def test_rejection_of_verl():
    within = tc.filters.within
    assert tc.filters.from_verl({}) == ()
    config = {"rollout_rs": "seq_mean_k1, token_k3", "rollout_rs_threshold": "0.8_1.6, 0.1"}
    # verl looks at the engine's probability over the trainer's.
    assert tc.filters.from_verl(config) == (within("ratio", "mean", 1 / 1.6, 1 / 0.8), within("k3", "token", high=0.1))
    (one,) = tc.filters.from_verl({"rollout_rs": "token_k1", "rollout_rs_threshold": 1.25})
    assert (one.low, one.high) == pytest.approx((0.8, 1.25))
    for wrong, message in (
        ({"rollout_rs": "seq_max_k1", "rollout_rs_threshold": 1.0}, "rollout_rs: expected .* got 'seq_max_k1'"),
        ({"rollout_rs": "mean_k1", "rollout_rs_threshold": 1.0}, "rollout_rs: expected .* got 'mean_k1'"),
        ({"rollout_rs": "seq_token_k1", "rollout_rs_threshold": 1.0}, "rollout_rs: expected .* got 'seq_token_k1'"),
        ({"rollout_rs": "token_k2"}, "rollout_rs_threshold: expected one threshold"),
        ({"rollout_rs": "token_k2", "rollout_rs_threshold": "1, 2"}, "rollout_rs_threshold: expected one threshold"),
        ({"rollout_rs": "token_k2", "rollout_rs_threshold": "1_2"}, "rollout_rs_threshold: expected one number"),
        ({"rollout_rs": "token_k2", "rollout_rs_threshold": "x"}, "threshold: expected .*, got 'x'"),
        ({"rollout_rs": "token_k2", "rollout_rs_threshold": 1, "bypass_mode": True}, "bypass_mode: expected False"),
    ):
        with pytest.raises(ValueError, match=message):
            tc.filters.from_verl(wrong)


def test_statistics_by_hand():
    """Sums, means and extremes of the two rows, and what verl's bounds keep, which hold for the inverse ratio."""
    batch, _ = naive.two_rows()
    rows = {
        ("k1", "sum"): (0.300105, 1.440362),
        ("k1", "mean"): (0.075026, 0.480121),
        ("k2", "mean"): (0.011767, 0.320789),
        ("k2", "max"): (0.024897, 0.960906),
        ("k3", "mean"): (0.011137, 0.212577),
        ("k3", "max"): (0.023144, 0.636294),
        ("k3", "sum"): (0.044549, 0.637730),
        ("ratio", "mean"): (0.927719, 0.618709),
        ("ratio", "sum"): (0.740741, 0.236842),
        ("ratio", "min"): (0.8, 0.25),
        ("ratio", "max"): (1.111111, 1.0),
    }
    y = batch.old_log_probs - batch.rollout_log_probs
    for (statistic, over), expected in rows.items():
        found = predicate.measured(y, batch.spans, statistic, over)[:, 0].tolist()
        assert found == pytest.approx(expected, abs=1e-6), (statistic, over)
    one = torch.ones(2, 1)
    config = {"rollout_rs": "seq_mean_k1", "rollout_rs_threshold": "0.6_1.05"}
    (of_verl,) = tc.filters.from_verl(config)
    assert not of_verl(batch, one).any(), "0.075026 > log(1.05)"
    assert tc.filters.within("ratio", "mean", 0.6, 1.05)(batch, one).all(), "the direction of verl's documentation"
    # The veto: a row with a token whose ratio is below 0.3.
    assert tc.token_weights.within("ratio", "min", 0.3)(batch, one).tolist() == [[1.0], [0.0]]


def test_rows_are_judged_with_the_tokens_that_filters_rejected():
    """So the order of rules does not matter, and a row's ratio is that of all its tokens, as in verl."""
    batch, _ = naive.random_batch()
    batch = naive.with_inputs(batch, {"rollout_log_probs"})
    some = tc.filters.within("ratio", "token", 0.7, 1.4)
    whole = tc.filters.within("ratio", "mean", 0.9, 1.2)
    orders = [tc.Objective(filters=order).prepare(batch) for order in ((some, whole), (whole, some))]
    assert torch.equal(orders[0].mask, orders[1].mask) and orders[0].mask.any()
    weight = tc.token_weights.importance("sum")
    alone = weight(batch, None)
    filtered = tc.Objective(filters=(some,), token_weights=(weight,)).prepare(batch)
    assert filtered.lengths.sum() < batch.lengths.sum()
    assert torch.equal(filtered.multiplier, alone)


def test_geometric_rejection():
    batch, _ = naive.two_rows()
    assert tc.filters.geo_rs(low=0.9)(batch, batch.rewards[:, None])[:, 0].tolist() == [True, False]
    assert not tc.filters.geo_rs()(batch, batch.rewards[:, None]).any()
