"""slime's hook as its ranks call it, each with the rows that it trains. slime itself is not on PyPI."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import tokcredit as tc
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).parent))

import recipes
import rows as rr
from tokcredit.adapters import slime

FIRST = 40  # samples count on through training
ROWS = sorted(rr.batch(), key=lambda row: row["group"])


def arguments(**settings):
    return SimpleNamespace(
        **{
            "n_samples_per_prompt": rr.SIZE,
            "rewards_normalization": False,
            "normalize_advantages": False,
            "kl_coef": 0,
            "context_parallel_size": 1,
            **settings,
        }
    )


def rollout_data(partition):
    """The keys that slime gives a rank, for these rows of the whole batch."""
    mine = [ROWS[i] for i in partition]
    return {
        "sample_indices": [FIRST + i for i in partition],
        "tokens": [torch.cat([row["prompt"], row["response"]]) for row in mine],
        "response_lengths": [len(row["response"]) for row in mine],
        "total_lengths": [len(row["prompt"]) + len(row["response"]) for row in mine],
        "loss_masks": [row["mask"].int() for row in mine],
        "rewards": [row["reward"] for row in mine],
        "log_probs": [row["old_log_probs"] for row in mine],
    }


def test_advantages_are_those_of_the_method():
    """In the order of the rank's rows, with the shapes of its log-probs, which slime weighs them against."""
    order = torch.randperm(len(ROWS), generator=torch.Generator().manual_seed(1)).tolist()
    data = rollout_data(order)
    assert recipes.run("slime")["credit"](arguments(), data) is None
    whole = tc.methods.tempo().prepare(rr.rollouts(ROWS)).advantages.split([len(row["response"]) for row in ROWS])
    for found, returned, row in zip(data["advantages"], data["returns"], order, strict=True):
        torch.testing.assert_close(found, whole[row])
        assert returned is found
    assert any((x != x[0]).any() for x in whole), "no advantage of a branch"


def rank(number, port, queue):
    mpu = ModuleType("megatron.core.mpu")
    mpu.get_data_parallel_group = lambda with_context_parallel: None
    core = ModuleType("megatron.core")
    core.mpu = mpu
    sys.modules |= {"megatron": ModuleType("megatron"), "megatron.core": core}
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=2)
    data = rollout_data(range(number, len(ROWS), 2))
    slime.advantages(tc.methods.tempo())(arguments(), data)
    queue.put((data["sample_indices"], [x.tolist() for x in data["advantages"]]))
    dist.destroy_process_group()


def test_groups_that_are_split_between_ranks():
    """slime gives a rank every n-th row."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=rank, args=(number, port, queue)) for number in range(2)]
    for process in processes:
        process.start()
    found = dict(pair for _ in processes for pair in zip(*queue.get(timeout=120), strict=True))
    for process in processes:
        process.join()
    whole = tc.methods.tempo().prepare(rr.rollouts(ROWS)).advantages.split([len(row["response"]) for row in ROWS])
    assert found == {FIRST + i: x.tolist() for i, x in enumerate(whole)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rewards_normalization": True}, r"rewards_normalization: expected False \(--disable-rewards-normalization\)"),
        ({"normalize_advantages": True}, "normalize_advantages: expected False"),
        ({"kl_coef": 0.1}, "kl_coef: expected 0"),
        ({"context_parallel_size": 2}, "context_parallel_size: expected 1"),
    ],
)
def test_settings_that_contradict(settings, message):
    with pytest.raises(ValueError, match=message):
        slime.advantages(tc.methods.tempo())(arguments(**settings), rollout_data(range(16)))


def test_keys_that_the_batch_lacks():
    data = rollout_data(range(16))
    del data["sample_indices"]
    with pytest.raises(RuntimeError, match="sample_indices: expected in slime's rollout data, got tokens"):
        slime.advantages(tc.methods.tempo())(arguments(), data)


def test_samples_of_several_rows():
    with pytest.raises(ValueError, match="sample_indices: expected one row per sample"):
        slime.advantages(tc.methods.tempo())(arguments(), rollout_data([0, 1, 1, 2]))


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (tc.methods.pods(), "expected no filters"),
        (tc.Objective(token_weights=(tc.token_weights.importance(high=2.0),)), "requires old_log_probs"),
    ],
)
def test_methods_that_slime_cannot_carry(objective, message):
    with pytest.raises(ValueError, match=message):
        slime.advantages(objective)
