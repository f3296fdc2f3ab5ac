"""``tokcredit train`` with rollouts of the real engine: weights that correct for it, and every kind of rollout."""

import dataclasses
import os
import socket
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import tokcredit as tc
import torch
import torch.multiprocessing as mp
from accelerate.state import AcceleratorState
from torch.nn.utils import parameters_to_vector

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
pytest.importorskip("vllm", reason="vLLM is not installed; make test-vllm")
sys.path.insert(0, str(Path(__file__).parent))

import markov
import tiny
from tokcredit.adapters import vllm as adapter
from tokcredit.train import ObjectiveSettings, OptimizerSettings, ProbeSettings, SamplingSettings, Settings, tools
from tokcredit.train import tiny as tiny_model
from tokcredit.train.probes import Prober
from tokcredit.train.rollout_collection import SamplingContext
from tokcredit.train.sampler import TransformersSampler
from tokcredit.train.scoring import score
from tokcredit.train.trainer import Trainer
from tokcredit.train.trees import Trees

pytestmark = pytest.mark.usefixtures("engines_stay")


@pytest.fixture
def half(monkeypatch):
    """Accelerate keeps one precision for a process; this test has another."""
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})


def settings_of(folder, **changes):
    """A run of a tiny random model with the real engine."""
    tiny.model(tied=True).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    defaults = {
        "model": str(folder),
        "tasks": ("addition(digits=1)",),
        "reward": "tiny:variety",
        "steps": 2,
        "objective": ObjectiveSettings("grpo"),
        "sampling": SamplingSettings(sampler="vllm", prompts=4, max_tokens=8),
        "optimizer": OptimizerSettings(lr=3e-3, precision="bf16"),
    }
    return Settings(**(defaults | changes))


def test_trainer_corrects_for_another_engine(half, tmp_path):
    """bf16 rollouts for a float32 model: the gap is measured, and its weights multiply the loss."""
    trainer = Trainer(settings_of(tmp_path))
    for number in (1, 2):
        collection, update, metrics = trainer.step(number)
        prepared, batch = update.prepared, update.prepared.batch
        gap = batch.old_log_probs - collection.batch.rollout_log_probs
        torch.testing.assert_close(prepared.multiplier, gap.exp().clamp(max=2.0))
        assert prepared.multiplier.unique().numel() > 10, "the two engines agree to the bit"
        rows = [gap[a:b].abs().mean() for a, b in pairwise(batch.cu_seqlens.tolist())]
        assert metrics["rollout_log_prob_gap_mean"] == pytest.approx(float(sum(rows) / len(rows)), rel=1e-4)
        assert 0 < metrics["rollout_log_prob_gap_mean"] < 0.5
        assert metrics["mismatch_kl"] == pytest.approx(-gap.double().mean().item(), rel=1e-4, abs=1e-9)
        weights = prepared.multiplier.double()
        ess = weights.sum() ** 2 / (weights**2).sum() / len(weights)
        assert metrics["mismatch_ess"] == pytest.approx(ess.item(), rel=1e-6) and ess < 1


def test_weights_turn_draws_of_the_engine_into_draws_of_the_model():
    """The engine keeps old weights; weighted, its tokens are as frequent as under the new ones, to six deviations."""
    model, count = tiny.model(seed=3).eval(), 4000
    llm = adapter.engine(model, tiny.tokenizer(), dtype="float32", max_model_len=64, enforce_eager=True)
    sampler = adapter.VllmSampler(model, llm)
    g = torch.Generator().manual_seed(1)

    @torch.no_grad()
    def probabilities():
        return model(torch.tensor([[3, 4, 5]])).logits[0, -1].double().softmax(-1)

    old = probabilities()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.4 * weight.std() * torch.randn(weight.shape, generator=g) if weight.numel() > 1 else 0
    new = probabilities()
    torch.manual_seed(0)
    made = sampler.sample([[3, 4, 5]], count, 1, 1.0)
    batch = tc.Rollouts(
        made.tokens,
        made.cu_seqlens,
        torch.zeros(count, dtype=torch.int64),
        torch.zeros(count),
        old_log_probs=new.log().float()[made.tokens],
        rollout_log_probs=made.log_probs,
    )
    weights = tc.token_weights.importance(high=1e6)(batch, torch.zeros(count, 1)).double()
    frequencies = torch.zeros(16, dtype=torch.float64).index_add(0, made.tokens, weights) / count
    deviation = ((new.square() / old - new.square()) / count).sqrt()
    assert ((frequencies - new).abs() < 6 * deviation + 1e-5).all()
    assert ((old - new).abs() > 20 * deviation).any(), "unweighted draws would pass too"


def test_chosen_token_weights_are_left_alone(half, tmp_path, monkeypatch):
    monkeypatch.setattr(
        adapter.VllmSampler, "of", lambda model, tokenizer, dtype: TransformersSampler(model, tokenizer)
    )

    def built(method, *chosen, sampler="vllm"):
        objective = ObjectiveSettings(method, token_weights=chosen or None)
        sampling = SamplingSettings(sampler=sampler, prompts=4, max_tokens=8)
        return Trainer(settings_of(tmp_path, objective=objective, sampling=sampling)).objective.token_weights

    own = tc.methods.tw_grpo().token_weights
    assert built("tw_grpo", sampler="transformers") == own and own
    assert built("tw_grpo") == (*own, tc.token_weights.tis())
    assert built("tw_grpo", "mis()") == (tc.token_weights.mis(),)
    assert built("tw_grpo", "tw_grpo") == own


