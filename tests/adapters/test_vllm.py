"""The real engine on a tiny model, against transformers on the same tokens."""

import os
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokcredit as tc
import torch

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
pytest.importorskip("vllm", reason="vLLM is not installed; make test-vllm")
sys.path.insert(0, str(Path(__file__).parent))

import recipes
import tiny
from tokcredit.adapters import vllm as adapter
from vllm import SamplingParams
from vllm.logprobs import FlatLogprobs
from vllm.outputs import CompletionOutput, RequestOutput

pytestmark = pytest.mark.usefixtures("engines_stay")
PROMPTS = [[3, 4, 5], [3, 6, 7, 8], [3, 9]]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def pair(request):
    """A model and an engine with its weights."""
    model = tiny.model(tied=request.param).eval()
    yield model, adapter.engine(model, tiny.tokenizer(), dtype="float32", max_model_len=64, enforce_eager=True)


def expected(model, prompts, made, count, temperature=1.0):
    """Log-probs by transformers of the same tokens, packed."""
    out, edges = [], made.cu_seqlens.tolist()
    for row, (begin, end) in enumerate(pairwise(edges)):
        prompt = torch.tensor(prompts[row // count])
        ids = torch.cat([prompt, made.tokens[begin:end]])
        with torch.no_grad():
            logits = model(ids[None]).logits[0, len(prompt) - 1 : -1] / temperature
        out.append(logits.log_softmax(-1).gather(1, made.tokens[begin:end, None])[:, 0])
    return torch.cat(out)


@torch.no_grad()
def perturb(model, seed):
    g = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight += 0.3 * weight.std() * torch.randn(weight.shape, generator=g) if weight.numel() > 1 else 0


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_the_sampled_distribution(pair, temperature):
    model, llm = pair
    sampler = adapter.VllmSampler(model, llm)
    sampler.sync()
    made = sampler.sample(PROMPTS, 4, 12, temperature)
    assert made.cu_seqlens.numel() == 13 and made.tokens.unique().numel() > 3
    torch.testing.assert_close(made.log_probs, expected(model, PROMPTS, made, 4, temperature), rtol=0, atol=1e-4)
    ends = made.tokens[made.cu_seqlens[1:] - 1] == 1
    assert torch.equal(made.finished, ends), "an end token is part of the row that it ends"


def test_update_reaches_every_layer(pair):
    """After each update the engine's log-probs are those of the new weights, and no longer those of the old."""
    model, llm = pair
    sampler = adapter.VllmSampler(model, llm)
    for seed in (1, 2):
        before = sampler.sample(PROMPTS, 4, 12, 1.0)
        perturb(model, seed)
        sampler.sync()
        made = sampler.sample(PROMPTS, 4, 12, 1.0)
        torch.testing.assert_close(made.log_probs, expected(model, PROMPTS, made, 4), rtol=0, atol=1e-4)
        assert (before.log_probs - expected(model, PROMPTS, before, 4)).abs().max() > 0.05, "the weights did not move"


def test_of_two_engines_on_a_gpu_the_first_sleeps_once_it_is_made(monkeypatch):
    """vLLM lets one engine of a process sleep, here without a GPU: what the engines are asked for is recorded."""
    used, made, slept = [0], [], []

    class Engine:
        def __init__(self, model, words, **settings):
            made.append(settings)
            used[0] += settings["enable_sleep_mode"]
            config = SimpleNamespace(logprobs_mode="processed_logprobs", **settings)
            state = SimpleNamespace(model_config=config)
            self.llm_engine = SimpleNamespace(vllm_config=state, is_sleeping=lambda: self in slept)

        def sleep(self, level):
            slept.append(self)

    allocator = SimpleNamespace(get_current_usage=lambda: used[0])
    monkeypatch.setattr("vllm.device_allocator.get_mem_allocator_instance", lambda: allocator)
    monkeypatch.setattr(adapter, "engine", Engine)
    model = SimpleNamespace(device=torch.device("cuda"))
    sampler = adapter.VllmSampler.of(model, None, torch.bfloat16)
    teacher = adapter.VllmTeacher.of(model, None, torch.bfloat16, top_k=3)
    assert slept == [sampler._llm] and [x["enable_sleep_mode"] for x in made] == [True, False]
    assert [x["gpu_memory_utilization"] for x in made] == [0.4, 0.2] and made[1]["max_logprobs"] == 3
    with adapter.awake(teacher._llm):
        assert slept == [sampler._llm]


def test_an_engine_that_can_sleep_is_awake_only_when_used(pair, monkeypatch):
    """Its calls are real, and so is what the engine refuses while it sleeps; only a CPU's memory stays where it is."""
    model, llm = pair
    calls = []

    def recorded(name):
        real = getattr(llm, name)
        monkeypatch.setattr(llm, name, lambda **settings: (calls.append((name, settings)), real(**settings)))

    recorded("wake_up")
    recorded("sleep")
    monkeypatch.setattr(llm.llm_engine.vllm_config.model_config, "enable_sleep_mode", True)
    sampler = adapter.VllmSampler(model, llm)
    down = ("sleep", {"level": 1})
    try:
        sampler.sync()
        assert calls == [down] and llm.llm_engine.is_sleeping()
        made = sampler.sample(PROMPTS, 1, 4, 1.0)
        assert calls == [down, ("wake_up", {}), down] and llm.llm_engine.is_sleeping()
        torch.testing.assert_close(made.log_probs, expected(model, PROMPTS, made, 1), rtol=0, atol=1e-4)
    finally:
        llm.wake_up()


def test_draws_with_the_generator_of_torch(pair):
    model, llm = pair
    sampler = adapter.VllmSampler(model, llm)
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(sampler.sample(PROMPTS, 4, 12, 1.0))
    assert torch.equal(runs[0].tokens, runs[1].tokens)
    assert not torch.equal(runs[0].tokens, runs[2].tokens)
    rows = [runs[0].tokens[a:b].tolist() for a, b in pairwise(runs[0].cu_seqlens.tolist())]
    assert rows[0] != rows[1] or rows[1] != rows[2], "rows of a prompt are drawn apart"


def test_greedy(pair):
    model, llm = pair
    sampler = adapter.VllmSampler(model, llm)
    sampler.sync()
    made = sampler.sample(PROMPTS, 2, 8, 0.0)
    assert torch.equal(made.log_probs, torch.zeros_like(made.log_probs))
    edges = made.cu_seqlens.tolist()
    assert made.tokens[: edges[1]].tolist() == made.tokens[edges[1] : edges[2]].tolist()
    ids = torch.tensor([PROMPTS[0] + made.tokens[: edges[1]].tolist()])
    with torch.no_grad():
        best = model(ids).logits[0, len(PROMPTS[0]) - 1 : -1].argmax(-1)
    assert best.tolist() == made.tokens[: edges[1]].tolist()


def test_rows_end_with_the_end_tokens_of_the_model(pair, monkeypatch):
    """The tokenizer's is an end no more once the model has others."""
    model, llm = pair
    monkeypatch.setattr(model.generation_config, "eos_token_id", [5, 6])
    made = adapter.VllmSampler(model, llm).sample(PROMPTS, 16, 12, 2.0)  # nearly uniform: every token occurs
    rows = [made.tokens[a:b].tolist() for a, b in pairwise(made.cu_seqlens.tolist())]
    assert [row[-1] in (5, 6) for row in rows] == made.finished.tolist() and made.finished.any()
    assert all(not {5, 6} & set(row[:-1]) for row in rows) and any(1 in row[:-1] for row in rows)


def test_rollouts(pair):
    """Straight from the engine to credit: requests are groups, the engine's log-probs correct for it."""
    _, llm = pair
    params = SamplingParams(n=4, max_tokens=6, logprobs=0, flat_logprobs=True, seed=1)
    outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], params, use_tqdm=False)
    rewards = torch.arange(12.0) % 3
    batch = adapter.rollouts(outputs, rewards)
    assert batch.num_rows == 12 and batch.group_ids.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    first = outputs[1].outputs[2]
    begin, end = batch.cu_seqlens[6], batch.cu_seqlens[7]
    assert batch.tokens[begin:end].tolist() == list(first.token_ids)
    assert batch.rollout_log_probs[begin:end].sum().item() == pytest.approx(first.cumulative_logprob, abs=1e-4)
    assert tc.methods.tempo().prepare(batch).advantages.abs().sum() > 0


