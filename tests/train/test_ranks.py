import os
import re
import socket
import subprocess
import sys

import pytest
import tokcredit as tc
import torch
import torch.multiprocessing as mp
from tokcredit.train import CriticSettings, ObjectiveSettings, OptimizerSettings, SamplingSettings
from tokcredit.train.clock import Clock
from tokcredit.train.experiment import resolved
from tokcredit.train.folder import locked
from tokcredit.train.ranks import processes
from tokcredit.train.record import read_metrics
from tokcredit.train.scoring import left_padded
from tokcredit.train.trainer import Trainer


def batch(trainer):
    """Four groups of unequal lengths, one with equal rewards, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (16,), generator=generator)
    prompts = [trainer.tokenizer(f"{i}+{i + 1}=").input_ids for i in range(4) for _ in range(4)]
    return tc.Rollouts(
        torch.randint(3, 50, (int(lengths.sum()),), generator=generator),
        torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
        torch.arange(16) // 4,
        torch.tensor([1.0, 0, 0, 0, 1, 1, 0, 1, 1, 1, 1, 1, 0.5, 0, 1, 0]),
        extras={"prompt_tokens": left_padded(prompts, -1, torch.device("cpu"))[0]},
    )


def update(settings, rank, ranks):
    """Metrics and the gradient of a step, before it is scaled."""
    trainer, gradients = Trainer(resolved(settings)), []

    def keep(parameters, norm):
        gradients.append(torch.cat([p.grad.reshape(-1) for p in trainer.model.parameters()]))
        return gradients[-1].norm()

    trainer.accelerator.clip_grad_norm_ = keep
    whole = batch(trainer)
    # Entropies that are far apart, because methods rank by them.
    generator = torch.Generator().manual_seed(1)
    names = {"entropies", "values", "value_targets"} & (trainer.objective.required_inputs | {"entropies"})
    names |= {"rollout_log_probs"}
    drawn = {name: torch.rand(whole.num_tokens, generator=generator) for name in sorted(names)}
    mine = whole.with_inputs(**drawn).select(whole.group_ids % ranks == rank)
    learned = {}
    if trainer.reward_model:
        mine, learned = trainer.reward_model(mine)
    metrics = trainer.learner.update(mine, 1, Clock()).metrics
    assert len(gradients) == 1
    return metrics | learned, gradients[0]


def join(rank, port):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        ACCELERATE_USE_CPU="true",
        GLOO_SOCKET_IFNAME="lo",
    )
    torch.set_num_threads(1)


def one_rank(rank, runs, port, folder):
    join(rank, port)
    torch.save([update(settings, rank, 2) for settings in runs], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def one_rank_of_a_folder(rank, s, port, folder):
    """Whether a folder can be held, and what is said about an update to which only one rank contributes NaN."""
    join(rank, port)
    texts = []
    for name in ("held", "free", "free"):
        try:
            with locked(folder / name):
                texts.append(sorted(path.name for path in (folder / name).iterdir()))
                processes().wait_for_everyone()
        except ValueError as error:
            texts.append(str(error))
    trainer = Trainer(resolved(s))
    before = [p.detach().clone() for p in trainer.model.parameters()]
    whole = batch(trainer)
    mine = whole.select(whole.group_ids % 2 == rank)
    old, ends = trainer.learner.score(mine)[0], mine.end
    old[ends[2] - 1] = float("nan") if rank == 1 else 0.0
    done = trainer.learner.update(mine.with_inputs(old_log_probs=old), 1, Clock())
    same = all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    torch.save((texts, done.skipped, done.metrics["skipped_updates"], same), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def one_rank_of_pairs(rank, s, port, folder):
    """A step in which the second rank has no two responses with different rewards."""
    join(rank, port)
    trainer = Trainer(resolved(s))

    def rewards(problems, texts):
        return [float(i % 2 == 0 and rank == 0) for i in range(len(texts))]

    rewards.failures = lambda: 0
    trainer.context.rewards = rewards
    torch.save(trainer.step(1).metrics, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def one_rank_without_rewards(rank, runs, port, folder):
    """Steps in which no response of the second rank has a reward, and one in which its reward function fails."""
    join(rank, port)
    found = []
    for s in runs:
        trainer = Trainer(resolved(s))

        def rewards(problems, texts):
            return [float(i % 3 == 0) if rank == 0 else float("nan") for i in range(len(texts))]

        rewards.failures = lambda: 0
        trainer.context.rewards = rewards
        metrics = trainer.step(1).metrics
        found.append({name: x for name, x in metrics.items() if "seconds" not in name})

    def failing(problems, texts):
        if rank == 1:
            raise ValueError("no reward")
        return [0.5] * len(texts)

    trainer.context.rewards = failing
    errors = []
    for call in (trainer.measure, lambda: trainer.step(2)):
        try:
            call()
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
    torch.save((found, errors), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.slow
def test_two_ranks_equal_one(settings, tmp_path):
    methods = ("tempo", "ba", "d3s", "pods")
    runs = [settings(objective=ObjectiveSettings(method, terms=("entropy(0.01)",))) for method in methods]
    methods += ("ppo", "ppo", "prime")
    runs += [settings("ppo", critic=CriticSettings(critic)) for critic in ("head", "initial")]
    runs += [settings("prime", reward_model="initial")]
    mp.spawn(one_rank, (runs, free_port(), tmp_path), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for method, s, (first, p0), (second, p1) in zip(methods, runs, *ranks, strict=True):
        metrics, gradient = update(s, 0, 1)
        assert first == second and torch.equal(p0, p1), method
        assert first.keys() == metrics.keys()
        for name in metrics:
            assert first[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-6), (method, name)
        assert (p0 - gradient).norm() < 1e-4 * gradient.norm(), method


@pytest.mark.slow
def test_a_rank_without_pairs(settings, tmp_path):
    s = settings("dpo", sampling=SamplingSettings(prompts=2, group=2, max_tokens=6), reward=None)
    mp.spawn(one_rank_of_pairs, (s, free_port(), tmp_path), nprocs=2)
    for metrics in (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)):
        assert metrics["pairs"] == metrics["pairs_skipped"] == 1 and metrics["grad_norm"] > 0
        assert metrics["length_mean"] == metrics["tokens"] / 2 and metrics["rows_with_gradient_fraction"] == 1
        assert metrics["reward_mean"] == 0.25


@pytest.mark.slow
def test_a_rank_without_rewards(settings, tmp_path):
    methods = ("grpo", "remax", "rae", "lenvm", "igpo")
    runs = [settings(method) for method in methods]
    runs += [settings("ppo", critic=CriticSettings("head")), settings("prime", reward_model="initial")]
    mp.spawn(one_rank_without_rewards, (runs, free_port(), tmp_path), nprocs=2)
    (first, other), (second, own) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for s, metrics, again in zip(runs, first, second, strict=True):
        assert metrics.keys() == again.keys(), s.objective.method
        assert metrics == pytest.approx(again, nan_ok=True) and metrics["grad_norm"] > 0, s.objective.method
        assert metrics["reward_mean"] == 0.5
    assert own == ["ValueError: no reward"] * 2
    assert other == ["RuntimeError: expected no error in any process, got process 1: " + own[0]] * 2


@pytest.mark.slow
def test_two_ranks_hold_one_folder_and_skip_together(settings, tmp_path):
    optimizer = OptimizerSettings(lr=1e-3, micro_batch=3, precision="no", on_nonfinite="skip")
    s = settings("grpo", optimizer=optimizer)
    with locked(tmp_path / "held"):
        mp.spawn(one_rank_of_a_folder, (s, free_port(), tmp_path), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for texts, skipped, count, same in ranks:
        refused, *held = texts
        assert f"held, which process {os.getpid()} on {socket.gethostname()} uses" in refused
        assert held == [[".lock", ".owner"]] * 2
        assert len(skipped) == count == 1 and same
    assert not (tmp_path / "free").exists()
    assert ranks[0][1] == ranks[1][1]
    assert re.search(r"loss nan and gradient norm nan in process 1: row 2 at token \d+$", ranks[0][1][0])


@pytest.mark.slow
def test_a_launched_run(settings, tmp_path):
    output = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    command += ["-m", "tokcredit", "train", "--model", "tiny(steps=0)"]
    command += ["--tasks", "addition(digits=1)", "--reward", "uniform:digest", "--prompts", "4", "--group", "3"]
    command += ["--max-tokens", "5", "--steps", "3", "--eval-problems", "4", "--output", str(output)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = read_metrics(output)
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert 12 <= lines[1]["tokens"] <= 60 and lines[1]["grad_norm"] > 0
    assert "held-out reward after" in done.stdout
