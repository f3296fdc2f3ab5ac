"""A process that fails by itself leaves no other waiting, and a process without a row of a step takes part in it."""

import copy
import functools
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokcredit as tc
import torch
from meeting import in_both
from tokcredit.files import WriteError
from tokcredit.train import checkpoint, collectors, models, policy, tiny
from tokcredit.train.baselines import Roles
from tokcredit.train.example_trainer import ExampleTrainer
from tokcredit.train.fixed_inputs import FixedInputs
from tokcredit.train.judging import RewardError
from tokcredit.train.learner import Learner
from tokcredit.train.lengths import LengthHead, LengthLearner
from tokcredit.train.ranks import Ranks
from tokcredit.train.rollout_collection import RolloutCollection, RolloutCollector, SamplingContext
from tokcredit.train.scoring import left_padded
from tokcredit.train.settings import PrivilegedSettings
from tokcredit.train.teacher import PrivilegedPrompts

NAN = float("nan")
ALONE = Ranks(SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu")))


def test_an_error_of_one_process_is_raised_in_all(monkeypatch):
    def work(ranks):
        if ranks.index == 1:
            raise KeyError("a word")
        return ranks.index

    other, own = in_both(monkeypatch, lambda ranks: ranks.together(lambda: work(ranks)))
    assert isinstance(own, KeyError) and own.args == ("a word",)
    assert isinstance(other, RuntimeError)
    assert str(other) == "expected no error in any process, got process 1: KeyError: 'a word'"
    assert in_both(monkeypatch, lambda ranks: ranks.together(lambda: ranks.index)) == [0, 1]


@functools.cache
def collection(outcomes):
    """Four responses to one problem, a row each."""
    rewards, count = torch.tensor(outcomes), len(outcomes)
    zeros = torch.zeros(count, dtype=torch.long)
    batch = tc.Rollouts(torch.arange(count), torch.arange(count + 1), zeros, rewards.nan_to_num())
    texts = [str(i) for i in range(count)]
    return RolloutCollection(texts, texts, batch, rewards, zeros, zeros == 0, rewards.isnan())


@pytest.mark.parametrize("rewards", [(1.0, NAN, 0.0, 1.0), (1.0, 0.0, 0.0, 1.0)])
def test_rewards_are_judged_over_all_processes(monkeypatch, rewards):
    nothing = (NAN,) * 4
    some, none = in_both(monkeypatch, lambda ranks: collection((rewards, nothing)[ranks.index]).judged(ranks))
    left = [x for x in rewards if x == x]
    assert some.outcomes.tolist() == some.batch.rewards.tolist() == left and len(some.problems) == len(left)
    assert none.batch.num_rows == len(none.outcomes) == len(none.finished) == len(none.responses) == 0
    for error in in_both(monkeypatch, lambda ranks: collection(nothing).judged(ranks)):
        assert isinstance(error, RewardError) and "of at least one response" in str(error)


def failing(ranks, *_):
    if ranks.index == 1:
        raise RewardError("reward: a message")
    return [0.5]


def refused(found):
    other, own = found
    assert isinstance(own, RewardError) and str(own) == "reward: a message"
    assert isinstance(other, RuntimeError) and "process 1: RewardError: reward: a message" in str(other)


def test_collection_and_evaluation_fail_together(monkeypatch):
    class Collector(RolloutCollector):
        def _collect(self, number):
            return failing(self._context.ranks)

    def context(ranks):
        made = SamplingContext.__new__(SamplingContext)
        made.ranks, made.settings = ranks, SimpleNamespace(eval_problems=2)
        made.problems, made.sampler = SimpleNamespace(measured=range), SimpleNamespace(sync=lambda: None)
        return made

    refused(in_both(monkeypatch, lambda ranks: Collector(context(ranks)).collect(1)))
    refused(in_both(monkeypatch, lambda ranks: context(ranks).evaluate(lambda chosen: failing(ranks))))


def test_inputs_of_examples_fail_together(monkeypatch):
    examples = [SimpleNamespace(prompt=[1], responses=[], group=0)] * 4
    monkeypatch.setattr("tokcredit.train.fixed_inputs.batch_of", lambda *_: None)

    def compute(ranks):
        def collect(some, batch):
            failing(ranks)
            return unequal().select([]).with_inputs(ref_log_probs=torch.zeros(0))

        FixedInputs(frozenset({"ref_log_probs"}), examples, None).compute([[0, 1, 2, 3]], collect, ranks)

    refused(in_both(monkeypatch, compute))


def test_checkpoints_fail_together(monkeypatch, tmp_path):
    def save(ranks):
        accelerator = ranks._accelerator

        def save_state(path, safe_serialization):
            (tmp_path / "checkpoint.new").mkdir(exist_ok=True)
            failing(ranks)

        accelerator.save_state = accelerator.load_state = lambda path, safe_serialization=None: save_state(path, None)
        checkpoint.save(accelerator, tmp_path, 3)

    def load(ranks):
        ranks._accelerator.load_state = lambda path: failing(ranks)
        checkpoint.load(ranks._accelerator, tmp_path)

    refused(in_both(monkeypatch, save))
    assert not list(tmp_path.glob("checkpoint*"))
    (tmp_path / "checkpoint-000003").mkdir()
    refused(in_both(monkeypatch, load))


def test_an_earlier_checkpoint_that_cannot_be_removed(monkeypatch, tmp_path):
    def stuck(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(39, "Directory not empty", str(path))

    def save(ranks):
        ranks._accelerator.save_state = lambda path, safe_serialization: Path(path).mkdir(exist_ok=True)
        checkpoint.save(ranks._accelerator, tmp_path, 3)

    def load(ranks):
        ranks._accelerator.load_state = lambda path: None
        checkpoint.load(ranks._accelerator, tmp_path)

    (tmp_path / "checkpoint-000002").mkdir()
    monkeypatch.setattr(checkpoint.shutil, "rmtree", stuck)
    own, other = in_both(monkeypatch, save)
    assert isinstance(own, WriteError) and "checkpoint-000003" in str(own) and isinstance(other, RuntimeError)
    own, other = in_both(monkeypatch, load)
    assert isinstance(own, OSError) and isinstance(other, RuntimeError) and "process 0: OSError" in str(other)


@pytest.mark.parametrize("broken", [0, 1])
def test_models_that_one_process_cannot_load(monkeypatch, broken):
    def load(name):
        if threading.current_thread().name == f"rank {broken}":
            raise ValueError("model: expected a folder")
        return "a network", "a tokenizer"

    monkeypatch.setattr(models, "load", load)
    settings = SimpleNamespace(model="a model", adapter=None)
    found = in_both(monkeypatch, lambda ranks: policy.load(settings, ranks._accelerator))
    assert isinstance(found[broken], ValueError) and isinstance(found[1 - broken], RuntimeError)


def test_the_objective_refuses_rows_in_all_processes(monkeypatch):
    def prepare(ranks):
        learner = Learner.__new__(Learner)
        learner.state, learner._ranks = None, ranks
        learner._objective = SimpleNamespace(compares_groups=False, prepare=lambda *_, **__: failing(ranks))
        return learner._prepare(None, 0.0)

    refused(in_both(monkeypatch, prepare))


@pytest.mark.parametrize("update", [True, False])
def test_passes_fail_together(monkeypatch, update):
    """For example where the memory of one process is full."""
    optimizer = SimpleNamespace(epochs=1, minibatches=1)

    def run(ranks):
        learner = Learner.__new__(Learner)
        learner._ranks, learner._settings = ranks, SimpleNamespace(optimizer=optimizer, seed=0)
        learner._objective = SimpleNamespace(couples_rows=False)
        learner._metrics_of_nothing = lambda prepared: {}
        learner._micro_batches = lambda prepared: [np.array([0, 1])]
        learner._prepare = learner._over_ranks = lambda prepared, *_: prepared
        learner._pass = lambda *_: failing(ranks)
        prepared = SimpleNamespace(batch=unequal(), select=lambda rows: None)
        return learner._optimize(prepared, 1, None) if update else learner.measure(prepared)

    refused(in_both(monkeypatch, run))


def unequal():
    """A row of six tokens and one of two, packed."""
    old, engine = torch.rand(2, 8, generator=torch.Generator().manual_seed(0)).log()
    return tc.Rollouts(
        torch.arange(8),
        torch.tensor([0, 6, 8]),
        torch.tensor([0, 1]),
        torch.tensor([1.0, 0.0]),
        old_log_probs=old,
        rollout_log_probs=engine,
    )


@pytest.mark.parametrize("old", [True, False])
def test_the_mismatch_of_unequal_processes(monkeypatch, old):
    batch = unequal()
    objective = tc.mix("grpo", token_weights=(tc.token_weights.tis(),)) if old else tc.methods.grpo()
    log_probs = batch.old_log_probs
    whole = batch if old else batch.with_inputs(old_log_probs=None)

    def measured(ranks, rows):
        learner = Learner.__new__(Learner)
        learner._objective, learner._ranks = objective, ranks
        part = whole.select(rows)
        tokens = batch.selection(rows).tokens
        return learner._mismatch(SimpleNamespace(batch=part), log_probs[tokens])

    alone = measured(ALONE, [0, 1])
    first, second = in_both(monkeypatch, lambda ranks: measured(ranks, [ranks.index]))
    assert first == second == pytest.approx(alone, rel=1e-6) and ("mismatch_ess" in alone) == old
    assert alone["mismatch_log_ppl_diff_max"] > alone["mismatch_log_ppl_diff_min"]


def test_the_length_head_learns_alike_from_unequal_processes(monkeypatch):
    batch = unequal()
    torch.manual_seed(0)
    head = LengthHead(3)
    batch = batch.with_inputs(hidden_states=torch.randn(batch.num_tokens, 3))

    def learned(ranks, rows):
        learner = LengthLearner(copy.deepcopy(head), 0.9, ranks, passes=1)
        loss = learner.update(batch.select(rows), torch.ones(len(rows), dtype=torch.bool))
        return loss, torch.cat([p.grad.reshape(-1) for p in learner.head.parameters()])

    loss, gradient = learned(ALONE, [0, 1])
    for found, own in in_both(monkeypatch, lambda ranks: learned(ranks, [ranks.index])):
        assert found == pytest.approx(loss, rel=1e-6)
        torch.testing.assert_close(own, gradient)


def test_the_length_of_unequal_examples(monkeypatch):
    batch = unequal()
    rows = ([0, 0, 0, 0], [1])  # a group of four rows and a single row

    def step(ranks):
        trainer = SimpleNamespace(
            ranks=ranks,
            _chosen=lambda number: [0, 1],
            _batch=lambda mine: batch.select(rows[ranks.index]),
            learner=SimpleNamespace(update=lambda *_: SimpleNamespace(metrics={}), observe=lambda metrics: None),
            _path=SimpleNamespace(stem="file"),
            _examples=[None, None],
        )
        return ExampleTrainer.step(trainer, 1).metrics

    a, b = batch.lengths.tolist()
    for metrics in in_both(monkeypatch, step):
        assert metrics["length_mean"] == (4 * a + b) / 5 and metrics["tokens"] == 4 * a + b


def test_what_a_process_without_rows_computes():
    ids, real = left_padded([], -1, torch.device("cpu"))
    assert ids.shape == real.shape == (0, 0) and ids.dtype == torch.int64
    context = SamplingContext.__new__(SamplingContext)
    context.tokenizer = tiny.tokenizer()
    assert context.texts(torch.zeros(0, dtype=torch.long), torch.zeros(1, dtype=torch.long)) == []
    policy = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=5)))
    nothing = collectors.collect({"hidden_states", "old_log_probs"}, unequal().select([]), 4, policy)
    assert nothing.input("hidden_states").shape == (0, 5) and nothing.input("old_log_probs").shape == (0,)
    told = PrivilegedPrompts(PrivilegedSettings("answer"), lambda problem: [1], None)
    empty = unequal().with_inputs(prompt_tokens=torch.zeros(2, 3, dtype=torch.int64)).select([])
    assert told(empty, [], []).input("teacher_mask").shape == (0,)
    tasks = [SimpleNamespace(task="a")]
    assert Roles(tasks, ALONE).of(unequal().select([]), []).shape == (0,)
