import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.methods.ba import balanced


def weights(aggregation, batch, **denominators):
    objective = tc.Objective(aggregation=aggregation)
    return objective.prepare(batch, **denominators).row_weights.expand(batch.num_rows, 1)[:, 0]


def test_weights_by_hand():
    batch, _ = naive.random_batch()
    lengths = [len(row) for row in naive.rows_of(batch)]
    rows, tokens = sum(n > 0 for n in lengths), sum(lengths)
    assert rows == 11
    expected = {
        tc.aggregation.token_mean(): [1 / tokens] * 12,
        tc.aggregation.token_sum(): [1.0] * 12,
        tc.aggregation.sequence_mean(): [1 / (rows * max(n, 1)) for n in lengths],
        tc.aggregation.sequence_sum(100): [1 / (rows * 100)] * 12,
        tc.aggregation.sequence_sum(): [1 / (rows * 7)] * 12,
    }
    for aggregation, value in expected.items():
        assert weights(aggregation, batch).tolist() == pytest.approx(value, rel=1e-15), aggregation
        assert weights(aggregation, batch).dtype == torch.float64


def test_sequence_sum_without_a_length_takes_the_longest_row_of_a_packed_batch():
    batch = tc.Rollouts(torch.arange(5), torch.tensor([0, 3, 5]), torch.tensor([0, 0]), torch.tensor([1.0, 0.0]))
    assert weights(tc.aggregation.sequence_sum(), batch).tolist() == pytest.approx([1 / 6] * 2)


def test_numbers_of_all_ranks():
    batch, _current = naive.random_batch()
    given = {"batch_num_tokens": 500, "global_batch_size": 40, "global_num_groups": 9, "dp_size": 2}
    lengths = batch.lengths.clamp(min=1).tolist()
    assert weights(tc.aggregation.token_mean(), batch, **given).tolist() == pytest.approx([2 / 500] * 12)
    assert weights(tc.aggregation.token_sum(), batch, **given).tolist() == [2.0] * 12
    assert weights(tc.aggregation.sequence_mean(), batch, **given).tolist() == pytest.approx(
        [2 / (40 * n) for n in lengths]
    )
    assert weights(tc.aggregation.sequence_sum(8), batch, **given).tolist() == pytest.approx([2 / (40 * 8)] * 12)
    one, two = (
        tc.Objective(aggregation=balanced()).prepare(batch, **(given | {"global_num_groups": n})).row_weights
        for n in (9, 18)
    )
    torch.testing.assert_close(one, two * 2)


def test_the_average_of_two_ranks_is_the_whole():
    """Each rank has half of the rows; the host averages their gradients."""
    batch, current = naive.random_batch()
    for aggregation in (
        tc.aggregation.token_mean(),
        tc.aggregation.sequence_mean(),
        tc.aggregation.sequence_sum(9),
        balanced(),
    ):
        objective = tc.Objective(aggregation=aggregation)
        halves = [batch.group_index == 0, batch.group_index > 0]
        given = {
            "batch_num_tokens": int(batch.lengths.sum()),
            "global_batch_size": int((batch.lengths > 0).sum()),
            "global_num_groups": batch.num_groups,
            "dp_size": 2,
        }
        parts = [objective.loss(objective.prepare(batch.select(x), **given), current[x]).loss for x in halves]
        whole = objective.loss(objective.prepare(batch), current).loss
        torch.testing.assert_close(sum(parts) / 2, whole)
        assert whole != 0


@pytest.mark.parametrize(
    ("denominators", "error", "message"),
    [
        ({"batch_num_tokens": 11.5}, TypeError, r"batch_num_tokens: expected a whole number, got 11\.5"),
        ({"batch_num_tokens": True}, TypeError, "batch_num_tokens: expected a whole number, got True"),
        ({"batch_num_tokens": "11"}, TypeError, "batch_num_tokens: expected a whole number, got '11'"),
        ({"batch_num_tokens": -4}, ValueError, "batch_num_tokens: expected at least 0, got -4"),
        ({"global_batch_size": -1}, ValueError, "global_batch_size: expected at least 0, got -1"),
        ({"global_num_groups": 2.0}, TypeError, r"global_num_groups: expected a whole number, got 2\.0"),
        ({"dp_size": 0}, ValueError, "dp_size: expected at least 1, got 0"),
        ({"dp_size": None}, TypeError, "dp_size: expected a whole number, got None"),
        (
            {"dp_size": 2},
            ValueError,
            "batch_num_tokens: expected the number over all ranks because dp_size is 2, got None",
        ),
    ],
)
def test_denominators_are_checked(denominators, error, message):
    batch, _ = naive.random_batch()
    objective = tc.Objective(aggregation=tc.aggregation.token_mean())
    with pytest.raises(error, match=message):
        objective.prepare(batch, **denominators)
    with pytest.raises(error, match=message):
        objective.prepare(batch).with_denominators(**denominators)
    with pytest.raises(error, match=message):
        objective.prepare(batch).minibatch([0, 1], **denominators)
    supervised = tc.Supervised()
    with pytest.raises(error, match=message):
        supervised.prepare(batch, **denominators)


def test_whole_numbers_of_every_kind():
    batch, _ = naive.random_batch()
    for number in (60, torch.tensor(60), torch.tensor(60, dtype=torch.int32)):
        assert weights(tc.aggregation.token_mean(), batch, batch_num_tokens=number)[0] == 1 / 60


def test_prepare_takes_keywords_only():
    batch, _ = naive.random_batch()
    with pytest.raises(TypeError):
        tc.Objective().prepare(batch, 60)
