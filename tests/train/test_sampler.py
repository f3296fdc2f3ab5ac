import copy

import pytest
import torch
from tokcredit import Rollouts
from tokcredit.train import tiny
from tokcredit.train.sampler import TransformersSampler, end_tokens
from tokcredit.train.scoring import left_padded, score

WORDS = tiny.tokenizer()
PROMPTS = [WORDS(text).input_ids for text in ("47+85=", "1+2=", "123+456=")]


@pytest.fixture
def model():
    network = tiny.model(WORDS).eval()
    with torch.no_grad():
        # Far from uniform.
        for p in network.parameters():
            p.mul_(2.0)
    return network


def naive(model, prompt, tokens, temperature):
    """Log-probs and entropies of one row, alone and without padding, from a full float64 softmax."""
    logits = model.double()(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1] / temperature
    everything = logits.log_softmax(-1)
    return everything.gather(1, torch.tensor(tokens)[:, None])[:, 0], -(everything.exp() * everything).sum(-1)


def sampled(model, ends, **settings):
    """Rows, their log-probs and whether they ended, of four responses to each prompt, from one seed."""
    model.generation_config.eos_token_id = ends
    torch.manual_seed(0)
    made = TransformersSampler(model, WORDS, **settings).sample(PROMPTS, 4, 12, temperature=0.7)
    sizes = made.cu_seqlens.diff().tolist()
    return made.tokens.split(sizes), made.log_probs.split(sizes), made.finished.tolist()


