"""Verifiers: functions or language models that say whether two continuations of a text differ in meaning."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tokcredit.train import imported as functions
from tokcredit.train import models
from tokcredit.train.prompts import Prompts
from tokcredit.train.sampler import TransformersSampler

_QUESTION = """Two continuations of the same text begin with different tokens, marked by << >>.

Text:
{context}

Continuation A:
{small}

Continuation B:
{large}

Does the difference change the meaning, the reasoning or the result? Different wording of the same thought does not \
count. Answer with one digit: 1 if it does, 0 if it does not."""
_ANSWER_TOKENS = 128
_NUMBER = re.compile(r"(?P<number>[-\u2212]?\d+(?:[.,]\d+)*)")
_AFTER_OUTPUT = re.compile(rf"\boutput\b.*?{_NUMBER.pattern}", re.I | re.S)


class Case(NamedTuple):
    """A text, and two continuations of it that begin with different tokens.

    Attributes:
        context: The common text.
        small: Continuation of the small model's token, which stands in ``<< >>``.
        large: Continuation of the large model's token, which stands in ``<< >>``.
    """

    context: str
    small: str
    large: str


Verifier = Callable[[Sequence[Case]], list[int]]
"""Function from cases to 1 (they differ in meaning, reasoning or outcome), 0 (they do not) or -1 (it cannot tell)."""


def imported(path: str) -> Verifier:
    """Return the verifier that calls a function of (context, small, large).

    Args:
        path: ``package.module:function``.

    Raises:
        ValueError: The path names no such function. The verifier raises it for a result that is not 1, 0 or -1.
    """
    function = functions.function(path, "verifier", ("context", "small", "large"))

    def verify(cases: Sequence[Case]) -> list[int]:
        verdicts = [function(*case) for case in cases]
        if wrong := [v for v in verdicts if v not in (-1, 0, 1)]:
            raise ValueError(f"verifier: expected 1, 0 or -1 from {path}, got {wrong[0]!r}")
        return [int(v) for v in verdicts]

    return verify


def judge(model: str, device: Any, dtype: Any, batch: int) -> Verifier:
    """Return a verifier that asks a language model and decodes greedily.

    Args:
        model: The model, as :func:`tokcredit.train.models.load` takes it.
        device: Device of the model.
        dtype: Dtype of its weights.
        batch: Largest number of questions at once.
    """
    network, tokenizer = models.load(model)
    sampler = TransformersSampler(network.to(device, dtype), tokenizer, batch=batch)
    prompt = Prompts(tokenizer)

    def verify(cases: Sequence[Case]) -> list[int]:
        if not cases:
            return []
        questions = [prompt(_QUESTION.format(**case._asdict())) for case in cases]
        made = sampler.sample(questions, 1, _ANSWER_TOKENS, 0.0)
        answers = made.tokens.split(made.cu_seqlens.diff().tolist())
        return [verdict(answer) for answer in tokenizer.batch_decode(answers, skip_special_tokens=True)]

    return verify


def verdict(answer: str) -> int:
    """Return the first number after the word ``output`` in an answer, else its first number; -1 unless it is 0 or 1.

    Args:
        answer: Answer of the language model.

    References:
        arXiv 2505.21600, the released code.
    """
    found = _AFTER_OUTPUT.search(answer) or _NUMBER.search(answer)
    return int(found["number"]) if found and found["number"] in ("0", "1") else -1
