"""A model of a third of a million parameters that adds in columns, warmed on text with mistakes.

``47+85=`` is continued ``7+5+0=12;4+8+1=13>132``: column sums from the right, each with its carry, then the result. In
the warming text a column sum is wrong with probability ``noise``, and what follows is consistent with it. So the model
errs in places, which is what token-level credit is about.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_PAD, _END, _UNKNOWN = "<pad>", "<end>", "<unk>"


def tokenizer(whole: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """One token per printable ASCII character, and for each of these words."""
    words = [_PAD, _END, _UNKNOWN, *string.digits, *string.ascii_letters, *string.punctuation, " ", "\n", *whole]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=_UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("|".join([*map(re.escape, whole), r"[\s\S]"])), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=_PAD, eos_token=_END, unk_token=_UNKNOWN, padding_side="left"
    )


def derivation(a: int, b: int, wrong: Any = lambda: None) -> str:
    """Column sums and result; ``wrong()`` gives a mistaken column sum, or None."""
    steps, result, carry = [], "", 0
    x, y = str(a)[::-1], str(b)[::-1]
    for i in range(max(len(x), len(y))):
        p, q = (int(z[i]) if i < len(z) else 0 for z in (x, y))
        mistake = wrong()
        total = p + q + carry if mistake is None else mistake
        steps.append(f"{p}+{q}+{carry}={total}")
        result, carry = str(total % 10) + result, total // 10
    return f"{';'.join(steps)}>{(str(carry) if carry else '') + result}"


def model(words: Any, seed: int = 0) -> LlamaForCausalLM:
    """The untrained network for this tokenizer."""
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def addition(generator: random.Random, noise: float) -> str:
    """A noisy derivation of the sum of two random numbers of two digits."""

    def wrong() -> int | None:
        return generator.randrange(20) if generator.random() < noise else None

    a, b = (generator.randrange(10, 100) for _ in range(2))
    return f"{a}+{b}={derivation(a, b, wrong)}"


def warm(
    network: LlamaForCausalLM,
    words: Any,
    steps: int,
    noise: float,
    text: Callable[[random.Random, float], str] = addition,
    seed: int = 0,
    batch: int = 128,
) -> None:
    """Next-token training on such texts, ``batch`` at a time, in place."""
    generator = random.Random(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.0)
    network.train()
    for _ in tqdm(range(steps), desc="warming", unit="step", disable=steps == 0):
        rows = words(
            [text(generator, noise) + _END for _ in range(batch)],
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        labels = rows.input_ids.masked_fill(rows.attention_mask == 0, -100)
        loss = network(rows.input_ids, attention_mask=rows.attention_mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    network.eval()
