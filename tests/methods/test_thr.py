import dataclasses

import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.methods.thr import hidden_reward


def advantages(batch, favour, beta):
    tokens, credit, r = naive.rows_of(batch), naive.group_advantages(batch), batch.rewards.tolist()
    s = naive.influence(batch, tokens, [1 / max(len(t), 1) for t in tokens])
    out = {t: credit[i] for i, ts in enumerate(tokens) for t in ts}
    for rows in naive.counted_rows(batch):
        correct = [i for i in rows if r[i] > 0.5]
        if not 0 < len(correct) < len(rows):
            continue
        tau = beta * min(sum(s[k] for k in tokens[i]) / len(tokens[i]) for i in correct if tokens[i])
        for j in rows:
            for q in tokens[j]:
                h = (2 * (j in correct) - 1) * s[q]
                kept = abs(h) > max(tau, 0)
                out[q] = credit[j] * (1 + favour * ((h > 0) - (h < 0))) if kept else 0.0
    return out


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("favour", "beta"), [(0.1, 1.0), (-0.3, 0.5), (0.0, 1.0)])
def test_formula(seed, favour, beta):
    batch, current = naive.random_batch(seed, size=5)
    batch = naive.with_inputs(batch, {"hidden_states", "token_probs"}, seed)

    def formula(batch, log_probs):
        credit = advantages(batch, favour, beta)
        ratios = {t: (log_probs[t] - batch.old_log_probs[t]).exp() for t in credit}
        losses = [[naive.clipped(credit[t], ratios[t], 0.8, 1.2) for t in ts] for ts in naive.rows_of(batch)]
        return naive.sequence_mean(batch, losses)

    objective = tc.methods.thr(favour, beta)
    out = naive.check(objective, batch, current, formula)
    credit, plain = objective.prepare(batch).advantages, tc.methods.grpo().prepare(batch).advantages
    assert 0 < ((credit == 0) & (plain != 0)).sum() < out.metrics["tokens"]


def two_rows(rewards, hidden, probs):
    """One row of one token each, tokens 0 and 1."""
    extras = {"hidden_states": torch.tensor(hidden), "token_probs": torch.tensor(probs)}
    return tc.Rollouts(
        torch.tensor([0, 1]), torch.tensor([0, 1, 2]), torch.tensor([0, 0]), torch.tensor(rewards), extras=extras
    )


def test_by_hand():
    # Errors (0.5, -0.5) and (-0.5, 0.5): products 0.5 and -0.5. Hidden states (1, 0) and (0.5, 1): products 1 and 0.5.
    # The correct row's influence is 0.5 * 1, so tau is 0.5 beta; the wrong one's is -0.5 * 0.5, reversed 0.25.
    batch = two_rows([1.0, 0.0], [[1.0, 0.0], [0.5, 1.0]], [[0.5, 0.5], [0.5, 0.5]])
    a = 0.70711
    for favour, beta, expected in (
        (0.2, 0.4, [1.2 * a, -1.2 * a]),
        (-0.2, 0.4, [0.8 * a, -0.8 * a]),
        (0.2, 0.6, [1.2 * a, 0]),
    ):
        assert tc.methods.thr(favour, beta).prepare(batch).advantages.tolist() == pytest.approx(expected, abs=1e-5)


def test_groups_all_correct_or_all_wrong_keep_their_credit():
    for rewards in ([2.0, 1.0], [0.0, -1.0]):
        batch = two_rows(rewards, [[1.0, 0.0], [0.0, 0.0]], [[0.5, 0.5], [0.5, 0.5]])
        plain = tc.methods.grpo().prepare(batch).advantages
        assert torch.equal(tc.methods.thr().prepare(batch).advantages, plain) and plain.any()


def test_constants_are_as_exact_as_the_rewards():
    """Hidden states in float32 decide which tokens are kept; the advantages there are those of float64 rewards."""
    batch = two_rows([1.0, 0.0], [[1.0, 0.0], [0.5, 1.0]], [[0.5, 0.5], [0.5, 0.5]])
    batch = dataclasses.replace(batch, rewards=batch.rewards.double())
    plain = tc.methods.grpo().prepare(batch).advantages
    got = tc.methods.thr(favour=0.1, beta=0.4).prepare(batch).advantages
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, (1 + 0.1) * plain, rtol=1e-15, atol=0)
    three = dataclasses.replace(
        batch,
        tokens=torch.tensor([0, 1, 1]),
        cu_seqlens=torch.arange(4),
        group_ids=torch.zeros(3, dtype=torch.long),
        rewards=torch.tensor([1.0, 0, 0], dtype=torch.float64),
        response_mask=None,
        extras={
            "hidden_states": torch.tensor([[1.0, 0.0], [-2.0, 0.0], [-2.0, 0.0]]),
            "token_probs": torch.full((3, 2), 0.5),
        },
    )
    plain = tc.methods.grpo().prepare(three).advantages
    got = tc.methods.nthr().prepare(three).advantages  # a third is correct: |1 - 2 / 3| of the penalty is left
    torch.testing.assert_close(got, plain * torch.tensor([1, 1 / 3, 1 / 3], dtype=torch.float64), rtol=1e-15, atol=0)


def test_defaults():
    assert tc.methods.thr() == tc.Objective(
        credit=hidden_reward(
            tc.credit.group_normalized(scale=True, epsilon=1e-6, count_empty=False), favour=0.1, beta=1.0, threshold=0.5
        )
    )
