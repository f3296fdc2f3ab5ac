"""Which rows a model continues together, and what it computes for them, does not change what is sampled."""

import pytest
import torch
from hashing import SIZE, Hashing
from tokcredit.train import tiny
from tokcredit.train.sampler import TransformersSampler, draw
from transformers import AutoConfig, AutoModelForCausalLM

WORDS = tiny.tokenizer()
SHARED = list(range(10, 50))
RAGGED = [[5, 6, 7], [8], [5, 6, 7, 9, 9, 9], [20, 21], [5, 6]]
PROMPTS = {
    "ragged": RAGGED,
    "shared": [SHARED + prompt for prompt in RAGGED],
    "equal": [SHARED, SHARED, SHARED],
    "tuples": [(*SHARED, 60), (*SHARED,), (*SHARED, 60, 61)],
    "one": [SHARED],
}
OWN_CACHE = {"kind": "mistral", "sliding_window": 1000}
"""A model whose layers have windows, so that it keeps its own cache."""


def rows(made):
    sizes = made.cu_seqlens.diff().tolist()
    return [x.tolist() for x in made.tokens.split(sizes)], made.log_probs, made.finished.tolist()


@pytest.mark.parametrize("settings", [{}, OWN_CACHE], ids=["rows", "own cache"])
@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize(("count", "batch"), [(1, 1), (1, 2), (3, 1), (3, 7), (3, 256)])
def test_each_row_is_what_it_would_be_alone(settings, prompts, count, batch):
    model = Hashing(**settings)
    torch.manual_seed(1)
    found, log_probs, finished = rows(TransformersSampler(model, WORDS, batch=batch).sample(prompts, count, 20, 0.7))
    torch.manual_seed(1)
    uniforms = torch.rand(len(prompts) * count, 20, dtype=torch.float64)
    alone = [model.continuation(prompts[i // count], u, 0.7) for i, u in enumerate(uniforms)]
    assert found == [tokens for tokens, _, _ in alone]
    assert finished == [ended for _, _, ended in alone]
    assert log_probs.tolist() == pytest.approx([x for _, own, _ in alone for x in own], abs=1e-6)


def test_rows_longer_than_the_memory_they_begin_with():
    model = Hashing()
    model.generation_config.eos_token_id = [SIZE]
    torch.manual_seed(1)
    made = TransformersSampler(model, WORDS, batch=4).sample(RAGGED, 1, 160, 1.0)
    torch.manual_seed(1)
    uniforms = torch.rand(5, 160, dtype=torch.float64)
    assert rows(made)[0] == [model.continuation(RAGGED[i], u, 1.0)[0] for i, u in enumerate(uniforms)]


@pytest.mark.parametrize("batch", [4, 256])
def test_nothing_is_computed_twice_or_after_the_end(batch):
    model, prompts = Hashing(), PROMPTS["shared"]
    torch.manual_seed(1)
    made = TransformersSampler(model, WORDS, batch=batch).sample(prompts, 4, 20, 1.0)
    lengths = made.cu_seqlens.diff()
    assert lengths.max() - lengths.min() > 5
    # One prompt at a time joins with a batch of 4, else all together, padded.
    own = sum(map(len, RAGGED)) if batch == 4 else len(RAGGED) * max(map(len, RAGGED))
    # The first token follows from the prompt, and nothing follows from the last.
    assert model.forwarded == len(SHARED) + own + int((lengths - 1).sum())


def test_waiting_prompts_join_before_all_rows_have_ended():
    model = Hashing()
    calls = []
    forward = model.forward
    model.forward = lambda ids, **others: calls.append(ids.shape) or forward(ids, **others)
    torch.manual_seed(1)
    made = TransformersSampler(model, WORDS, batch=8).sample([[5 + i, 9] for i in range(128)], 1, 20, 1.0)
    together = [rows for rows, tokens in calls if tokens == 1]
    one_after_another = made.cu_seqlens.diff().view(-1, 8).amax(1) - 1
    assert max(together) == 8 and len(together) < 0.8 * one_after_another.sum()
    # Rows that have ended leave the memory when others join. One column is always masked.
    assert model.widest <= 1 + 2 + 2 * 20


KINDS = {
    "llama": {"num_key_value_heads": 2},
    "gpt2": {},
    "bloom": {},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 4},
    "gemma3_text": {"head_dim": 8, "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4},
}


@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_are_those_of_a_forward_pass(kind):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    config = AutoConfig.for_model(kind, vocab_size=64, pad_token_id=0, eos_token_id=[2, 3], **sizes, **KINDS[kind])
    model = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(4.0)
    prompts = PROMPTS["shared"]
    for batch in (4, 256):
        made = TransformersSampler(model, WORDS, batch=batch).sample(prompts, 2, 12, 0.7)
        parts = made.log_probs.split(made.cu_seqlens.diff().tolist())
        for i, (own, row) in enumerate(zip(parts, rows(made)[0], strict=True)):
            with torch.no_grad():
                logits = model(torch.tensor([prompts[i // 2] + row])).logits[0, len(prompts[i // 2]) - 1 : -1] / 0.7
            expected = logits.log_softmax(-1).gather(1, torch.tensor(row)[:, None])[:, 0]
            torch.testing.assert_close(own.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [1, 5, 256, 300, 1000])
def test_draws_have_the_probabilities(size):
    generator = torch.Generator().manual_seed(size)
    probs = torch.rand(3, size, dtype=torch.float64, generator=generator) ** 4
    probs[:, 1::3] = 0
    grid = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    for row in probs / probs.sum(1, keepdim=True):
        drawn = draw(row.expand(2000, -1), grid)
        counts = drawn.bincount(minlength=size)
        # The numbers of an even grid that lie between two sums differ from the expected one by less than 1.
        assert (counts - 2000 * row).abs().max() < 1 and (drawn.diff() >= 0).all()


@pytest.mark.parametrize("size", [5, 300])
def test_draws_at_the_ends_have_a_probability(size):
    probs = torch.zeros(2, size)
    probs[0, 3] = probs[1, [2, size - 2]] = 1 / 3
    assert draw(probs, torch.zeros(2, dtype=torch.float64)).tolist() == [3, 2]
    assert draw(probs, torch.full((2,), 1 - 2**-53, dtype=torch.float64)).tolist() == [3, size - 2]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(bad, temperature):
    model = Hashing()
    model.table[:, 7] = bad
    with pytest.raises(RuntimeError, match="sampler: expected finite logits, got NaN or infinity"):
        TransformersSampler(model, WORDS).sample(RAGGED, 2, 4, temperature)


def test_tokens_that_a_model_forbids():
    model = Hashing()
    model.table[:, 5:] = -torch.inf
    made = TransformersSampler(model, WORDS).sample(RAGGED, 8, 20, 1.0)
    assert int(made.tokens.max()) < 5 and made.log_probs.isfinite().all()
