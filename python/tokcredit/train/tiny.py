"""A model with a third of a million parameters that adds in columns, after warm-up on text with mistakes.

It continues ``47+85=`` with ``7+5+0=12;4+8+1=13>132``: column sums from the right, each with its carry, then the
result. In the warm-up text a column sum is wrong with probability ``noise``, and the rest is consistent with it, so the
model makes mistakes at single tokens.
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
    """Return a tokenizer with one token per printable ASCII character, and one for each of some words.

    Args:
        whole: The words.
    """
    words = [_PAD, _END, _UNKNOWN, *string.digits, *string.ascii_letters, *string.punctuation, " ", "\n", *whole]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=_UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("|".join([*map(re.escape, whole), r"[\s\S]"])), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=_PAD, eos_token=_END, unk_token=_UNKNOWN, padding_side="left"
    )


def derivation(a: int, b: int, wrong: Any = lambda: None) -> str:
    """Return the column sums of ``a + b``, then the result.

    Args:
        a: Number, at least 0.
        b: Number, at least 0.
        wrong: Function that returns a wrong column sum, or None for the right one.
    """
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
    """Return the untrained network for a tokenizer.

    Args:
        words: The tokenizer.
        seed: Seed of the weights.
    """
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
    """Return the addition of two random numbers of two digits, with mistakes.

    Args:
        generator: Source of randomness.
        noise: Probability that a column sum is random.
    """

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
    """Train a network in place to predict the next token of random texts.

    Args:
        network: The network.
        words: Its tokenizer.
        steps: Number of optimizer steps.
        noise: Probability of a mistake in the text.
        text: Function of a source of randomness and the noise that returns a text.
        seed: Seed of the texts.
        batch: Texts per step.
    """
    generator = random.Random(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.0)
    network.train()
    for _ in tqdm(range(steps), desc="warm-up", unit="step", disable=steps == 0):
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
