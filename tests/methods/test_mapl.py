import dataclasses
import itertools
import math

import naive
import pytest
import tokcredit as tc
import torch
from golden_pair import softplus, total
from tokcredit.methods.mapl import levels
from tokcredit.stages.link import logistic


def mixed(seed=0):
    """Two pairs of responses, two of prompts and two groups of four, their rows in any order."""
    batch, current = naive.random_batch(seed, groups=8, size=2)
    sizes = torch.tensor([2, 2, 2, 2, 4, 4])
    group = torch.repeat_interleave(torch.arange(6), sizes)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(seed))
    higher = torch.tensor([1, 0] * 4 + [1, 0, 0, 1] * 2).double()
    marks = torch.isin(group, torch.tensor([1, 2]))
    batch = dataclasses.replace(batch, group_ids=group[order], rewards=higher[order])
    batch = naive.with_inputs(batch, {"ref_log_probs"})
    return batch.with_inputs(prompt_pairs=marks[order]), current


@pytest.mark.parametrize("seed", range(2))
def test_formula(seed):
    batch, current = mixed(seed)

    def formula(batch, log_probs):
        d, rows, losses = log_probs - batch.ref_log_probs, naive.rows_of(batch), []
        for own in naive.group_rows(batch):
            z = sum((1 if batch.rewards[r] == 1 else -1) * 0.7 * total(d, rows[r]) for r in own)
            weight = 0.3 if len(own) == 4 else 0.4 if batch.extras["prompt_pairs"][own[0]] else 1.0
            losses.append(weight * softplus(-z))
        return sum(losses) / 6

    objective = tc.methods.mapl(0.7, 0.4, 0.3)
    out = naive.check(objective, batch, current, formula)
    assert out.metrics["pairs"] == 6
    size = [len(naive.group_rows(batch)[g]) for g in batch.group_index]
    marks = batch.extras["prompt_pairs"].tolist()
    expected = [(0.3 if n == 4 else 0.4 if x else 1.0) / 6 for n, x in zip(size, marks, strict=True)]
    assert objective.prepare(batch).row_weights[:, 0].tolist() == pytest.approx(expected)


def rows_with(rewards, scores, marked=False):
    """Rows of one token with these log-ratios, in one group."""
    n = len(rewards)
    batch = tc.Rollouts(
        torch.zeros(n, dtype=torch.long),
        torch.arange(n + 1),
        torch.zeros(n, dtype=torch.long),
        torch.tensor(rewards),
        ref_log_probs=torch.full((n,), -1.0, dtype=torch.float64),
        extras={"prompt_pairs": torch.full((n,), marked)},
    )
    return batch, torch.tensor(scores, dtype=torch.float64).sub(1).requires_grad_()


def test_by_hand():
    objective = tc.methods.mapl(1.0)
    batch, x = rows_with([1.0, 0.0], [0.07, -0.02], marked=True)
    assert objective.loss(objective.prepare(batch), x).loss.item() == pytest.approx(0.6491593390)
    # Differences of 0.15 with the new prompt and of 0.02 with the old one.
    batch, x = rows_with([1.0, 0.0, 0.0, 1.0], [0.25, 0.1, 0.12, 0.1])
    out = objective.loss(objective.prepare(batch), x)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(0.6302581947)
    slope = 1 / (1 + math.exp(0.13))
    assert x.grad.tolist() == pytest.approx([-slope, slope, slope, -slope])
    assert out.metrics["margin_mean"].item() == pytest.approx(0.13) and out.metrics["accuracy_mean"] == 1


@pytest.mark.parametrize("marks", [[True, False], [False, True], [True] * 4, [False, False, True, False]])
def test_rows_that_are_marked_are_a_pair(marks):
    batch, _ = rows_with([1.0, 0.0] * (len(marks) // 2), [0.0] * len(marks))
    with pytest.raises(ValueError, match="prompt_pairs: expected True for both rows of a pair or for neither"):
        tc.methods.mapl().prepare(batch.with_inputs(prompt_pairs=torch.tensor(marks)))


def test_pairs_of_responses_alone_are_dpo():
    batch, current = naive.random_pairs()
    batch = naive.with_inputs(batch, {"ref_log_probs"})
    batch = batch.with_inputs(prompt_pairs=torch.zeros(batch.num_rows, dtype=torch.bool))
    naive.check_same((tc.methods.mapl(), tc.methods.dpo()), batch, current)


def test_partitions_keep_groups_of_four_whole():
    batch, current = mixed()
    objective = tc.methods.mapl(0.7, 0.4, 0.3)
    prepared = objective.prepare(batch)
    groups = naive.group_rows(batch)
    x, y = current.clone().requires_grad_(), current.clone().requires_grad_()
    whole = objective.loss(prepared, x).loss
    parts = [[*groups[5], *groups[0]], groups[4], [*groups[3], *groups[1], *groups[2]]]
    added = sum(objective.loss(prepared.select(rows), y[rows]).loss for rows in parts)
    whole.backward()
    added.backward()
    torch.testing.assert_close(added, whole)
    torch.testing.assert_close(y.grad, x.grad)
    for rows in itertools.combinations(groups[4], 2):
        with pytest.raises(ValueError, match="rows: expected both rows of each pair once, got"):
            prepared.select([*groups[0], *rows])
    ranks = [
        objective.prepare(batch.select(r), global_num_groups=6, dp_size=2) for r in (parts[0], parts[1] + parts[2])
    ]
    assert sum(
        objective.loss(p, current[r]).loss for p, r in zip(ranks, (parts[0], parts[1] + parts[2]), strict=True)
    ) / 2 == pytest.approx(whole.item())


def test_groups_are_checked():
    batch, _ = rows_with([1.0, 0.0, 0.5], [0.0] * 3)
    with pytest.raises(ValueError, match="group_ids: expected pairs, groups of 2 or 4 rows, got a group of 3"):
        tc.methods.mapl().prepare(batch)
    batch, _ = rows_with([1.0, 0.0, 0.0, 0.0], [0.0] * 4)
    with pytest.raises(ValueError, match="rewards: expected a higher reward for the chosen row"):
        tc.methods.mapl().prepare(batch)
    with pytest.raises(ValueError, match="group_ids: expected pairs, groups of two rows, got a group of 4"):
        tc.methods.dpo().prepare(batch)


def test_terms_of_pairs_are_refused():
    with pytest.raises(ValueError, match="pair_terms: expected none because of levels"):
        tc.mix("mapl", pair_terms="t_reg")


def test_defaults():
    assert tc.methods.mapl() == tc.Preference(link=logistic(0.1), pair_weights=levels(intra=1.0, inter=1.0))
