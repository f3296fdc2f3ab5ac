"""Rollout collection in turns: the model says something, tools or an environment answer, and so on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from tokcredit.blocks import tree
from tokcredit.rollouts import Rollouts
from tokcredit.spans import Spans
from tokcredit.train.problems import Problem
from tokcredit.train.rollout_collection import RolloutCollection, RolloutCollector, SamplingContext
from tokcredit.train.scoring import left_padded


class Turn(NamedTuple):
    """A turn of the model.

    Attributes:
        begin: Its first token among those of the dialogue.
        end: One past its last token.
        text: Its text.
        whole: Whether the model ended it by itself.
    """

    begin: int
    end: int
    text: str
    whole: bool


@dataclass
class Dialogue:
    """What follows a prompt.

    Attributes:
        problem: The problem.
        prompt: Token ids of the prompt.
        tokens: Token ids after the prompt.
        log_probs: Log-prob of each of them, 0 for what the model did not say.
        turns: Turns of the model.
        answers: What followed each turn, also where it was not told to the model.
        finished: Whether it came to its end.
    """

    problem: Problem
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    finished: bool = False

    def say(self, tokens: list[int], log_probs: list[float], text: str, whole: bool) -> None:
        """Add a turn of the model.

        Args:
            tokens: Its token ids, at least one.
            log_probs: Their log-probs.
            text: Its text.
            whole: Whether the model ended it by itself.
        """
        self.turns.append(Turn(len(self.tokens), len(self.tokens) + len(tokens), text, whole))
        self.tokens += tokens
        self.log_probs += log_probs

    def hear(self, tokens: list[int]) -> None:
        """Add what the model reads before its next turn.

        Args:
            tokens: Token ids.
        """
        self.tokens += tokens
        self.log_probs += [0.0] * len(tokens)

    def of_tokens(self, of_turns: Sequence[Any], other: Any, last_only: bool = True) -> list[Any]:
        """Return a value for each token, from one for each turn.

        Args:
            of_turns: The values of the turns.
            other: The value of the other tokens.
            last_only: Whether the other tokens of a turn have it too, but for its last.
        """
        out = [other] * len(self.tokens)
        for turn, value in zip(self.turns, of_turns, strict=True):
            for at in range(turn.end - 1 if last_only else turn.begin, turn.end):
                out[at] = value
        return out


D = TypeVar("D", bound=Dialogue)


class _Row(NamedTuple):
    """A row of a batch: some turns of a dialogue, and what lies between them."""

    dialogue: int
    begin: int
    end: int
    first_turn: int
    last_turn: int


class Layout:
    """The rows that dialogues become: one for each, or one for each turn.

    Args:
        dialogues: The dialogues, each with a turn.
        per_turn: Whether a row is a turn. The prompt of the row is then all that the model had read and said before.
        device: Device of the tensors.
    """

    def __init__(self, dialogues: Sequence[Dialogue], per_turn: bool, device: torch.device) -> None:
        self._dialogues, self._per_turn, self._device = dialogues, per_turn, device
        self._rows: list[_Row] = []
        for number, d in enumerate(dialogues):
            if per_turn:
                self._rows += [_Row(number, turn.begin, turn.end, k, k + 1) for k, turn in enumerate(d.turns)]
            else:
                self._rows.append(_Row(number, 0, len(d.tokens), 0, len(d.turns)))

    def of_rows(self, values: Sequence[Any]) -> list[Any]:
        """Return the value of each row's dialogue.

        Args:
            values: One for each dialogue.
        """
        return [values[row.dialogue] for row in self._rows]

    def of_turns(self, values: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """Return the values of the turns of each row.

        Args:
            values: For each dialogue one for each turn.
        """
        return [list(values[row.dialogue][row.first_turn : row.last_turn]) for row in self._rows]

    def of_tokens(self, values: Sequence[Sequence[Any]], dtype: torch.dtype | None = None) -> Tensor:
        """Return the values of the tokens of all rows, ``[N]``.

        Args:
            values: For each dialogue one for each token.
            dtype: Dtype, or None for that of the values.
        """
        found = [x for row in self._rows for x in values[row.dialogue][row.begin : row.end]]
        return torch.tensor(found, device=self._device, dtype=dtype)

    def batch(self, group_ids: Sequence[int], outcomes: Tensor) -> Rollouts:
        """Return the batch of the rows.

        Args:
            group_ids: Group of each dialogue.
            outcomes: float, outcome of each dialogue; NaN becomes 0.
        """
        of_row = torch.tensor([row.dialogue for row in self._rows], device=self._device)
        lengths = torch.tensor([0, *(row.end - row.begin for row in self._rows)], device=self._device)
        dialogues = self._dialogues
        prompts = [dialogues[row.dialogue].prompt + dialogues[row.dialogue].tokens[: row.begin] for row in self._rows]
        # An episode has the same number in all processes, which share the groups.
        count = len(dialogues) // len(set(group_ids))
        ids = [group * count + number % count for number, group in enumerate(group_ids)]
        # All processes have the same inputs, also one whose dialogues have a turn each.
        known = {"context_keys": self._keys(prompts)} if self._per_turn else {}
        return Rollouts(
            self.of_tokens([d.tokens for d in dialogues]),
            lengths.cumsum(0),
            group_ids=torch.tensor(group_ids, device=self._device)[of_row],
            rewards=outcomes.nan_to_num()[of_row],
            response_mask=self.of_tokens([d.of_tokens([True] * len(d.turns), False, False) for d in dialogues]),
            rollout_log_probs=self.of_tokens([d.log_probs for d in dialogues]),
            trajectory_ids=torch.tensor(ids, device=self._device)[of_row],
            extras={
                "prompt_tokens": left_padded(prompts, -1, self._device)[0],
                "turn_ids": self.of_tokens([d.of_tokens(range(len(d.turns)), 0, False) for d in dialogues]),
                "truncated": torch.tensor(
                    [
                        row.last_turn == len(dialogues[row.dialogue].turns) and not dialogues[row.dialogue].finished
                        for row in self._rows
                    ],
                    device=self._device,
                ),
                **known,
            },
        )

    def _keys(self, contexts: list[list[int]]) -> Tensor:
        edges = torch.tensor([0, *map(len, contexts)], device=self._device).cumsum(0)
        tokens = torch.tensor([t for context in contexts for t in context], device=self._device)
        return tree.context_keys(tokens, Spans.from_cu_seqlens(edges))


class Dialogues(RolloutCollector, Generic[D]):
    """Base of the collectors of dialogues: several about every prompt, each up to its end or to the limit of turns.

    What answers the model is part of the row with a False ``response_mask``, or of the prompt of a later row.

    Args:
        context: Problems and sampler.

    Attributes:
        stop: Texts that end a turn.
    """

    stop: tuple[str, ...] = ()

    def __init__(self, context: SamplingContext) -> None:
        super().__init__(context)
        self._turns = context.settings.tools.turns

    def begun(self, problem: Problem, prompt: list[int], number: int) -> D:
        """Return a dialogue before its first turn.

        Args:
            problem: The problem.
            prompt: Token ids of the prompt.
            number: Number of the dialogue among those about the problem, from 0.
        """
        raise NotImplementedError

    def answered(self, dialogues: Sequence[D]) -> list[list[int]]:
        """Add the answer to the last turn of each dialogue, and return what the model reads: no token at the end.

        Args:
            dialogues: The dialogues.
        """
        raise NotImplementedError

    def _sampled(self, number: int) -> tuple[list[D], list[int]]:
        """Return the dialogues of a step and the group of each."""
        s, context = self._context.settings.sampling, self._context
        groups, chosen = context.chosen(number)
        context.sampler.sync()
        with torch.random.fork_rng():
            context.seeded(number)
            made = self._converse(chosen, s.group, s.temperature)
        return made, [group for group in groups for _ in range(s.group)]

    def _layout(self, made: Sequence[D]) -> Layout:
        context = self._context
        return Layout(made, context.settings.tools.episode_rows == "call", context.sampler.device)

    def _collection(
        self, layout: Layout, batch: Rollouts, made: Sequence[D], groups: Sequence[int], outcomes: Tensor
    ) -> RolloutCollection:
        return RolloutCollection(
            layout.of_rows([d.problem for d in made]),
            self._context.texts(batch.tokens, batch.cu_seqlens),  # type: ignore[arg-type]
            batch,
            outcomes,
            torch.tensor(groups, device=batch.device),
            torch.tensor([d.finished for d in made]),
            torch.tensor(layout.of_rows(outcomes.isnan().tolist()), device=batch.device),
            {"answers": layout.of_turns([d.answers for d in made])},
        )

    def _converse(self, problems: Sequence[Problem], count: int, temperature: float) -> list[D]:
        context = self._context
        prompts = [context.prompt(self._introduced(p)) for p in problems]
        pairs = zip(problems, prompts, strict=True)
        everything = [self.begun(problem, prompt, number) for problem, prompt in pairs for number in range(count)]
        going = everything
        for turn in range(self._turns):
            if turn:
                prompts, count = [d.prompt + d.tokens for d in going], 1
            made = context.complete(prompts, count, temperature, stop=self.stop)
            sizes = made.cu_seqlens.diff().tolist()
            rows = zip(made.tokens.split(sizes), made.log_probs.split(sizes), strict=True)
            texts, ended = context.texts(made.tokens, made.cu_seqlens), made.finished.tolist()
            for d, (tokens, log_probs), text, whole in zip(going, rows, texts, ended, strict=True):
                d.say(tokens.tolist(), log_probs.tolist(), text, whole)
            read = zip(going, self.answered(going), strict=True)
            waiting = [(d, tokens) for d, tokens in read if tokens]
            if not waiting or turn + 1 == self._turns:
                break
            for d, tokens in waiting:
                d.hear(tokens)
            going = [d for d, _ in waiting]
        return everything

    def _introduced(self, problem: Problem) -> Problem:
        if self._context.tokenizer.chat_template is None or not problem.introduction:
            return problem
        return problem._replace(question=f"{problem.introduction}\n{problem.question}")