def trainer_of(folder, table, task, method, reward=None, **changes):
    """A float32 trainer of a model that follows a table."""
    words = tiny_model.tokenizer(tools.WORDS)
    markov.model(words, table).save_pretrained(folder)
    words.save_pretrained(folder)
    settings = Settings(
        model=str(folder),
        tasks=(task,),
        reward=reward,
        steps=1,
        objective=ObjectiveSettings(method),
        sampling=SamplingSettings(sampler="vllm", prompts=4, group=4, **changes),
        probes=ProbeSettings(
            continuations=3,
            interval=3,
            below=0.95,
            step_end=";",
            text=">",
            answers=2,
            answer_tokens=4,
            answer_temperature=0.0,
        ),
        optimizer=OptimizerSettings(lr=1e-3, precision="no"),
    )
    return Trainer(settings)


@pytest.fixture(scope="module")
def adding(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adding")
    return trainer_of(folder, markov.ADDING, "addition(digits=2)", "tempo", "tiny:variety", max_tokens=28)


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    folder = tmp_path_factory.mktemp("talking")
    return trainer_of(folder, markov.TALKING, "calculator(size=300)", "match_tir", max_tokens=16)


class Greedy:
    """A sampler that takes the likeliest token at any temperature, so that two samplers can be compared."""

    def __init__(self, sampler):
        self._sampler = sampler

    def __getattr__(self, name):
        return getattr(self._sampler, name)

    def sample(self, prompts, count, max_tokens, temperature, stop=()):
        return self._sampler.sample(prompts, count, max_tokens, 0.0, stop)


def contexts(trainer, greedy=False, **sampling):
    """Sampling contexts with other settings: of the engine, and of transformers."""
    settings = dataclasses.replace(
        trainer.settings, sampling=dataclasses.replace(trainer.settings.sampling, **sampling)
    )
    trainer.context.sampler.sync()
    for sampler in (trainer.context.sampler, TransformersSampler(trainer.model, trainer.tokenizer)):
        chosen = Greedy(sampler) if greedy else sampler
        yield SamplingContext(settings, trainer.problems, trainer.tokenizer, chosen, trainer.ranks)


def same(a, b):
    """The two batches have the same rows, masks and inputs, NaN where the other has it."""
    for name in ("tokens", "begin", "end", "group_ids", "rewards", "response_mask", "rollout_log_probs"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), msg=name)
    assert a.extras.keys() == b.extras.keys()
    for name, value in a.extras.items():
        torch.testing.assert_close(value, b.extras[name], equal_nan=True, msg=name)


def drawn_by_the_model(trainer, batch):
    """The log-probs that came with the rows are the model's, with all that stands before in sight."""
    with torch.no_grad():
        log_probs, _ = score(trainer.model, batch)
    torch.testing.assert_close(batch.rollout_log_probs, log_probs, rtol=0, atol=1e-4)
    assert (log_probs[batch.response_mask] < -0.1).float().mean() > 0.05


def test_rows_stop_at_texts(adding):
    """With the token that completes one, be it drawn or greedy; greedy rows are those of transformers."""
    words = adding.tokenizer
    prompts = [words(text).input_ids for text in ("47+85", "11+22", "93+48")]
    ours, theirs = (context.sampler for context in contexts(adding))

    def rows(sampler, temperature, stop=()):
        made = sampler.sample(prompts, 4, 20, temperature, stop)
        lengths = made.cu_seqlens.diff().tolist()
        return made.tokens.split(lengths), made.log_probs.split(lengths), made.finished.tolist()

    # Texts of one, two and three tokens. The prompts begin "56" and "23", which is not counted.
    stop = ("23", "901", "56", ">")
    found, expected = rows(ours, 0.0, stop), rows(theirs, 0.0, stop)
    assert all(map(torch.equal, found[0], expected[0])) and found[2] == expected[2] and all(found[2])
    texts = ["".join(words.convert_ids_to_tokens(row.tolist())) for row in found[0]]
    assert texts[::4] == ["678901", "3456", "901"]
    torch.manual_seed(0)
    cut = 0
    for tokens, log_probs, finished in zip(*rows(ours, 1.0, stop), strict=True):
        pieces = words.convert_ids_to_tokens(tokens.tolist())
        complete = ["".join(pieces[:n]).endswith(stop) for n in range(1, len(pieces) + 1)]
        assert not any(complete[:-1]) and len(log_probs) == len(tokens)
        assert finished == (complete[-1] or pieces[-1] == "<end>") and (finished or len(tokens) == 20)
        cut += complete[-1]
    assert cut > 0


