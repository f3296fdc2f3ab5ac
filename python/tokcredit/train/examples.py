"""Examples to train on in place of rollouts: pairs of a chosen and a rejected response, or responses to imitate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tokcredit.rollouts import Rollouts
from tokcredit.train import records
from tokcredit.train.problems import Message, Problem
from tokcredit.train.prompts import Prompts
from tokcredit.train.records import Record
from tokcredit.train.scoring import left_padded
from tokcredit.train.settings import ChatSettings

PAIRS = ("chosen", "rejected")
"""Names of the responses of a pair, the best first."""
Said = str | tuple[Message, ...]


class Response(NamedTuple):
    """A response to a prompt.

    Attributes:
        text: Its text.
        tokens: Its token ids.
        mask: Which of them the policy chose.
        question: Text of its own prompt, or None for that of the example.
        prompt: Token ids of its own prompt, or None.
        messages: Its own prompt, if it is a chat.
    """

    text: str
    tokens: list[int]
    mask: list[bool]
    question: str | None = None
    prompt: list[int] | None = None
    messages: tuple[Message, ...] = ()


class Example(NamedTuple):
    """A prompt with its responses.

    Attributes:
        question: Text of the prompt.
        prompt: Its token ids.
        responses: The responses, the best first. Of several, the first half are chosen.
        messages: The prompt, if it is a chat.
    """

    question: str
    prompt: list[int]
    responses: list[Response]
    messages: tuple[Message, ...] = ()

    @property
    def rows(self) -> list[tuple[str, list[int], Response]]:
        """Text and token ids of the prompt of each response, and the response."""
        return [
            (self.question if x.question is None else x.question, self.prompt if x.prompt is None else x.prompt, x)
            for x in self.responses
        ]

    def under_own_prompts(self) -> list[Example]:
        """Return an example of each response, with the prompt of that response."""
        return [
            Example(
                question, prompt, [x._replace(question=None, prompt=None, messages=())], x.messages or self.messages
            )
            for question, prompt, x in self.rows
        ]

    def revised(self, words: Callable[[str], str]) -> Example:
        """Return the example with another question: the text, and the last message of a chat.

        Args:
            words: Function from the question to another.
        """
        *before, last = self.messages or (None,)
        messages = () if last is None else (*before, last._replace(content=words(last.content)))
        return self._replace(question=words(self.question), messages=messages)

    @property
    def compares_prompts(self) -> bool:
        """Whether the responses are one response under two prompts."""
        return len(self.responses) == 2 and self.responses[0].tokens == self.responses[1].tokens


class Examples(NamedTuple):
    """The examples of a file.

    Attributes:
        examples: Those that can be trained on.
        notes: What was found in the file, for the user.
    """

    examples: list[Example]
    notes: list[str]


def load(path: Path, names: Sequence[str], tokenizer: Any, chat: ChatSettings, max_tokens: int = 0) -> Examples:
    """Return the examples of a JSONL file, or of a folder of ``datasets.Dataset.save_to_disk``.

    An example has a prompt and, under their names, its responses: all texts, or all messages of a chat. Pairs may leave
    out the prompt; it is then what both responses begin with. As in TRL, texts are continued as they are and end with
    the end token, and chats are put into the chat template of the model. Where an example has ``prompt_ids`` and, for
    every response, token ids under ``NAME_ids``, those are taken; ``NAME_mask`` marks the tokens that train.

    Args:
        path: The file or folder.
        names: :data:`PAIRS`, or the name of the completion.
        tokenizer: Tokenizer of the model.
        chat: System prompt and arguments of the chat template.
        max_tokens: Examples with a longer response are left out; 0 for no limit.

    Raises:
        ValueError: A line or a row has another form, or no example is left.
    """
    option = "pairs" if names is PAIRS else "completions"
    reader = _Reader(option, names, tokenizer, chat)
    required = names if names is PAIRS else ("prompt", *names)
    source = records.of_folder if path.is_dir() else records.of_file
    kept, equal, long = [], 0, 0
    for record in source(option, str(path), required):
        example = reader.example(record)
        first = example.responses[0]
        if len(names) > 1 and all(x.tokens == first.tokens for x in example.responses):
            equal += 1
        elif max_tokens and any(len(x.tokens) > max_tokens for x in example.responses):
            long += 1
        else:
            kept.append(example)
    if not kept:
        raise ValueError(f"{option}: expected at least one example in {path}, got {equal + long} that are left out")
    notes = [
        (equal, "left out because their responses are the same"),
        (long, f"left out because a response has more than {max_tokens} tokens"),
        (reader.cut, "with a prompt whose last tokens are others, and left out, where a response follows"),
    ]
    return Examples(kept, [f"{option} {what}: {count}" for count, what in notes if count])


def batch_of(examples: Sequence[Example], groups: Sequence[int], device: torch.device) -> Rollouts:
    """Return the responses of some examples as packed rows, whose reward is 1 for a response that is chosen, else 0.

    Args:
        examples: The examples.
        groups: Group id of each.
        device: Device of the batch.
    """
    rows = [row for example in examples for row in example.rows]
    sizes = [len(example.responses) for example in examples]
    return Rollouts(
        torch.tensor([t for _, _, x in rows for t in x.tokens], device=device),
        torch.tensor([0, *(len(x.tokens) for _, _, x in rows)], device=device).cumsum(0),
        torch.tensor(groups, device=device).repeat_interleave(torch.tensor(sizes, device=device)),
        torch.tensor([float(2 * i < size) for size in sizes for i in range(size)], device=device),
        torch.tensor([kept for _, _, x in rows for kept in x.mask], device=device),
        extras={"prompt_tokens": left_padded([prompt for _, prompt, _ in rows], -1, device)[0]},
    )


class RevisedPrompts:
    """Token ids of prompts of examples whose question is another; see :meth:`Example.revised`.

    Args:
        tokenizer: Tokenizer of the model.
        chat: System prompt and arguments of the chat template.
    """

    def __init__(self, tokenizer: Any, chat: ChatSettings) -> None:
        self._tokenizer, self._chat = tokenizer, chat

    @cached_property
    def _prompts(self) -> Prompts:
        return Prompts(self._tokenizer, self._chat, "pairs")

    def __call__(self, example: Example) -> list[int]:
        """Return the token ids of the prompt of an example.

        Args:
            example: The example after :meth:`Example.revised`.
        """
        if not example.messages:
            return list(self._tokenizer(example.question).input_ids)
        return self._prompts.templated(example.messages)


class _Reader:
    """Turns records into examples.

    Args:
        option: Name of the option that named the file.
        names: Names of the responses.
        tokenizer: Tokenizer of the model.
        chat: System prompt and arguments of the chat template.

    Attributes:
        cut: Number of examples whose prompt does not end where its tokens end.
    """

    def __init__(self, option: str, names: Sequence[str], tokenizer: Any, chat: ChatSettings) -> None:
        self._option, self._names, self._tokenizer, self._chat = option, names, tokenizer, chat
        self._prompts = Prompts(tokenizer, chat, option)
        self._known = frozenset(tokenizer.get_vocab().values())
        self.cut = 0

    def example(self, record: Record) -> Example:
        prompt, *responses = self._said(record)
        if isinstance(prompt, tuple):
            self._prompts.check(Problem("", _text(prompt), "", float, messages=prompt))
        elif self._chat != ChatSettings():
            raise record.expected("system_prompt, chat_template_args", "messages of chats", "a text")
        named = ("prompt_ids", *(f"{name}_ids" for name in self._names))
        if all(record.values.get(name) is not None for name in named):
            ids = [self._ids(record, name) for name in named]
            for name, said, tokens in zip(self._names, responses, ids[1:], strict=True):
                self._check_ids(record, name, said, tokens)
        else:
            ids = self._tokenized(prompt, responses)
        if not ids[0]:
            raise record.expected(self._option, "a prompt of at least one token", record.text)
        made = [
            Response(_text(said), tokens, self._mask(record, name, len(tokens)))
            for name, said, tokens in zip(self._names, responses, ids[1:], strict=True)
        ]
        return Example(_text(prompt), ids[0], made, prompt if isinstance(prompt, tuple) else ())

    def _said(self, record: Record) -> list[Said]:
        """Return the prompt and the responses, all texts or all chats."""
        responses = [self._one(record, name) for name in self._names]
        chats = {isinstance(x, tuple) for x in responses}
        if len(chats) > 1:
            raise record.expected(self._option, f"texts or chats as {' and '.join(self._names)}", "one of each")
        prompt = record.values.get("prompt")
        if prompt is None or (chats == {True} and isinstance(prompt, str)):
            if len(responses) == 1:
                raise record.expected(self._option, "a prompt that is a chat, as its completion is", record.text)
            # TRL's implicit prompt; some data sets also repeat it as a text.
            prompt, *responses = _without_prompt(*responses)
        else:
            prompt = self._one(record, "prompt")
        if isinstance(prompt, tuple) is not (chats == {True}):
            raise record.expected(self._option, "a prompt of the same kind as the responses", record.text)
        if prompt == () or () in responses:
            raise record.expected(self._option, "a message in the prompt and in every response", record.text)
        return [prompt, *responses]

    def _one(self, record: Record, name: str) -> Said:
        value = record.values[name]
        if isinstance(value, str):
            return value
        if (chat := records.messages(value)) is None:
            what = f"{name} that is a text, or messages [{{'role', 'content'}}, ...] of texts"
            raise record.expected(self._option, what, f"{str(value)[:100]!r}")
        return chat

    def _tokenized(self, prompt: Said, responses: Sequence[Said]) -> list[list[int]]:
        """Return the tokens of the prompt and of the responses, which begin where tokens first differ, as in TRL."""
        if isinstance(prompt, tuple):
            begin = self._prompts.templated(prompt)
            whole = [self._prompts.templated((*prompt, *x), add_generation_prompt=False) for x in responses]
        else:
            begin = self._tokenizer(prompt).input_ids
            whole = [self._tokenizer(prompt + self._ended(str(x))).input_ids for x in responses]
        length = min(_common(begin, ids) for ids in whole)
        self.cut += length < len(begin)
        return [begin[:length], *(ids[length:] for ids in whole)]

    def _ended(self, text: str) -> str:
        end = self._tokenizer.eos_token or ""
        return text if text.endswith(end) else text + end

    def _ids(self, record: Record, name: str) -> list[int]:
        ids = record.values[name]
        if not isinstance(ids, list) or not all(type(x) is int and x in self._known for x in ids):
            raise record.expected(self._option, f"{name} that are token ids of the model", f"{str(ids)[:100]!r}")
        return ids

    def _check_ids(self, record: Record, name: str, said: Said, ids: list[int]) -> None:
        if not ids:
            raise record.expected(self._option, f"at least one token in {name}_ids", "none")
        decoded = self._tokenizer.decode(ids, skip_special_tokens=True)
        if _text(said) not in (decoded, self._tokenizer.decode(ids)):
            what = f"{name}_ids that are the text of {name} for the tokenizer of the model"
            advice = "; tokcredit pairs --texts-only writes no token ids"
            raise record.expected(self._option, what, f"ids of {decoded[:100]!r}{advice}")

    def _mask(self, record: Record, name: str, length: int) -> list[bool]:
        mask = record.values.get(f"{name}_mask")
        if mask is None:
            return [True] * length
        if not isinstance(mask, list) or len(mask) != length or not all(type(x) is bool for x in mask) or not any(mask):
            what = f"{name}_mask of {length} values true or false, one of them true"
            raise record.expected(self._option, what, f"{str(mask)[:100]!r}")
        return mask


def _text(said: Said) -> str:
    """Return a text, or those of the messages, with their roles if there are several."""
    if isinstance(said, str):
        return said
    return said[0].content if len(said) == 1 else "\n\n".join(f"{m.role}: {m.content}" for m in said)


def _common(a: Sequence[Any], b: Sequence[Any]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _without_prompt(first: Said, second: Said) -> Iterator[Said]:
    """Yield what two responses begin with, and their rests. A space at its end belongs to the rests, as in TRL."""
    length = _common(first, second)
    if isinstance(first, str) and first[:length].endswith(" "):
        length -= 1
    yield first[:length]
    yield first[length:]
    yield second[length:]