@pytest.mark.parametrize("batch", [4, 256])
def test_rows_end_at_end_tokens_and_have_the_log_probs_of_the_model(model, batch):
    model = model.double()
    endless, _, finished = sampled(model, [len(WORDS)], batch=batch)
    assert [len(row) for row in endless] == [12] * 12 and not any(finished)
    # These rows end at their sixth and fourth tokens at the latest.
    ends = [int(endless[0][5]), int(endless[3][3])]
    rows, log_probs, finished = sampled(model, ends, batch=batch)
    assert finished[0] and finished[3]
    for i, (row, own, end, whole) in enumerate(zip(rows, log_probs, finished, endless, strict=True)):
        places = torch.isin(whole, torch.tensor(ends)).nonzero()[:, 0].tolist()
        assert row.tolist() == whole[: places[0] + 1 if places else 12].tolist()
        places = torch.isin(row, torch.tensor(ends))
        assert not places[:-1].any() and places[-1] == end and (end or len(row) == 12)
        expected, _ = naive(model, PROMPTS[i // 4], row.tolist(), 0.7)
        torch.testing.assert_close(own.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("ends", [None, []])
def test_a_model_without_an_end_token(model, ends):
    words = tiny.tokenizer()
    model.generation_config.eos_token_id = ends
    assert end_tokens(model, words) == [words.eos_token_id]
    words.eos_token = None
    with pytest.raises(ValueError, match=r"eos_token_id: expected a token .* LlamaForCausalLM .*, got none"):
        TransformersSampler(model, words)


@pytest.mark.parametrize("batch", [4, 256])
@pytest.mark.parametrize("padding_is_end", [False, True])
def test_rows_stop_at_texts(model, padding_is_end, batch):
    words = tiny.tokenizer()
    if padding_is_end:
        words.pad_token = words.eos_token
    model.generation_config.eos_token_id = [len(words)]
    sampler = TransformersSampler(model.double(), words, batch=batch)

    def rows(stop=()):
        torch.manual_seed(0)
        made = sampler.sample(PROMPTS, 4, 12, 1.0, stop)
        lengths = made.cu_seqlens.diff().tolist()
        return made.tokens.split(lengths), made.log_probs.split(lengths), made.finished.tolist()

    free, free_log_probs, ended = rows()
    text = [words.convert_ids_to_tokens(row.tolist()) for row in free]
    plain = [row for row in text if not set(row[:8]) & set(words.all_special_tokens)]
    # Two texts of two tokens, one of three, and one that the prompts begin, which is not counted.
    stop = ("".join(plain[0][2:4]), "".join(plain[1][6:8]), "".join(plain[2][0:3]), "=" + plain[3][0])
    cut = 0
    for row, log_probs, finished, whole, whole_log_probs, end in zip(
        *rows(stop), free, free_log_probs, ended, strict=True
    ):
        pieces = words.convert_ids_to_tokens(whole.tolist())
        lengths = [n for n in range(1, len(pieces) + 1) if "".join(pieces[:n]).endswith(stop)]
        length = min([*lengths, len(pieces)])
        assert torch.equal(row, whole[:length])
        torch.testing.assert_close(log_probs, whole_log_probs[:length])
        assert finished == (end or bool(lengths))
        cut += length < len(pieces)
    assert cut >= 3


def test_greedy_takes_the_most_probable(model):
    made = TransformersSampler(model, WORDS).sample(PROMPTS, 1, 5, temperature=0.0)
    assert not made.log_probs.any()
    for prompt, row in zip(PROMPTS, made.tokens.split(made.cu_seqlens.diff().tolist()), strict=True):
        for i, token in enumerate(row.tolist()):
            logits = model(torch.tensor([[*prompt, *row[:i].tolist()]])).logits[0, -1]
            # Not argmax: the cache rounds otherwise, and two tokens may be equally probable up to that.
            assert logits[token] > logits.max() - 1e-4


def test_the_models_own_generation_settings_stay_out(model):
    model.generation_config.update(do_sample=True, top_k=1, repetition_penalty=5.0)
    before = model.generation_config.to_dict()
    torch.manual_seed(0)
    made = TransformersSampler(model, WORDS).sample(PROMPTS, 100, 1, temperature=1.0)
    assert model.generation_config.to_dict() == before
    assert len(made.tokens[:100].unique()) > 1, "top_k=1 would sample one token a hundred times"


def test_a_copy_follows_the_trained_model(model):
    sampler = TransformersSampler(model, WORDS, dtype=torch.bfloat16)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(-1.0)
    sampler.sync()
    made = sampler.sample(PROMPTS[:1], 1, 6, temperature=0.0)
    twin = TransformersSampler(copy.deepcopy(model).to(torch.bfloat16), WORDS)
    assert torch.equal(made.tokens, twin.sample(PROMPTS[:1], 1, 6, temperature=0.0).tokens)


def test_scores_and_their_gradient(model):
    rows = [[5, 9, 1], [7], [3, 4, 5, 6]]
    batch = Rollouts(
        torch.tensor([t for r in rows for t in r]),
        torch.tensor([0, 3, 4, 8]),
        torch.zeros(3, dtype=torch.long),
        torch.zeros(3),
        extras={"prompt_tokens": left_padded(PROMPTS, -1, torch.device("cpu"))[0]},
    )
    log_probs, entropies = score(model, batch, 1.3)
    weights = torch.randn(8, generator=torch.Generator().manual_seed(1))
    (log_probs * weights).sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    exact = copy.deepcopy(model)
    exact.zero_grad()
    expected = [naive(exact, p, r, 1.3) for p, r in zip(PROMPTS, rows, strict=True)]
    torch.testing.assert_close(log_probs.double(), torch.cat([e[0] for e in expected]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(entropies.double(), torch.cat([e[1] for e in expected]), atol=1e-4, rtol=1e-4)
    (torch.cat([e[0] for e in expected]) * weights).sum().backward()
    for ours, theirs in zip(grads, exact.parameters(), strict=True):
        torch.testing.assert_close(ours.double(), theirs.grad, atol=2e-4, rtol=2e-3)
    # A row scored in another batch, with other padding, has the same log-probs.
    alone, _ = score(model, batch.select(torch.tensor([1])), 1.3)
    torch.testing.assert_close(alone, log_probs[3:4], atol=1e-5, rtol=1e-4)


def test_derivations():
    assert tiny.derivation(47, 85) == "7+5+0=12;4+8+1=13>132"
    assert tiny.derivation(10, 22) == "0+2+0=2;1+2+0=3>32"
    assert tiny.derivation(5, 95) == "5+5+0=10;0+9+1=10>100"
    assert tiny.derivation(47, 85, lambda: 4) == "7+5+0=4;4+8+0=4>44"
    text = "47+85=" + tiny.derivation(47, 85)
    assert WORDS.decode(WORDS(text).input_ids) == text


def test_warm_up_fits_the_texts():
    """Small steps along the gradient of a fixed text lower its loss."""
    network = tiny.model(WORDS)
    text = "47+85=" + tiny.derivation(47, 85)
    ids = torch.tensor([WORDS(text + "<end>").input_ids])
    before = network(ids, labels=ids).loss.item()
    tiny.warm(network, WORDS, steps=3, noise=0.0, text=lambda generator, noise: text, batch=4)
    assert network(ids, labels=ids).loss.item() < before and not network.training
