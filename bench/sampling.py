"""Measure the sampler of ``tokcredit train`` beside ``generate`` of transformers, in tokens per second."""

from __future__ import annotations

import time

import torch
from harness import Table, main
from packing import draw, model
from tokcredit.train.sampler import TransformersSampler
from tokcredit.train.scoring import left_padded, prefill
from transformers import GenerationConfig

PROMPTS, ROWS, LIMIT = 8, 8, 24
SHARED, OWN = 24, (22, 27)  # tokens of the system prompt and of the questions of the main job


class Words:
    """What the sampler reads of a tokenizer."""

    pad_token_id = 0


class Provider:
    """Continues prompts, and counts the tokens and the seconds of processor time, which others on the machine leave."""

    def __init__(self, sample) -> None:
        self.sample, self.tokens, self.seconds = sample, 0, 0.0

    def __call__(self) -> None:
        start = time.process_time()
        self.tokens += len(self.sample())
        self.seconds += time.process_time() - start


def ours(net, prompts, count, temperature=1.0):
    sampler = TransformersSampler(net, Words())
    return lambda: sampler.sample(prompts, count, LIMIT, temperature).tokens


def generate(net, prompts, count, temperature=1.0, share=False):
    """``generate`` on a row for each continuation; keys and values of a prompt are computed once if ``share``."""
    ends = torch.tensor(net.generation_config.eos_token_id)
    choice = {"do_sample": True, "top_k": 0, "temperature": temperature} if temperature else {"do_sample": False}
    config = GenerationConfig(max_new_tokens=LIMIT, pad_token_id=0, eos_token_id=ends.tolist(), **choice)

    @torch.no_grad()
    def sample():
        ids, real = left_padded(prompts, 0, net.device)
        cache = prefill(net, ids, real) if share else None
        if cache:
            cache.batch_repeat_interleave(count)
        ids, real = ids.repeat_interleave(count, 0), real.repeat_interleave(count, 0)
        made = net.generate(ids, attention_mask=real.long(), past_key_values=cache, generation_config=config)
        made = made[:, ids.shape[1] :]
        ended = torch.isin(made, ends).int()
        return made[ended.cumsum(1) == ended]

    return sample


def compare() -> None:
    """Check that all give the same greedy tokens."""
    net, prompts = model(2).double(), questions()
    net.generation_config.eos_token_id = list(range(4_096))
    expected = generate(net, prompts, 2, 0.0)()
    assert ours(net, prompts, 2, 0.0)().equal(expected)
    assert generate(net, prompts, 2, 0.0, share=True)().equal(expected)


def questions():
    generator = torch.Generator().manual_seed(0)
    system = draw(generator, SHARED)
    return [system + draw(generator, OWN[i % 2]) for i in range(PROMPTS)]


def run(table: Table, quick: bool) -> None:
    compare()
    net, prompts, count = model(2 if quick else 30).to(torch.bfloat16), questions(), 1 if quick else ROWS
    # The model is random and so nearly uniform: a row ends with this share of the vocabulary.
    for name, share in (("to the limit", 0), ("half of the limit on average", 1 / 10)):
        net.generation_config.eos_token_id = [49_152, *range(int(49_152 * share))]
        providers = {
            "tokcredit": Provider(ours(net, prompts, count)),
            "generate": Provider(generate(net, prompts, count)),
            "generate, prompts once": Provider(generate(net, prompts, count, share=True)),
        }
        moved = LIMIT * sum(p.nbytes for p in net.parameters())
        table.measure(f"sample, {name}", f"{PROMPTS * count} rows, {LIMIT} tokens", tuple, moved, providers)
        for label, provider in providers.items():
            print(f"{name}, {label}: {provider.tokens / provider.seconds:.0f} tokens per second of a core")


if __name__ == "__main__":
    main(run)
