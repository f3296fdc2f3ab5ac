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
    mpu.get_data_parallel_group = lambda with_context_parallel: dist.group.WORLD
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


def segments(share):
    """The rollout data of a rank with each response of at least 4 tokens in two rows, last segments first."""
    data = rollout_data(range(len(ROWS)))
    del data["total_lengths"], data["log_probs"]
    parts = []
    for i, row in enumerate(ROWS):
        n, prompt = len(row["response"]), len(row["prompt"])
        cuts = [(0, n // 2), (n // 2, n)] if n > 3 else [(0, n)]
        for k, (first, end) in enumerate(cuts):
            parts.append(
                {
                    "sample_indices": 2 * i + k,
                    "rollout_ids": i,
                    "groups": row["group"],
                    "tokens": data["tokens"][i][: prompt + end],
                    "response_lengths": end - first,
                    "loss_masks": data["loss_masks"][i][first:end],
                    "rewards": share(row["reward"], k, len(cuts)),
                }
            )
    parts.reverse()
    return {name: [part[name] for part in parts] for name in parts[0]}


@pytest.mark.parametrize(
    ("rule", "share"),
    [
        ("same", lambda reward, k, count: reward),
        ("split", lambda reward, k, count: reward / count),
        ("last", lambda reward, k, count: reward if k == count - 1 else 5.0),
        ("sum", lambda reward, k, count: reward if k == count - 1 else 0.0),
    ],
)
def test_rollouts_of_several_rows(rule, share):
    """Whatever the reward of a row is said to be, and however the rows lie, the advantages are those of the whole."""
    data = segments(share)
    credit = slime.advantages(tc.methods.rloo(), trajectory_field="rollout_ids", reward_rule=rule, group_field="groups")
    credit(arguments(), data)
    whole = tc.methods.rloo().prepare(rr.rollouts(ROWS)).advantages.split([len(row["response"]) for row in ROWS])
    assert len(data["tokens"]) > len(ROWS) + 4 and torch.cat(whole).abs().sum() > 1
    found = {}
    for i, x in zip(data["rollout_ids"], data["advantages"], strict=True):
        found[i] = torch.cat([x, found.get(i, x[:0])])
    for i, expected in enumerate(whole):
        torch.testing.assert_close(found[i], expected)


def test_rewards_of_rows():
    """``sum`` keeps the reward of each row at its end; methods without it cannot read rewards of tokens."""
    data = segments(lambda reward, k, count: float(k + 1))
    objective = tc.Objective(tc.credit.returns())
    slime.advantages(objective, trajectory_field="rollout_ids", reward_rule="sum", group_field="groups")(
        arguments(), data
    )
    two = [i for i in range(len(ROWS)) if data["rollout_ids"].count(i) == 2]
    for i in two:
        last, first = (data["advantages"][j] for j, x in enumerate(data["rollout_ids"]) if x == i)
        assert set(first.tolist()) <= {0.0, 3.0} and set(last.tolist()) <= {0.0, 2.0}
        assert first.max() == 3.0
    slime.advantages(tc.methods.mt_grpo(), reward_rule="sum")
    with pytest.raises(ValueError, match="requires token_rewards"):
        slime.advantages(tc.methods.mt_grpo())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("groups", 7, "groups: expected one group in all rows of rollout_ids 0, got 7 in row .* beside 0 in row"),
        ("rewards", 9.0, r"rewards: expected the same reward \(reward_rule 'same'\) in all rows of rollout_ids 0, got"),
    ],
)
def test_rollouts_that_contradict_themselves(name, value, message):
    data = segments(lambda reward, k, count: reward)
    assert data["rollout_ids"][-2:] == [0, 0]
    data[name][-1] = value
    with pytest.raises(ValueError, match=message):
        slime.advantages(tc.methods.rloo(), trajectory_field="rollout_ids", group_field="groups")(arguments(), data)


def test_samples_of_several_rows(monkeypatch):
    """Rows of one number are one trajectory, in the order in which they lie; on several ranks they have none."""
    data = rollout_data([0, 1, 1, 2])
    slime.advantages(tc.methods.rloo())(arguments(), data)
    reward = [ROWS[i]["reward"] for i in range(3)]
    assert float(data["advantages"][0][0]) == pytest.approx(reward[0] - (reward[1] + reward[2]) / 2)
    monkeypatch.setattr(slime, "_of_all_ranks", lambda rows: ([rows, rows], 0))
    with pytest.raises(ValueError, match=r"sample_indices: expected other numbers .* 40 on ranks 0 and 1 \(row 4\)"):
        slime.advantages(tc.methods.rloo())(arguments(), rollout_data([0, 1, 2, 3]))


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
