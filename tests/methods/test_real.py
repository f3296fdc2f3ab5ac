import math

import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.methods.real import group_mean, labels, misclassified


def sides(batch):
    """Good and bad rows of each group that has a token, none of them where one of the two is missing."""
    rewards = batch.rewards.tolist()
    for rows in filter(None, naive.counted_rows(batch)):
        mean = sum(rewards[r] for r in rows) / len(rows)
        good = [r for r in rows if rewards[r] > mean]
        bad = [r for r in rows if r not in good]
        yield (good, bad) if good and bad else ([], [])


def classification(batch, log_probs, tau, kept=None):
    """The paper's loss, in float64, one row at a time; ``kept`` are the tokens whose log-probs are differentiated."""
    total, groups = 0.0, 0
    for pair in sides(batch):
        groups += 1
        for sign, rows in zip((-1, 1), pair, strict=True):
            inside = 1.0
            for r in rows:
                tokens = naive.rows_of(batch)[r]
                score = sum(log_probs[t] - batch.old_log_probs[t] for t in tokens) / len(tokens)
                inside = inside + torch.exp(sign * score / tau)
            total = total + (torch.log(inside) if rows else 0.0)
    return total / groups


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tau", [0.5, 0.2])
def test_formula(seed, tau):
    """The gradient is that of the paper's loss; the value of ours is not compared."""
    batch, current = naive.random_batch(seed, groups=4)
    objective = tc.methods.real(tau)
    ours, theirs = current.clone().requires_grad_(), current.clone().requires_grad_()
    objective.loss(objective.prepare(batch), ours).loss.backward()
    classification(batch, theirs.reshape(-1), tau).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-15)
    assert theirs.grad.abs().sum() > 0.1


def test_by_hand():
    # Both rows of one group: mean log-ratios 0.363358 and -0.681787.
    batch, current = naive.two_rows()
    objective = tc.methods.real()
    assert objective.prepare(batch).credit.tolist() == [[1.0], [-1.0]]
    variable = current.clone().requires_grad_()
    objective.loss(objective.prepare(batch), variable).loss.backward()
    found = variable.grad[batch.shaped(batch.response_mask)].tolist()
    assert found == pytest.approx([-0.162958] * 4 + [0.135773] * 3, abs=1e-6)
    assert classification(batch, current.reshape(-1), 0.5).item() == pytest.approx(0.622129, abs=1e-6)


def test_three_rows_by_hand():
    rewards, scores = [1.0, 0.8, 0.0], [0.2, -0.1, 0.4]
    batch = tc.Rollouts(
        torch.arange(3),
        torch.arange(4),
        torch.zeros(3, dtype=torch.long),
        torch.tensor(rewards).double(),
        old_log_probs=torch.full((3,), -1.0, dtype=torch.float64),
    )
    current = (torch.tensor(scores).double() - 1.0).requires_grad_()
    objective = tc.methods.real()
    objective.loss(objective.prepare(batch), current).loss.backward()
    assert current.grad.tolist() == pytest.approx([-0.463613, -0.844758, 1.379949], abs=1e-6)
    assert classification(batch, current.detach(), 0.5).item() == pytest.approx(2.232953, abs=1e-6)


def test_limits():
    """A row that is classified as wrongly as can be has the slope 1 / tau, and one classified rightly has none."""
    batch, _ = naive.two_rows()
    for away, slope in ((-60.0, 2.0), (60.0, 0.0)):
        current = batch.shaped(batch.old_log_probs) + torch.tensor([[away], [-away]])
        current = current.clone().requires_grad_()
        objective = tc.methods.real()
        objective.loss(objective.prepare(batch), current).loss.backward()
        found = current.grad[batch.shaped(batch.response_mask)].tolist()
        assert found == pytest.approx([-slope / 4] * 4 + [slope / 3] * 3, abs=1e-12)
    # On policy the scores are 0: exp(0) / (1 + number of rows of the side) / tau.
    batch, _ = naive.random_batch(groups=2, size=5)
    factor = objective.scales[0]
    prepared = objective.prepare(batch)
    zeros = torch.zeros(batch.num_tokens, dtype=torch.float64)
    found = factor(zeros, zeros, prepared.credit, batch.spans, prepared.window, prepared.signals[0])
    for good, bad in sides(batch):
        for rows in (good, bad):
            for r in rows:
                assert found[r].item() == pytest.approx(2 / (1 + len(rows)))


def test_labels():
    def label(*rewards):
        n = len(rewards)
        batch = tc.Rollouts(
            torch.arange(n), torch.arange(n + 1), torch.zeros(n, dtype=torch.long), torch.tensor(rewards)
        )
        return labels()(batch)[:, 0].tolist()

    assert label(1.0, 0.0, 0.5) == [1.0, -1.0, -1.0]  # a reward equal to the mean is a bad one
    assert label(0.3, 0.3) == [0.0, 0.0] and label(5.0) == [0.0]


