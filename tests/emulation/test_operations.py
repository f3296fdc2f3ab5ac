import pytest
import torch
from tokcredit import _C

from .operations import run_both


@pytest.mark.parametrize("wrong", [0, 2])
def test_a_wrong_number_is_seen_among_poisoned_results(wrong):
    """Results are poisoned with large numbers, which must not count in how close two results have to be."""

    def fold(leaf, parent, scale, x, y):
        _C.tree_fold(leaf, parent, scale, x, y)
        y[1] += 1e-2 * wrong

    leaf, parent = torch.tensor([1, 2]), torch.tensor([-1, 0, 0, -1])
    found = run_both("tree_fold", fold, _C.tree_fold, [leaf, parent, None, torch.tensor([0.5, 1.0]), torch.empty(4)])
    assert len(found) == (wrong > 0)
    assert all("y: 1 of 4 differ" in line for line in found)
