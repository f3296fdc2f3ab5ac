import math
import re

import pytest
import torch
from bigrams import END, TOKENIZER, as_pair, ids, scripted
from tokcredit.analyze.crossing import Rule, cross
from tokcredit.train.sampler import TransformersSampler

PROMPT = [7, 12, 30, 5]
PROMPT_TEXT = ids(*"1+1=")
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
    """Each response is written again, alone, from whole float64 distributions."""
    crossed = made(pair, top_p=top_p)
    generator = torch.Generator().manual_seed(3)
    noise = [torch.empty(4, pair.vocabulary, dtype=torch.float64).exponential_(generator=generator) for _ in range(10)]
    for r in range(len(RULES) * 4):
        rule, left = RULES[r // 4], RULES[r // 4].cap if RULES[r // 4].cap is not None else 99
        for t in range(int(crossed.lengths[r])):
            prefix = torch.tensor([[*PROMPT, *crossed.tokens[r, :t].tolist()]])
            logits = [model(prefix).logits[0, -1] for model in pair[:2]]
            p = [kept(x, 0.8, top_p) for x in logits]
            js = divergence(*p)
            assert crossed.js[r, t].item() == pytest.approx(js, abs=1e-9)
            drawn = [int((x.log() - noise[t][r % 4].log()).argmax()) for x in p]
            own, other = drawn[rule.primary], drawn[1 - rule.primary]
            swapped = js > rule.threshold and left > 0
            assert crossed.swapped[r, t] == swapped and crossed.changed[r, t] == (swapped and own != other)
            assert crossed.tokens[r, t] == (other if swapped else own)
            first = logits[rule.primary].argmax()
            assert crossed.ranks[r, t] == sum(x > logits[1 - rule.primary][first] for x in logits[1 - rule.primary])
            left -= swapped and own != other


def text(response):
    return "".join(TOKENIZER.convert_ids_to_tokens(response))


def test_by_hand(apart):
    """The first token has one distribution; after it the models have no token in common."""
    rules = [Rule(0), Rule(1), Rule(0, 0.0), Rule(0, 0.1), Rule(0, 0.7), Rule(0, 0.1, 1), Rule(1, 0.1, 2)]
    crossed = made(apart, rules, count=8, max_tokens=5, prompt=PROMPT_TEXT)
    expected = ["[78][12]{4}", *["[78][ab]{4}"] * 3, "[78][12]{4}", "[78][ab][12]{3}", "[78][12]{2}[ab]{2}"]
    swaps = [[0] * 5, [0] * 5, *[[0, 1, 1, 1, 1]] * 2, [0] * 5, [0, 1, 0, 0, 0], [0, 1, 1, 0, 0]]
    responses = rows(crossed)
    for r, response in enumerate(responses):
        assert re.fullmatch(expected[r // 8], text(response)), (rules[r // 8], text(response))
        assert crossed.swapped[r].tolist() == crossed.changed[r].tolist() == swaps[r // 8]
        assert crossed.js[r].tolist() == pytest.approx([0, *[math.log(2)] * 4], abs=1e-9)
        # Two tokens of the other model come before the likeliest token of the primary.
        assert crossed.ranks[r].tolist() == [0, 2, 2, 2, 2]
        assert not crossed.finished[r]
    # The k-th responses of all rules share their noise, hence their first token.
    assert len({tuple(response[0] for response in responses[i : i + 8]) for i in range(0, len(responses), 8)}) == 1


def test_a_swap_may_draw_the_same_token():
    second = scripted({"=": ("1",)}, ("1", "2"))
    crossed = made(as_pair(scripted({}, ("1",)), second), [Rule(0, 0.1)], 8, 5, 0.0, 1.0, PROMPT_TEXT)
    assert not crossed.swapped.any(), "greedy, both choose 1"
    crossed = made(as_pair(scripted({}, ("1",)), second), [Rule(0, 0.1, 0), Rule(0, 0.1)], 8, 5, 1.0, 1.0, PROMPT_TEXT)
    assert not crossed.swapped[:8].any() and (crossed.tokens[:8] == ids("1")[0]).all()
    own, changed = crossed.tokens[8:] == ids("1")[0], crossed.changed[8:]
    assert (changed == ~own).all() and (changed <= crossed.swapped[8:]).all()
    # After a 1 the distributions differ; after a 2 they differ as well.
    assert not crossed.swapped[8:, 0].any() and crossed.swapped[8:, 1:].all()


@pytest.mark.parametrize("temperature", [0.0, 1.3])
@pytest.mark.parametrize("top_p", [0.7, 1.0])
def test_the_ends_of_the_thresholds_are_the_models_themselves(pair, temperature, top_p):
    rules = [Rule(0), Rule(1), Rule(0, 0.0), Rule(1, 0.0), Rule(0, math.log(2) + 1e-9), Rule(1, 0.0, 0)]
    count = 4 if temperature else 1
    responses = rows(made(pair, rules, count, temperature=temperature, top_p=top_p))
    first, second, to_second, to_first, *never = (responses[i * count : (i + 1) * count] for i in range(len(rules)))
    assert to_second == second and to_first == first
    assert never == [first, second]
    # The other model does not matter to what one writes alone.
    twin = pair._replace(second=pair.first)
    assert rows(made(twin, rules[:1], count, temperature=temperature, top_p=top_p)) == first


def test_greedy_is_the_samplers(pair):
    rules = [Rule(0), Rule(1)]
    responses = rows(made(pair, rules, count=1, temperature=0.0))
    for model, response in zip(pair[:2], responses, strict=True):
        assert TransformersSampler(model, pair.tokenizer).sample([PROMPT], 1, 10, 0.0).tokens.tolist() == response


def test_draws_follow_the_kept_distribution(pair):
    count = 4000
    crossed = made(pair, [Rule(1)], count, max_tokens=1)
    p = kept(pair.second(torch.tensor([PROMPT])).logits[0, -1].double().detach(), 0.8, 0.7)
    frequency = torch.bincount(crossed.tokens[:, 0], minlength=pair.vocabulary) / count
    assert (frequency[p == 0] == 0).all()
    assert (frequency - p).abs().max() < 5 * 0.5 / math.sqrt(count)


def test_responses_end_where_a_model_ends_them(pair):
    crossed = made(pair, count=8)
    for response, finished in zip(rows(crossed), crossed.finished, strict=True):
        ends = torch.isin(torch.tensor(response), pair.ends)
        assert not ends[:-1].any() and ends[-1] == finished and (finished or len(response) == 10)
    ending = as_pair(scripted({"=": ("x",), "x": (END,)}, ("y",)), scripted({}, ("y",)))
    crossed = made(ending, [Rule(0), Rule(1), Rule(1, 0.1, 1)], count=2, max_tokens=4, prompt=PROMPT_TEXT)
    assert [text(response) for response in rows(crossed)] == ["x" + END] * 2 + ["yyyy"] * 2 + ["xyyy"] * 2
    assert crossed.finished.tolist() == [True, True, False, False, False, False]


def test_a_prompt_of_one_token(pair):
    expected = torch.stack([torch.softmax(m(torch.tensor([[9]])).logits[0, -1].double(), -1) for m in pair[:2]])
    alone = made(pair, [Rule(0)], count=1, max_tokens=1, temperature=1.0, top_p=1.0, prompt=[9])
    assert alone.js[0, 0].item() == pytest.approx(divergence(*expected), abs=1e-6)
