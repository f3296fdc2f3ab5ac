import math

import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.methods.match_tir import turns


def turns_of(batch):
    """Runs of chosen tokens of each row."""
    out = []
    for b, e in zip(batch.begin.tolist(), batch.end.tolist(), strict=True):
        runs, last = [], None
        for t in range(b, e):
            if batch.response_mask[t]:
                if last != t - 1:
                    runs.append([])
                runs[-1].append(t)
                last = t
        out.append(runs)
    return out


def normalised(x, center_alone=False):
    if len(x) == 1:
        return [0.0 if center_alone else x[0] / (1 + 1e-6)]
    mean = sum(x) / len(x)
    std = math.sqrt(sum((a - mean) ** 2 for a in x) / (len(x) - 1))
    return [(a - mean) / (std + 1e-6) for a in x]


def advantages(batch, halve, center_alone):
    turns, reward, out = turns_of(batch), batch.extras["turn_rewards"].tolist(), {}
    each = [[sum(reward[t] for t in run) for run in runs] for runs in turns]
    later = [[sum(0.9 ** (k - t) * r[k] for k in range(t, len(r))) for t in range(len(r))] for r in each]
    for rows in naive.counted_rows(batch):
        whole = dict(zip(rows, normalised([sum(each[i]) for i in rows], center_alone), strict=True))
        for t in range(max(len(turns[i]) for i in rows)):
            having = [i for i in rows if len(turns[i]) > t]
            for i, local in zip(having, normalised([later[i][t] for i in having], center_alone), strict=True):
                out |= dict.fromkeys(turns[i][t], (whole[i] + local) / (2 if halve else 1))
    return out


@pytest.mark.parametrize(("halve", "center_alone"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("seed", range(3))
def test_formula(halve, center_alone, seed):
    batch, current = naive.random_batch(seed, length=11)
    batch = naive.with_inputs(batch, {"turn_rewards"}, seed)

    def formula(batch, log_probs):
        credit = advantages(batch, halve, center_alone)
        ratio = lambda t: (log_probs[t] - batch.old_log_probs[t]).exp()  # noqa: E731
        losses = [[naive.clipped(credit[t], ratio(t), 0.8, 1.2) for t in row] for row in naive.rows_of(batch)]
        return naive.sequence_mean(batch, losses)

    naive.check(tc.methods.match_tir(halve=halve, center_alone=center_alone), batch, current, formula)


def two_rollouts(a, b):
    """Turns of two tokens with a tool's token between them; ``a`` and ``b`` are rewards of their turns."""
    turn = [True, True, False]
    lengths = [3 * len(a), 3 * len(b)]
    batch = tc.Rollouts(
        torch.arange(sum(lengths)),
        torch.tensor([0, *lengths]).cumsum(0),
        torch.zeros(2, dtype=torch.long),
        torch.zeros(2),
        torch.tensor(turn * (len(a) + len(b))),
    )
    batch.extras["turn_rewards"] = tc.rewards.matching.turn_rewards(batch, [a, b])
    return batch


def test_by_hand():
    batch = two_rollouts([0.5, 1.0], [0.0, 0.5, 0.0])
    credit = tc.methods.match_tir(halve=True).prepare(batch).advantages
    expected = [0.70711, 0.70711, -0.70711, -0.70711, -0.35355]
    assert credit.tolist() == pytest.approx([x for a in expected for x in (a, a, 0)], abs=1e-5)
    whole = tc.methods.match_tir().prepare(batch).advantages
    torch.testing.assert_close(whole, 2 * credit)


def test_the_turn_of_one_row_alone_keeps_its_return_or_none():
    batch = two_rollouts([0.5, 1.0], [0.0, 0.5, 0.8])  # 1.5 against 1.3
    last = [tc.methods.match_tir(center_alone=c).prepare(batch).advantages[-2].item() for c in (False, True)]
    assert last == pytest.approx([-0.70711 + 0.8, -0.70711], abs=1e-5)


def test_dual_clip_of_the_release():
    batch, current = naive.random_batch(length=11)
    batch = naive.with_inputs(batch, {"turn_rewards"})
    current = current + torch.arange(11) * 0.2  # ratios up to 8 at late tokens

    def formula(batch, log_probs):
        credit = advantages(batch, False, False)
        ratio = lambda t: (log_probs[t] - batch.old_log_probs[t]).exp()  # noqa: E731
        losses = [[naive.clipped(credit[t], ratio(t), 0.8, 1.2, 3.0) for t in row] for row in naive.rows_of(batch)]
        return naive.sequence_mean(batch, losses)

    out = naive.check(tc.methods.match_tir(cap=3.0), batch, current, formula)
    assert out.metrics["clip_cap_fraction"] > 0


def test_terms_of_the_paper():
    batch, current = naive.random_batch()
    batch = naive.with_inputs(batch, {"turn_rewards", "ref_log_probs"})
    objective = tc.mix("match_tir", terms=("kl(0.001)", "entropy(0.001)"))
    assert objective.variables == ("log_probs", "entropies")
    out = objective.loss(objective.prepare(batch), current, entropies=torch.full_like(current, 2.0))
    plain = tc.methods.match_tir()
    added = out.loss - plain.loss(plain.prepare(batch), current).loss
    rows, ref = [row for row in naive.rows_of(batch) if row], batch.ref_log_probs
    u = {t: (current.reshape(-1)[t] - ref[t]).item() for row in rows for t in row}
    k3 = sum(sum(math.exp(-u[t]) + u[t] - 1 for t in row) / len(row) for row in rows) / len(rows)
    assert added.item() == pytest.approx(0.001 * k3 - 0.001 * 2.0, rel=1e-9)


def test_defaults():
    assert tc.methods.match_tir() == tc.Objective(
        credit=turns(discount=0.9, epsilon=1e-6, halve=False, center_alone=False)
    )