def test_recipe(pair):
    """As ``docs/hosts.md`` prints it: rollouts whose log-probs of the engine weigh the loss."""
    model, llm = pair
    adapter.update(llm, model)
    names, prompts = recipes.run("vLLM"), [{"prompt_token_ids": p} for p in PROMPTS]
    batch = names["sample"](llm, prompts, len, max_tokens=6)
    assert batch.num_rows == 24 and batch.group_ids.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    made = batch.rollout_log_probs
    prepared = names["OBJECTIVE"].prepare(batch.with_inputs(old_log_probs=made + 0.5))
    torch.testing.assert_close(prepared.multiplier, torch.full_like(made, 0.5).exp())


def output(log_probs, tokens=(4, 5)):
    completion = CompletionOutput(0, "", list(tokens), None, log_probs, finish_reason="length")
    return RequestOutput("0", None, [3], None, [completion], True)


def flat(*positions):
    out = FlatLogprobs()
    for values in positions:
        out.append_fast(list(range(len(values))), values, [None] * len(values), [None] * len(values))
    return out


def test_log_probs_that_the_engine_did_not_report():
    made = adapter.completions([output(flat([None], [-0.5]))])
    assert made.log_probs[0].isnan() and made.log_probs[1] == -0.5


def test_the_sampled_token_comes_first():
    made = adapter.completions([output(flat([-2.0, -0.1], [-0.5, -0.9]))])
    assert made.log_probs.tolist() == [-2.0, -0.5] and not made.finished.any()


def test_no_outputs():
    made = adapter.completions([])
    assert made.cu_seqlens.tolist() == [0] and made.tokens.numel() == made.log_probs.numel() == 0


@pytest.mark.parametrize(
    ("log_probs", "error", "message"),
    [
        (None, TypeError, "expected FlatLogprobs .* got NoneType"),
        ([{4: None}], TypeError, "expected FlatLogprobs .* got list"),
        (flat([-0.5]), ValueError, "logprobs: expected 2, one per token, got 1"),
    ],
)
def test_refuses(log_probs, error, message):
    with pytest.raises(error, match=message):
        adapter.completions([output(log_probs)])
