import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.methods.gigpo import anchored_returns


@pytest.mark.parametrize("others_only", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_formula(seed, others_only):
    def formula(batch, log_probs):
        turns, anchors = naive.turns_of(batch), batch.extras["anchor_ids"].tolist()
        to_go = [naive.to_go(row, 0.95) for row in naive.turn_rewards(batch)]
        total, found = naive.total_rewards(batch), [[0.0] * len(row) for row in to_go]
        for rows in naive.counted_rows(batch):
            mean, std = naive.moments([total[r] for r in rows])
            visits = {}
            for r in rows:
                for k, turn in enumerate(turns[r]):
                    visits.setdefault(anchors[turn[0]], []).append((r, k))
            for members in visits.values():
                for r, k in members:
                    peers = [m for m in members if m[0] != r] if others_only else members
                    spread = naive.moments([to_go[i][j] for i, j in members])[1] + 1e-6
                    if peers and len(members) > 1:
                        baseline = sum(to_go[i][j] for i, j in peers) / len(peers)
                        found[r][k] = (to_go[r][k] - baseline) / spread
                    found[r][k] = (total[r] - mean) / (std + 1e-6) + 0.7 * found[r][k]
        advantages = naive.spread_turns(batch, found)
        return naive.token_mean(batch, naive.token_ppo(batch, log_probs, advantages, 0.8, 1.2))

    batch, current = naive.random_batch(seed, length=9)
    batch = naive.with_inputs(batch, {"token_rewards", "anchor_ids"}, seed)
    naive.check(tc.methods.gigpo(weight=0.7, others_only=others_only), batch, current, formula)


def episodes(rewards, anchors, lengths):
    return tc.Rollouts(
        torch.arange(len(rewards)),
        torch.tensor([0, *lengths]).cumsum(0),
        torch.zeros(len(lengths), dtype=torch.long),
        None,
        token_rewards=torch.tensor(rewards, dtype=torch.float64),
        extras={"turn_ids": torch.arange(len(rewards)), "anchor_ids": torch.tensor(anchors)},
    )


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (False, [6.01666667, 8.08333333, 3.33333333, -13.00833333, -11.41666667, 6.99166667]),
        (True, [1.06402206, 1.28445685, 0.57735017, -2.30487833, -1.86180701, 1.24085626]),
    ],
)
def test_by_hand(scale, expected):
    """Rewards 0, 0, 10 | 0, 0 | 10 of turns that begin in the states 0, 1, 2 | 0, 1 | 0."""
    batch = episodes([0, 0, 10.0, 0, 0, 10], [0, 1, 2, 0, 1, 0], [3, 2, 1])
    advantages = tc.methods.gigpo(scale=scale).prepare(batch).advantages.tolist()
    assert advantages == pytest.approx(expected, rel=1e-7)


def test_a_state_that_is_visited_again():
    """Returns 2.5, 5, 10 | 0 of states 0, 1, 0 | 0. The first trajectory is a peer of itself, unless told otherwise."""
    batch = episodes([0, 0, 10.0, 0], [0, 1, 0, 0], [3, 1])
    found = anchored_returns(0.5, scale=False)(batch).tolist()
    assert found == pytest.approx([-1.66666667, 0, 5.83333333, -4.16666667])
    others = anchored_returns(0.5, scale=False, others_only=True)(batch).tolist()
    assert others == pytest.approx([2.5, 0, 10, -6.25])


def test_equal_states_of_different_tasks_are_not_compared():
    batch = episodes([1.0, 5.0], [7, 7], [1, 1])
    apart = tc.Rollouts(
        batch.tokens, batch.spans, torch.tensor([0, 1]), None, token_rewards=batch.token_rewards, extras=batch.extras
    )
    assert anchored_returns(scale=False)(batch).tolist() == [-2.0, 2.0]
    assert anchored_returns(scale=False)(apart).tolist() == [0.0, 0.0]


def test_without_the_second_term_it_is_grpo():
    batch, _ = naive.random_batch()
    batch = naive.with_inputs(batch, {"anchor_ids", "token_rewards"})
    assert torch.equal(
        tc.methods.gigpo(weight=0.0).prepare(batch).advantages, tc.methods.grpo().prepare(batch).advantages
    )


def test_defaults():
    assert tc.methods.gigpo() == tc.Objective(
        tc.credit.sum(tc.credit.group_normalized(True, 1e-6), anchored_returns(0.95, True, False, 1e-6), 1.0),
        clip=tc.clip.ppo(0.2, 0.2),
        aggregation=tc.aggregation.token_mean(),
    )
