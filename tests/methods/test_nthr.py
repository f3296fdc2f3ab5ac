import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.methods.nthr import negative_hidden_reward


def advantages(batch, beta):
    tokens, credit, r = naive.rows_of(batch), naive.group_advantages(batch), batch.rewards.tolist()
    s = naive.influence(batch, tokens, [1.0] * batch.num_rows)
    out = {t: credit[i] for i, ts in enumerate(tokens) for t in ts}
    for rows in naive.counted_rows(batch):
        correct = [i for i in rows if r[i] > 0.5]
        if not 0 < len(correct) < len(rows):
            continue
        tau = beta * max(0.0, min(sum(s[k] for k in tokens[i]) / len(tokens[i]) for i in correct if tokens[i]))
        for j in rows:
            for q in tokens[j]:
                if j not in correct and s[q] > tau:
                    out[q] = credit[j] * 2 * abs(0.5 - len(correct) / len(rows))
    return out


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("beta", [1.0, 0.0, 0.2])
def test_formula(seed, beta):
    batch, current = naive.random_batch(seed, size=5)
    batch = naive.with_inputs(batch, {"hidden_states", "token_probs"}, seed)

    def formula(batch, log_probs):
        credit = advantages(batch, beta)
        ratios = {t: (log_probs[t] - batch.old_log_probs[t]).exp() for t in credit}
        losses = [[naive.clipped(credit[t], ratios[t], 0.8, 1.2) for t in ts] for ts in naive.rows_of(batch)]
        return naive.sequence_mean(batch, losses)

    objective = tc.methods.nthr(beta)
    out = naive.check(objective, batch, current, formula)
    changed = objective.prepare(batch).advantages != tc.methods.grpo().prepare(batch).advantages
    assert out.metrics["tokens"] > changed.sum() >= (beta < 1)


def two_rows(rewards, hidden, probs):
    """One row of one token each, tokens 0 and 1."""
    extras = {"hidden_states": torch.tensor(hidden), "token_probs": torch.tensor(probs)}
    return tc.Rollouts(
        torch.tensor([0, 1]), torch.tensor([0, 1, 2]), torch.tensor([0, 0]), torch.tensor(rewards), extras=extras
    )


def test_by_hand():
    # Both choose as before, but the wrong row's hidden state points the other way: its influence is -0.5 * -2 = 1,
    # more than the correct row's own 0.5. Half of the rows are correct: the wrong token is switched off.
    batch = two_rows([1.0, 0.0], [[1.0, 0.0], [-2.0, 0.0]], [[0.5, 0.5], [0.5, 0.5]])
    assert tc.methods.nthr().prepare(batch).advantages.tolist() == pytest.approx([0.70711, 0], abs=1e-5)
    assert tc.methods.nthr(beta=2.5).prepare(batch).advantages.tolist() == pytest.approx([0.70711, -0.70711], abs=1e-5)
    # Three wrong rows to one correct: |1 - 2 / 4| of the penalty is left.
    rows = torch.tensor([0, 1, 1, 1])
    four = tc.Rollouts(
        rows,
        torch.arange(5),
        torch.zeros(4, dtype=torch.long),
        torch.tensor([1.0, 0, 0, 0]),
        extras={name: x[rows] for name, x in batch.extras.items()},
    )
    assert tc.methods.nthr().prepare(four).advantages.tolist() == pytest.approx([1.5, -0.25, -0.25, -0.25], abs=1e-5)


def test_columns_are_the_tokens_of_the_group():
    batch = tc.Rollouts.from_padded(
        torch.tensor([[7, 3, 9], [3, 3, 5], [9, 7, 2]]),
        torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 0]]),
        torch.tensor([5, 5, 1]),
        torch.zeros(3),
    )
    batch.tokens[[2, 8]] = torch.tensor([-100, 10**12])  # where masked, ids mean nothing
    ids, column = tc.log_probs.group_vocabulary(batch)
    assert ids.tolist() == [[7, 9, -1], [3, 5, 7]]  # groups in rising order of their ids
    assert column.tolist() == [2, 0, -1, 0, 0, 1, 1, 0, -1]
    logits = torch.randn(3, 3, 10, generator=torch.Generator().manual_seed(0))
    probs = tc.log_probs.group_probs(logits, batch).view(3, 3, 3)
    torch.testing.assert_close(probs[0, 1], logits[0, 1].softmax(-1)[[3, 5, 7]])
    torch.testing.assert_close(probs[2, 0, :2], logits[2, 0].softmax(-1)[[7, 9]])
    assert probs[2, 0, 2] == 0 and not probs[0, 2].any()


def test_defaults():
    assert tc.methods.nthr() == tc.Objective(
        credit=negative_hidden_reward(
            tc.credit.group_normalized(scale=True, epsilon=1e-6, count_empty=False), beta=1.0, threshold=0.5
        )
    )
