import naive
import pytest
import ragged
import reference.tree as reference
import tokcredit as tc
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokcredit.methods.tempo import tempo_credit


@given(ragged.grouped(), st.booleans(), st.booleans())
def test_credit(data, padded, count_empty):
    sequences, groups, rewards = data
    batch = ragged.batch(*data, padded=padded)
    ours = tempo_credit(count_empty=count_empty)(batch)
    rows = [i for i, s in enumerate(sequences) if s or count_empty]
    sequences, groups, rewards = ([x[i] for i in rows] for x in data)
    for i, s in enumerate(sequences):
        mean, std = reference.moments(groups, rewards, i)
        for t in range(len(s)):
            after = reference.mean_after(sequences, groups, rewards, i, t + 1)
            before = reference.mean_after(sequences, groups, rewards, i, t)
            expected = (rewards[i] - mean + after - before) / (std + 1e-6)
            assert ours[batch.begin[rows[i]] + t].item() == pytest.approx(expected, abs=1e-6)


def test_by_hand():
    batch = ragged.batch([list(b"abcE"), list(b"abdE"), list(b"aefE"), list(b"ghE")], [0] * 4, [1.0, 0.0, 1.0, 0.0])
    advantages = tc.methods.tempo().prepare(batch).advantages
    assert advantages.tolist() == pytest.approx(
        [
            *(1.1547, 0.5773, 1.7320, 0.8660),
            *(-0.5773, -1.1547, -1.7320, -0.8660),
            *(1.1547, 1.4434, 0.8660, 0.8660),
            *(-1.7320, -0.8660, -0.8660),
        ],
        abs=1e-4,
    )


def test_loss():
    def formula(batch, log_probs):
        advantages = tc.methods.tempo().prepare(batch).advantages.reshape(-1)
        losses = [
            [
                naive.clipped(advantages[t].item(), (log_probs[t] - batch.old_log_probs[t]).exp(), 0.8, 1.28, 3.0)
                for t in row
            ]
            for row in naive.rows_of(batch)
        ]
        return naive.token_mean(batch, losses)

    naive.check(tc.methods.tempo(), *naive.random_batch(), formula)


def test_changes_sum_to_the_outcome_where_a_row_ends_alone():
    batch = ragged.batch([[0, 1, 2], [0, 1, 3], [0, 4], [5]], [0] * 4, [1.0, 0.0, 0.25, 0.5])
    prepared = tc.methods.tempo(scale=False).prepare(batch)
    for r, (b, e) in enumerate(zip(batch.begin.tolist(), batch.end.tolist(), strict=True)):
        outcome = batch.rewards[r] - batch.rewards.mean()
        changes = prepared.advantages[b:e] - outcome
        torch.testing.assert_close(changes.sum(), outcome)


def test_masked_tokens_are_compared_and_have_no_advantage():
    mask = torch.tensor([True, False, True, True, False, True])
    batch = ragged.batch([[1, 2, 3], [1, 9, 3]], [0, 0], [1.0, 0.0], mask=mask)
    advantages = tc.methods.tempo(scale=False).prepare(batch).advantages
    assert advantages.tolist() == [0.5, 0.0, 0.5, -0.5, 0.0, -0.5]


def test_defaults():
    assert tc.methods.tempo() == tc.Objective(
        credit=tempo_credit(scale=True, epsilon=1e-6, count_empty=False),
        clip=tc.clip.ppo(low=0.2, high=0.28, cap=3.0),
        aggregation=tc.aggregation.token_mean(),
    )
