"""``tokcredit train`` with rollouts of the real engine: what it learns, and the rows of every kind of exploration."""

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

import tiny
from tokcredit.adapters import vllm as adapter
from tokcredit.train import ObjectiveSettings, OptimizerSettings, ProbeSettings, SamplingSettings, Settings, tools
from tokcredit.train import tiny as tiny_model
from tokcredit.train.explorer import SamplingContext
from tokcredit.train.probes import Prober
from tokcredit.train.sampler import TransformersSampler
from tokcredit.train.scoring import score
from tokcredit.train.trainer import Trainer
from tokcredit.train.trees import Trees
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.usefixtures("engines_stay")


@pytest.fixture
def half(monkeypatch):
    """Accelerate keeps one precision for a process; this test has another."""
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})


def threes(folder, **changes):
    """A run in which a tiny random model learns to write threes."""
    tiny.model(tied=True).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    defaults = {
        "model": str(folder),
        "tasks": ("addition(digits=1)",),
        "reward": "tiny:threes",
        "steps": 12,
        "objective": ObjectiveSettings("grpo"),
        "sampling": SamplingSettings(sampler="vllm", prompts=4, max_tokens=8),
        "optimizer": OptimizerSettings(lr=3e-3, precision="bf16"),
    }
    return Settings(**(defaults | changes))


def test_trainer_learns_from_another_engine(half, tmp_path):
    """bf16 rollouts for a float32 model: the gap is measured, corrected unless told otherwise, and the reward rises."""
    trainer = Trainer(threes(tmp_path))
    steps = [trainer.step(number) for number in range(1, 13)]
    for explored, learnt, metrics in steps:
        prepared, batch = learnt.prepared, learnt.prepared.batch
        gap = batch.old_log_probs - explored.batch.rollout_log_probs
        torch.testing.assert_close(prepared.multiplier, gap.exp().clamp(max=2.0))
        assert 1e-5 < metrics["engine_gap"] < 0.1 and prepared.multiplier.unique().numel() > 10
        rows = [gap[a:b].abs().mean() for a, b in pairwise(batch.cu_seqlens.tolist())]
        assert metrics["engine_gap"] == pytest.approx(float(sum(rows) / len(rows)), rel=1e-4)
    rewards = [metrics["reward"] for _, _, metrics in steps]
    assert sum(rewards[-3:]) > 2 * sum(rewards[:3]) > 0


def test_weights_turn_draws_of_the_engine_into_draws_of_the_model():
    """The engine keeps old weights; weighted, its tokens are as frequent as under the new ones."""
    model, count = tiny.model(seed=3).eval(), 4000
    llm = adapter.engine(model, tiny.tokenizer(), dtype="float32", max_model_len=64, enforce_eager=True)
    sampler = adapter.VllmSampler(model, llm)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.2 * weight.std() * torch.randn(weight.shape, generator=g) if weight.numel() > 1 else 0
        truth = model(torch.tensor([[3, 4, 5]])).logits[0, -1].log_softmax(-1)
    torch.manual_seed(0)
    made = sampler.sample([[3, 4, 5]], count, 1, 1.0)
    batch = tc.Rollouts(
        made.tokens,
        made.cu_seqlens,
        torch.zeros(count, dtype=torch.int64),
        torch.zeros(count),
        old_log_probs=truth[made.tokens],
        rollout_log_probs=made.log_probs,
    )
    weights = tc.token_weights.importance_truncated(high=1e6)(batch, torch.zeros(count, 1)).double()

    def distance(of_each):
        frequencies = torch.zeros(16, dtype=torch.float64).index_add(0, made.tokens, of_each) / count
        return (frequencies - truth.double().exp()).abs().sum()

    assert distance(weights) < 0.06 < 0.12 < distance(torch.ones_like(weights)) < distance(1 / weights)


def test_chosen_weights_are_left_alone(half, tmp_path, monkeypatch):
    monkeypatch.setattr(
        adapter.VllmSampler, "of", lambda model, tokenizer, dtype: TransformersSampler(model, tokenizer)
    )

    def weights(*chosen, sampler="vllm"):
        objective = ObjectiveSettings("d3s", weights=chosen or None)
        sampling = SamplingSettings(sampler=sampler, prompts=4, max_tokens=8)
        return Trainer(threes(tmp_path, objective=objective, sampling=sampling)).objective.weights

    own = tc.methods.d3s().weights
    assert weights(sampler="transformers") == own and own
    assert weights() == (*own, tc.token_weights.importance_truncated())
    assert weights("importance_masked()") == (tc.token_weights.importance_masked(),)
    assert weights("with_credit()") == (tc.filters.nonzero_advantage(),)


def warmed(folder, text, steps, task, method, reward=None, **changes):
    """A float32 trainer of a model that has learnt its task in part, with heads of a size that the engine takes."""
    words = tiny_model.tokenizer(tools.WORDS)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    network = LlamaForCausalLM(config)
    tiny_model.warm(network, words, steps, 0.4, text, batch=32)
    network.save_pretrained(folder)
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
    folder, text = tmp_path_factory.mktemp("adding"), tiny_model.addition
    return warmed(folder, text, 80, "addition(digits=2)", "tempo", "tiny:variety", max_tokens=28)


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    folder = tmp_path_factory.mktemp("talking")
    return warmed(folder, tools.conversation, 150, "calculator(size=300)", "match_tir", max_tokens=16)


