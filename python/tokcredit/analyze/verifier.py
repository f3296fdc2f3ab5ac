"""Whether two continuations of a text come to the same: a function of the user's, or a language model that is asked."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tokcredit.train import models
from tokcredit.train.explorer import prompt_tokens
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


class Case(NamedTuple):
    """A common text and what either token leads to, that token in ``<< >>``."""

    context: str
    small: str
    large: str


Verifier = Callable[[Sequence[Case]], list[int]]
"""1 where the continuations differ in meaning, reasoning or outcome, 0 where they do not, -1 where it cannot tell."""


def imported(path: str) -> Verifier:
    """The function ``package.module:function``, of (context, small, large).

    Raises:
        ValueError: the path is not one, or a verdict is none.
    """
    module, separator, name = path.partition(":")
    if not separator:
        raise ValueError(f"verifier: expected package.module:function, got {path!r}")
    function = getattr(importlib.import_module(module), name, None)
    if not callable(function):
        raise ValueError(f"verifier: expected a function in {module}, got {name!r}")

    def verify(cases: Sequence[Case]) -> list[int]:
        verdicts = [function(*case) for case in cases]
        if wrong := [v for v in verdicts if v not in (-1, 0, 1)]:
            raise ValueError(f"verifier: expected 1, 0 or -1 from {path}, got {wrong[0]!r}")
        return [int(v) for v in verdicts]

    return verify


def judge(model: str, device: Any, dtype: Any, batch: int) -> Verifier:
    """A language model that is asked, greedily.

    Args:
        model: as :func:`tokcredit.train.models.load` takes it.
        device: where it runs.
        dtype: of its weights.
        batch: questions at once at most.
    """
    network, words = models.load(model)
    sampler = TransformersSampler(network.to(device, dtype), words, batch=batch)

    def verify(cases: Sequence[Case]) -> list[int]:
        if not cases:
            return []
        questions = [prompt_tokens(words, _QUESTION.format(**case._asdict())) for case in cases]
        made = sampler.sample(questions, 1, _ANSWER_TOKENS, 0.0)
        answers = made.tokens.split(made.cu_seqlens.diff().tolist())
        return [verdict(answer) for answer in words.batch_decode(answers, skip_special_tokens=True)]

    return verify


def verdict(answer: str) -> int:
    """The 0 or 1 an answer ends with, else the first one that stands alone in it, else -1."""
    found = re.search(r"(?<!\d)([01])\W*$", answer) or re.search(r"(?<!\d)([01])(?!\d)", answer)
    return int(found[1]) if found else -1
