import copy
import math

import pytest
import torch
from tokcredit.analyze.crossing import Rule, cross
from tokcredit.train.sampler import TransformersSampler

PROMPT = [7, 12, 30, 5]
RULES = [Rule(0), Rule(1), Rule(0, 0.05), Rule(1, 0.2), Rule(0, 0.05, 1), Rule(1, 0.0, 2)]


def made(pair, rules=RULES, count=4, max_tokens=10, temperature=0.8, top_p=0.7, prompt=PROMPT):
    generator = torch.Generator().manual_seed(3)
    return cross(pair, prompt, rules, count, max_tokens, temperature, top_p, generator)


def rows(crossed):
    return [row[:n].tolist() for row, n in zip(crossed.tokens, crossed.lengths, strict=True)]


def kept(logits, temperature, top_p):
    """Probabilities of the likeliest tokens up to ``top_p``, by a loop."""
    p = (logits / temperature).softmax(-1)
    out, total = torch.zeros_like(p), 0.0
    for token in sorted(range(len(p)), key=lambda i: -p[i].item()):
        if total >= top_p:
            break
        out[token] = p[token]
        total += p[token].item()
    return out / out.sum()


def divergence(p, q):
    m, total = (p + q) / 2, 0.0
    for one in (p, q):
        total += sum(0.5 * x * math.log(x / y) for x, y in zip(one.tolist(), m.tolist(), strict=True) if x > 0)
    return total


@pytest.mark.parametrize("top_p", [0.7, 1.0])
def test_every_token_without_caches(pair, top_p):
    """Each reply is written again, alone, from whole float64 distributions."""
    crossed = made(pair, top_p=top_p)
    models = [copy.deepcopy(model).double() for model in pair[:2]]
    generator = torch.Generator().manual_seed(3)
    noise = [torch.empty(4, pair.vocabulary, dtype=torch.float64).exponential_(generator=generator) for _ in range(10)]
    counts = torch.zeros(len(RULES), 3)
    for r in range(len(RULES) * 4):
        rule, left = RULES[r // 4], RULES[r // 4].cap if RULES[r // 4].cap is not None else 99
        for t in range(int(crossed.lengths[r])):
            prefix = torch.tensor([[*PROMPT, *crossed.tokens[r, :t].tolist()]])
            logits = [model(prefix).logits[0, -1] for model in models]
            p = [kept(x, 0.8, top_p) for x in logits]
            js = divergence(*p)
            assert crossed.js[r, t].item() == pytest.approx(js, abs=1e-5)
            drawn = [int((x.log() - noise[t][r % 4].log()).argmax()) for x in p]
            own, other = drawn[rule.primary], drawn[1 - rule.primary]
            swapped = js > rule.threshold and left > 0
            assert crossed.swapped[r, t] == swapped and crossed.changed[r, t] == (swapped and own != other)
            assert crossed.tokens[r, t] == (other if swapped else own)
            first = logits[rule.primary].argmax()
            assert crossed.ranks[r, t] == sum(x > logits[1 - rule.primary][first] for x in logits[1 - rule.primary])
            left -= swapped and own != other
            counts[r // 4] += torch.tensor([1, swapped, swapped and own != other])
    assert not counts[:2, 1:].any(), "alone, nobody takes over"
    assert (counts[2:, 2] > 0).all() and (counts[2:4, 1] > counts[2:4, 2]).any(), "not every swap changes the token"


@pytest.mark.parametrize("temperature", [0.0, 1.3])
@pytest.mark.parametrize("top_p", [0.7, 1.0])
def test_the_ends_of_the_thresholds_are_the_models_themselves(pair, temperature, top_p):
    rules = [Rule(0), Rule(1), Rule(0, 0.0), Rule(1, 0.0), Rule(0, math.log(2) + 1e-9), Rule(1, 0.0, 0)]
    count = 4 if temperature else 1
    replies = rows(made(pair, rules, count, temperature=temperature, top_p=top_p))
    first, second, to_second, to_first, *never = (replies[i * count : (i + 1) * count] for i in range(len(rules)))
    assert first != second
    assert to_second == second and to_first == first
    assert never == [first, second]
    # The other model does not matter to what one writes alone.
    twin = pair._replace(second=pair.first)
    assert rows(made(twin, rules[:1], count, temperature=temperature, top_p=top_p)) == first


def test_greedy_is_the_samplers(pair):
    rules = [Rule(0), Rule(1)]
    replies = rows(made(pair, rules, count=1, temperature=0.0))
    for model, reply in zip(pair[:2], replies, strict=True):
        assert TransformersSampler(model, pair.words).sample([PROMPT], 1, 10, 0.0).tokens.tolist() == reply


def test_draws_follow_the_kept_distribution(pair):
    count = 4000
    crossed = made(pair, [Rule(1)], count, max_tokens=1)
    p = kept(pair.second(torch.tensor([PROMPT])).logits[0, -1].double().detach(), 0.8, 0.7)
    frequency = torch.bincount(crossed.tokens[:, 0], minlength=pair.vocabulary) / count
    assert (frequency[p == 0] == 0).all()
    assert (frequency - p).abs().max() < 5 * 0.5 / math.sqrt(count)


def test_replies_end_where_a_model_ends_them(pair):
    crossed = made(pair, count=8)
    assert crossed.finished.any() and not crossed.finished.all()
    for reply, finished in zip(rows(crossed), crossed.finished, strict=True):
        ends = torch.isin(torch.tensor(reply), pair.ends)
        assert not ends[:-1].any() and ends[-1] == finished and (finished or len(reply) == 10)


def test_a_prompt_of_one_token_and_caps(pair):
    crossed = made(pair, [Rule(0, 0.0, cap) for cap in (0, 1, 2, None)], count=8, prompt=[9])
    inside = torch.arange(crossed.tokens.shape[1]) < crossed.lengths[:, None]
    changed = (crossed.changed & inside).sum(1).view(4, 8)
    assert [int(x.max()) for x in changed[:3]] == [0, 1, 2] and changed[3].max() > 2
    expected = torch.stack([torch.softmax(m(torch.tensor([[9]])).logits[0, -1].double(), -1) for m in pair[:2]])
    alone = made(pair, [Rule(0)], count=1, max_tokens=1, temperature=1.0, top_p=1.0, prompt=[9])
    assert alone.js[0, 0].item() == pytest.approx(divergence(*expected), abs=1e-6)
