"""TRL's own ``TreeRow`` beside ours, and its loss with an advantage per token."""

import os
import random

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed; make test-trl")

from tokcredit.adapters.trl import TreeRow

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"


def sample(generator, group, vocabulary=3, longest=7):
    length = generator.randint(1, longest)
    return {
        "input_ids": torch.tensor([generator.randrange(vocabulary) for _ in range(length)]),
        "completion_mask": torch.tensor([int(generator.random() < 0.7) for _ in range(length)]),
        "old_log_probs": torch.tensor([-generator.random() for _ in range(length)]),
        "advantage": generator.choice([-1.0, 0.5, 2.0]),
        "group_id": group,
    }


def samples(seed):
    generator = random.Random(seed)
    return [sample(generator, generator.randrange(3)) for _ in range(generator.randint(1, 8))]


def test_the_tensors_of_trl():
    theirs_of = pytest.importorskip("trl.experimental.async_grpo.packing", reason="TRL is not installed; make test-trl")
    for seed in range(300):
        ours, theirs = TreeRow(), theirs_of.TreeRow()
        for one in samples(seed):
            for budget in range(len(theirs.tokens), len(theirs.tokens) + len(one["input_ids"]) + 2):
                assert ours.fits(one, budget) == theirs.fits(one, budget)
            ours.add(one)
            theirs.add(one)
            for name in ("load", "trained", "groups", "tokens"):
                assert getattr(ours, name) == getattr(theirs, name)
        found, expected = ours.pack(), theirs.pack()
        assert found.keys() == expected.keys()
        for name, x in expected.items():
            assert found[name].dtype == x.dtype and torch.equal(found[name], x), (seed, name)


def test_by_hand():
    """Tokens fork one place before they differ; both samples want their last token."""
    row = TreeRow()
    for ids, advantage in (([5, 6, 7], [0.0, 1.0, 2.0]), ([5, 6, 8], 3.0)):
        size = len(ids)
        row.add(
            {
                "input_ids": torch.tensor(ids),
                "completion_mask": torch.tensor([0, 1, 1]),
                "old_log_probs": -torch.arange(size).float(),
                "advantage": advantage,
                "group_id": 0,
            }
        )
    found = {name: x.tolist() for name, x in row.pack().items()}
    assert found["input_ids"] == [5, 6, 7, 6, 8] and found["position_ids"] == [0, 1, 2, 1, 2]
    assert found["shift_labels"] == [6, 7, -100, 8, -100] and found["token_index"] == [0, 1, 0, 3]
    assert found["advantages"] == [1.0, 2.0, 3.0, 3.0] and found["old_log_probs"] == [-1.0, -2.0, -1.0, -2.0]
    assert found["segment_id"] == [0, 0, 1, 1] and found["tree_kv_index"] == [0, 0, 1, 2, 0, 3, 4]
    assert (row.load, row.trained, row.tokens) == (11, 4, [5, 6, 7, 6, 8])


WRONG = {
    "advantage: expected a number or ": {"advantage": [1.0, 2.0]},
    "completion_mask: expected ": {"completion_mask": torch.ones(9)},
    "old_log_probs: expected ": {"old_log_probs": torch.ones(9)},
    "input_ids: expected int64 .*, got float32": {"input_ids": torch.ones(3)},
    "input_ids: expected ids of at least 0, got -1": {"input_ids": torch.tensor([1, -1, 2])},
}


@pytest.mark.parametrize("message", WRONG)
def test_malformed_samples(message):
    plain = {
        "input_ids": torch.tensor([1, 2, 3]),
        "completion_mask": torch.ones(3),
        "old_log_probs": torch.zeros(3),
        "advantage": 1.0,
        "group_id": 0,
    }
    with pytest.raises((TypeError, ValueError), match=message):
        TreeRow().add(plain | WRONG[message])
    with pytest.raises(ValueError, match="samples: expected at least one"):
        TreeRow().pack()
