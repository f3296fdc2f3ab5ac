import naive
import pytest
import tokcredit as tc
import torch


def made(groups, rewards):
    rows = len(groups)
    return tc.Rollouts(
        torch.arange(rows),
        torch.arange(rows + 1),
        torch.tensor(groups, dtype=torch.long),
        torch.tensor(rewards, dtype=torch.float64),
    )


def test_by_hand():
    pairing = made([7, 2, 7, 2, 2, 2], [0.0, 1.0, 1.0, 4.0, 3.0, 2.0]).pairing
    assert pairing.pairs.tolist() == pairing.rows.tolist() == [[3, 5], [4, 1], [2, 0]]
    assert pairing.group.tolist() == [0, 0, 1] and pairing.sizes == {2, 4} and not pairing.tied
    assert made([0, 0, 0, 0], [1.0, 2.0, 2.0, 3.0]).pairing.tied
    assert not made([0, 0, 0, 0], [1.0, 1.0, 2.0, 2.0]).pairing.tied


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_groups_without_pairs(rows):
    pairing = made([0] * rows, [0.0] * rows).pairing
    assert len(pairing.pairs) == rows // 2 and pairing.sizes == ({rows} if rows else set())


def test_pairs_follow_the_rewards_and_rows():
    """A batch derived from another does not keep its pairs."""
    batch, _ = naive.random_pairs(pairs=3)
    first = batch.pairing.pairs
    turned = batch.with_rewards(-batch.rewards)
    assert turned.pairing.pairs.tolist() == first[:, ::-1].tolist()
    kept = (batch.group_ids != batch.group_ids[0]).nonzero()[:, 0]
    part = batch.select(kept)
    assert len(part.pairing.pairs) == 2 and set(part.pairing.pairs.flatten().tolist()) == set(range(4))
    assert batch.keeping(batch.group_ids != batch.group_ids[0]).pairing.pairs.tolist() == part.pairing.pairs.tolist()
