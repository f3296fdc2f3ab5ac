import math

import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.methods.igpo import information_gain


def scores(x):
    mean = sum(x) / len(x)
    std = math.sqrt(sum((v - mean) ** 2 for v in x) / len(x))
    return [(v - mean) / std if std > 1e-9 else 0.0 for v in x]


@pytest.mark.parametrize("jointly", [False, True])
@pytest.mark.parametrize("return_first", [False, True])
def test_formula(jointly, return_first):
    def formula(batch, log_probs):
        after, first = batch.extras["answer_log_probs"].tolist(), batch.extras["initial_answer_log_probs"].tolist()
        rewards, kinds = [], []
        for r, row in enumerate(naive.turns_of(batch)):
            last, own, kind = math.exp(first[r]), [], []
            for k, turn in enumerate(row):
                p = math.exp(after[turn[-1]])
                final = k == len(row) - 1
                gain = not final and not math.isnan(p)
                own.append(batch.rewards[r].item() if final else p - last if gain else 0.0)
                kind.append("outcome" if final else "gain" if gain else None)
                last = last if math.isnan(p) else p
            rewards.append(own)
            kinds.append(kind)
        for rows in naive.group_rows(batch):
            if return_first:
                to_go = {r: naive.to_go(rewards[r], 0.9) for r in rows}
                for k in range(max(map(len, to_go.values()))):
                    own = [x[k] for x in to_go.values() if len(x) > k]
                    for r in rows:
                        if len(rewards[r]) > k:
                            rewards[r][k] = to_go[r][k] - sum(own) / len(own)
                continue
            for some in [{"gain", "outcome"}] if jointly else [{"gain"}, {"outcome"}]:
                at = [(r, k) for r in rows for k, kind in enumerate(kinds[r]) if kind in some]
                if at:
                    for (r, k), z in zip(at, scores([rewards[r][k] for r, k in at]), strict=True):
                        rewards[r][k] = z
            for r in rows:
                rewards[r] = naive.to_go(rewards[r], 0.9)
        advantages = naive.spread_turns(batch, rewards)
        return naive.sequence_mean(batch, naive.token_ppo(batch, log_probs, advantages, 0.8, 1.2))

    batch, current = naive.random_batch(2, length=9)
    batch = naive.with_inputs(batch, {"answer_log_probs", "initial_answer_log_probs"})
    absent = batch.extras["answer_log_probs"].clone()
    absent[[row[0][-1] for row in naive.turns_of(batch) if row][::4]] = math.nan
    batch = batch.with_inputs(answer_log_probs=absent)
    objective = tc.methods.igpo(jointly=jointly, return_first=return_first, discount=0.9)
    naive.check(objective, batch, current, formula)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"jointly": True},
            [1.48616317, 1.84001154, 1.91078121, -1.98155089, -0.92000577, 0.49538772],
        ),
        ({}, [2.58347696, 2.24379393, 1.22474483, -2.58347696, -1.22474483, 0]),
        ({"discount": 0.95}, [2.41311189, 2.18255669, 1.22474483, -2.52223972, -1.22474483, 0]),
        ({"return_first": True}, [0.85, 0.65, 0, -0.7, -0.65, -0.15]),
    ],
)
def test_by_hand(settings, expected):
    """Probabilities 0.1, 0.3, 0.6 with outcome 1 | 0.1, 0.05 with outcome 0 | one turn with outcome 0.5."""
    log = [math.log(p) for p in (0.3, 0.6, 0.7, 0.05, 0.2, 0.4)]
    batch = tc.Rollouts(
        torch.arange(6),
        torch.tensor([0, 3, 5, 6]),
        torch.zeros(3, dtype=torch.long),
        torch.tensor([1.0, 0, 0.5], dtype=torch.float64),
        extras={
            "turn_ids": torch.arange(6),
            "answer_log_probs": torch.tensor(log, dtype=torch.float64),
            "initial_answer_log_probs": torch.full((3,), math.log(0.1), dtype=torch.float64),
        },
    )
    # The specification adds 1e-8 to the variance.
    assert tc.methods.igpo(**settings).prepare(batch).advantages.tolist() == pytest.approx(expected, abs=3e-6)


def test_gains_of_log_probs():
    batch = tc.Rollouts(
        torch.arange(3),
        torch.tensor([0, 2, 3]),
        torch.zeros(2, dtype=torch.long),
        torch.tensor([1.0, 0.5]),
        extras={
            "turn_ids": torch.arange(3),
            "answer_log_probs": torch.tensor([-1.0, -0.5, -0.5]),
            "initial_answer_log_probs": torch.tensor([-3.0, -3.0]),
        },
    )
    # Returns 2 + 1, 1 | 0.5; the second turn has no other to be compared with.
    found = information_gain(log_gain=True, return_first=True)(batch)
    assert found.tolist() == pytest.approx([1.25, 0, -1.25])


def test_defaults():
    assert tc.methods.igpo() == tc.Objective(information_gain(False, False, 1.0, False), clip=tc.clip.ppo(0.2, 0.2))