def test_more_prompts_than_the_engine_reads_at_once(adding):
    """Some are then read in parts, between which nothing is drawn."""
    sampler = adding.context.sampler
    prompt = adding.tokenizer("47+85=").input_ids
    prompts = [[3 + i % 7, *prompt * 6] for i in range(160)]
    runs = []
    for seed in (0, 0, 1):
        sampler.sync()
        torch.manual_seed(seed)
        runs.append(sampler.sample(prompts, 2, 3, 1.0))
    assert sum(map(len, prompts)) > 4096 and len(runs[0].finished) == 320
    assert torch.equal(runs[0].tokens, runs[1].tokens) and not torch.equal(runs[0].tokens, runs[2].tokens)


def test_special_tokens_are_text_to_stop_at(adding):
    ours, theirs = (context.sampler for context in contexts(adding))
    words = adding.tokenizer
    for prompt, stop, expected in (
        ("a", "<end>", ["b", "c", "<end>"]),
        ("a", "c<end>", ["b", "c", "<end>"]),
        ("d", "<unk>", ["<unk>"]),
        ("d", "<unk>a", ["<unk>", "a"]),
    ):
        made = [sampler.sample([words(prompt).input_ids], 1, 28, 0.0, (stop,)) for sampler in (ours, theirs)]
        for rows in made:
            assert words.convert_ids_to_tokens(rows.tokens.tolist()) == expected and rows.finished.all()


def test_conversations(talking):
    """The rows of transformers: calls, and results between them."""
    made = []
    for context in contexts(talking, greedy=True):
        collector = type(talking.rollout_collector)(context)
        made.append((collector.collect(1), collector.attempt(talking.problems.held_out[:20])))
    (ours, rewards), (theirs, expected) = made
    same(ours.batch, theirs.batch)
    assert ours.responses == theirs.responses and torch.equal(ours.finished, theirs.finished) and rewards == expected
    assert all(text.startswith("<tool>add(1,5)</tool><result>6</result><tool>add(1,5)") for text in ours.responses)
    collection = talking.rollout_collector.collect(2)
    assert (~collection.batch.response_mask).any() and len(set(collection.responses)) > 1
    drawn_by_the_model(talking, collection.batch)


def test_trees(adding):
    """Edges go on from token ids that the engine made before."""
    ours, theirs = (Trees(context).collect(1) for context in contexts(adding, greedy=True, widths=(2, 2)))
    same(ours.batch, theirs.batch)
    assert ours.responses == theirs.responses and (~ours.batch.response_mask).any()
    drawn_by_the_model(adding, Trees(next(contexts(adding, widths=(2, 2)))).collect(1).batch)


def test_probes(adding):
    """Greedy continuations and answers from inside rows have the values that transformers finds."""
    collection = adding.rollout_collector.collect(1)
    batch = adding.learner.with_inputs(collection.batch, frozenset({"old_log_probs"}))
    required_inputs = frozenset({"state_values", "step_values", "answer_probs", "answer_confidences"})
    ours, theirs = (
        Prober(context, adding.learner.score).probe(required_inputs, batch, collection.problems, 1)
        for context in contexts(adding, greedy=True)
    )
    assert ours.keys() == required_inputs
    for name in required_inputs:
        torch.testing.assert_close(ours[name], theirs[name], equal_nan=True, rtol=1e-3, atol=1e-4)
        found = ours[name][~ours[name].isnan()]
        assert found.min() < found.max(), name


@pytest.mark.parametrize("method", ["spo_chain", "spo_tree", "vineppo", "spae"])
def test_methods_that_ask_inside_rows_take_a_step(adding, method, monkeypatch):
    llm = adding.context.sampler._llm
    monkeypatch.setattr(adapter.VllmSampler, "of", lambda model, *_: adapter.VllmSampler(model, llm))
    sampling = dataclasses.replace(adding.settings.sampling, widths=(3, 2))
    trainer = Trainer(dataclasses.replace(adding.settings, sampling=sampling, objective=ObjectiveSettings(method)))
    metrics = trainer.step(1).metrics
    assert metrics["grad_norm"] > 0 and metrics["rollout_log_prob_gap_mean"] < 1e-4


def one_rank(rank, settings, port, folder):
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    local = {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {name: str(value) for name, value in launched.items()} | local
    torch.set_num_threads(1)
    trainer = Trainer(settings)
    before = parameters_to_vector(trainer.model.parameters())
    trainer.step(1)
    after = parameters_to_vector(trainer.model.parameters())
    batch = trainer.rollout_collector.collect(2).batch
    drawn_by_the_model(trainer, batch)
    torch.save((before, after, batch.group_ids, batch.tokens, trainer.evaluate()), f"{folder}/{rank}.pt")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def test_every_process_has_an_engine_of_its_own(tmp_path):
    """Each draws for its own prompts with the weights that all of them have after a step together."""
    settings = settings_of(tmp_path, optimizer=OptimizerSettings(lr=3e-3, precision="no"))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(one_rank, (settings, port, tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1]) and not torch.equal(*first[:2])
    assert first[2].tolist() == [0] * 8 + [2] * 8 and second[2].tolist() == [1] * 8 + [3] * 8
    assert not torch.equal(first[3], second[3]) and first[4] == second[4]