def test_groups_on_one_side_count_in_the_mean():
    batch, current = naive.random_batch(groups=2)
    equal = torch.where(batch.group_index == 0, 1.0, batch.rewards)
    batch = tc.Rollouts.from_padded(
        batch.shaped(batch.tokens),
        batch.shaped(batch.response_mask),
        batch.group_ids,
        equal,
        old_log_probs=batch.shaped(batch.old_log_probs),
    )
    objective, x = tc.methods.real(), current.clone().requires_grad_()
    objective.loss(objective.prepare(batch), x).loss.backward()
    y = current.clone().requires_grad_()
    classification(batch, y.reshape(-1), 0.5).backward()
    torch.testing.assert_close(x.grad, y.grad)
    assert not x.grad[batch.group_index == 0].any() and x.grad.any()
    assert not objective.prepare(batch).has_gradient[batch.group_index == 0].any()


def test_parts_must_have_whole_groups():
    batch, current = naive.random_batch()
    objective = tc.methods.real()
    prepared = objective.prepare(batch)
    assert objective.couples_rows and not tc.methods.grpo().couples_rows
    groups = [(batch.group_index == g).nonzero()[:, 0].tolist() for g in range(3)]
    whole = next(rows for rows in groups if 1 not in rows)
    for call, rows, count in (
        (prepared.select, whole[:3], 3),
        (prepared.minibatch, whole[1:], 3),
        (prepared.select, whole * 2, 8),
        (prepared.select(whole).select, [2], 1),
        (prepared.select(whole).minibatch, [0, 1], 2),
    ):
        with pytest.raises(
            ValueError, match=rf"^rows: expected whole groups, .*, got {count} of the 4 rows of a group$"
        ):
            call(rows)
    # Row 1 has no token that the policy chose.
    group = next(rows for rows in groups if 1 in rows)
    assert prepared.select([r for r in group if r != 1]).lengths.sum() > 0
    assert prepared.select([]).lengths.numel() == 0
    # The order of rows is free, and the part of a part knows its groups.
    both = groups[2][::-1] + groups[1]
    part = prepared.select(both).select(range(len(groups[2])))
    a, b = (current[rows].clone().requires_grad_() for rows in (groups[2][::-1], groups[2]))
    objective.loss(part, a).loss.backward()
    objective.loss(prepared.select(groups[2]), b).loss.backward()
    torch.testing.assert_close(a.grad.flip(0), b.grad)
    assert a.grad.any()


def test_the_scale_in_another_method():
    """The advantage of GRPO times how wrongly the row is classified, also with a filter that rejects tokens."""
    batch, current = naive.random_batch(3)
    objective = tc.mix("grpo", scales="real", filters="improbable(below=0.8)")
    prepared = objective.prepare(batch)
    x = current.clone().requires_grad_()
    objective.loss(prepared, x).loss.backward()
    parts = current.clone().requires_grad_()
    for g in range(3):
        rows = (batch.group_index == g).nonzero()[:, 0]
        objective.loss(prepared.select(rows), parts[rows]).loss.backward()
    torch.testing.assert_close(parts.grad, x.grad)
    needed = prepared.has_gradient
    assert x.grad.any() and not x.grad[~needed].any()
    # Rows with an advantage of 0 do not count: their log-probs change nothing.
    plain = tc.mix("grpo", scales="real")
    rows = tc.Rollouts(
        torch.arange(3), torch.arange(4), torch.zeros(3, dtype=torch.long), torch.tensor([1.0, 0.5, 0.0]).double()
    )
    rows = rows.with_inputs(old_log_probs=torch.full((3,), -1.0, dtype=torch.float64))
    found = []
    for middle in (-1.0, -0.2):
        y = torch.tensor([-0.9, middle, -0.95], dtype=torch.float64).requires_grad_()
        plain.loss(plain.prepare(rows), y).loss.backward()
        found.append(y.grad)
    assert torch.equal(*found) and found[0][1] == 0 and found[0][0] < 0 < found[0][2]
    # Rows whose tokens are all rejected are needed, because the others are compared with them.
    alone = tc.mix(objective, filters="marked('truncated')")
    marked = naive.with_inputs(batch, {"truncated"})
    prepared = alone.prepare(marked)
    assert bool((prepared.has_gradient & (prepared.lengths == 0)).any())
    prepared.select(prepared.has_gradient)


def test_defaults():
    assert tc.methods.real() == tc.Objective(
        labels(),
        ratio=tc.ratio.sequence(high=math.inf),
        clip=tc.clip.gated("ratio", 0.0, 0.0, 1.0, 1.0, None, True),
        scales=(misclassified(0.5),),
        aggregation=group_mean(),
    )