def desks(trainer, **sampling):
    """Two desks with other settings of sampling: of the engine, and of transformers."""
    settings = dataclasses.replace(
        trainer.settings, sampling=dataclasses.replace(trainer.settings.sampling, **sampling)
    )
    trainer.context.sampler.sync()
    for sampler in (trainer.context.sampler, TransformersSampler(trainer.model, trainer.tokenizer)):
        yield SamplingContext(settings, trainer.problems, trainer.tokenizer, sampler, trainer.ranks)


def same(a, b):
    """The two batches have the same rows, masks and evidence, NaN where the other has it."""
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
    prompts = [words(text).input_ids for text in ("47+85=", "11+22=", "93+48=")]
    ours, theirs = (context.sampler for context in desks(adding))

    def rows(sampler, temperature, stop=()):
        made = sampler.sample(prompts, 4, 20, temperature, stop)
        lengths = made.cu_seqlens.diff().tolist()
        return made.tokens.split(lengths), made.log_probs.split(lengths), made.finished.tolist()

    greedy = [words.convert_ids_to_tokens(row.tolist()) for row in rows(ours, 0.0)[0]]
    first, *_, last = greedy
    # Texts of one, two and three tokens, and one that the prompts begin, which is not counted.
    stop = ("".join(first[6:8]), "".join(last[3:6]), "=" + first[0], ">")
    found, expected = rows(ours, 0.0, stop), rows(theirs, 0.0, stop)
    assert all(map(torch.equal, found[0], expected[0])) and found[2] == expected[2] and all(found[2])
    assert len(found[0][0]) < len(first) and len(found[0][-1]) < len(last)
    torch.manual_seed(0)
    cut = 0
    for tokens, log_probs, finished in zip(*rows(ours, 1.0, stop), strict=True):
        pieces = words.convert_ids_to_tokens(tokens.tolist())
        complete = ["".join(pieces[:n]).endswith(stop) for n in range(1, len(pieces) + 1)]
        assert not any(complete[:-1]) and len(log_probs) == len(tokens)
        assert finished == (complete[-1] or pieces[-1] == "<end>") and (finished or len(tokens) == 20)
        cut += complete[-1]
    assert cut > 6


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
    ours, theirs = (context.sampler for context in desks(adding))
    prompt = [adding.tokenizer("47+85=").input_ids]
    for stop in (("<end>",), ("2<end>",), ("<unk>",)):
        rows = [sampler.sample(prompt, 1, 28, 0.0, stop) for sampler in (ours, theirs)]
        assert torch.equal(rows[0].tokens, rows[1].tokens) and torch.equal(rows[0].finished, rows[1].finished)


def test_conversations(talking):
    """The rows of transformers: calls, results between them, and answers."""
    made = []
    for context in desks(talking, temperature=0.0):
        explorer = type(talking.explorer)(context)
        made.append((explorer.explore(1), explorer.attempt(talking.problems.held_out[:20])))
    (ours, rewards), (theirs, expected) = made
    same(ours.batch, theirs.batch)
    assert ours.replies == theirs.replies and torch.equal(ours.finished, theirs.finished) and rewards == expected
    assert any(reply.count("</tool><result>") > 1 for reply in ours.replies)
    explored = talking.explorer.explore(2)
    assert (~explored.batch.response_mask).any() and len(set(explored.replies)) > 8
    drawn_by_the_model(talking, explored.batch)


def test_trees(adding):
    """Edges go on from token ids that the engine made before."""
    ours, theirs = (Trees(context).explore(1) for context in desks(adding, temperature=0.0, widths=(2, 2)))
    same(ours.batch, theirs.batch)
    assert ours.replies == theirs.replies and (~ours.batch.response_mask).any()
    drawn_by_the_model(adding, Trees(next(desks(adding, widths=(2, 2)))).explore(1).batch)


def test_probes(adding):
    """Greedy continuations and answers from inside rows are worth what transformers finds."""
    explored = adding.explorer.explore(1)
    batch = adding.learner.with_evidence(explored.batch, frozenset({"old_log_probs"}))
    required_inputs = frozenset({"state_values", "step_values", "answer_probs", "answer_confidences"})
    ours, theirs = (
        Prober(context, adding.learner.score).probe(required_inputs, batch, explored.problems, 1)
        for context in desks(adding, temperature=0.0)
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
    assert metrics["grad_norm"] > 0 and 0 < metrics["engine_gap"] < 1e-4


def one_rank(rank, settings, port, folder):
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    local = {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {name: str(value) for name, value in launched.items()} | local
    torch.set_num_threads(1)
    trainer = Trainer(settings)
    before = parameters_to_vector(trainer.model.parameters())
    trainer.step(1)
    after = parameters_to_vector(trainer.model.parameters())
    batch = trainer.explorer.explore(2).batch
    drawn_by_the_model(trainer, batch)
    torch.save((before, after, batch.group_ids, batch.tokens, trainer.evaluate()), f"{folder}/{rank}.pt")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def test_every_process_has_an_engine_of_its_own(tmp_path):
    """Each draws for its own prompts with the weights that all of them have after a step together."""
    settings = threes(tmp_path, optimizer=OptimizerSettings(lr=3e-3, precision="no"))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(one_rank, (settings, port, tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1]) and not torch.equal(*first[:2])
    assert first[2].tolist() == [0] * 8 + [2] * 8 and second[2].tolist() == [1] * 8 + [3] * 8
    assert not torch.equal(first[3], second[3]) and first[4] == second[4]
