"""From problems to rewarded rollouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from tokcredit.rollouts import Rollouts
from tokcredit.train import tasks
from tokcredit.train.ranks import Ranks
from tokcredit.train.sampler import Completions, Sampler
from tokcredit.train.scoring import left_padded
from tokcredit.train.settings import Settings


class Explored(NamedTuple):
    """Rollouts of this process, whole groups.

    Attributes:
        problems: of each row.
        replies: text of each row.
        batch: the rows, with their prompts in ``extras["prompt_tokens"]``.
        outcomes: float ``[*]``, rewards of whole replies, for the record.
        finished: bool ``[*]``, whether the model ended each of them by itself.
    """

    problems: list[tasks.Problem]
    replies: list[str]
    batch: Rollouts
    outcomes: Tensor
    finished: Tensor


class Explorer(Protocol):
    """Makes the rollouts of a step. What it remembers from one step to the next is its state."""

    def explore(self, number: int) -> Explored:
        """Rewarded rollouts for step ``number``, counted from 1."""

    def attempt(self, problems: Sequence[tasks.Problem]) -> list[float]:
        """Rewards of one greedy attempt at each of some problems."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def prompt_tokens(tokenizer: Any, question: str) -> list[int]:
    """Token ids of a question in the chat template, if there is one, up to where the reply begins."""
    if tokenizer.chat_template is None:
        return list(tokenizer(question).input_ids)
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False).input_ids)


class SamplingContext:
    """Asks a sampler: prompts as the model expects them, random numbers of the step, texts of the answers.

    Args:
        settings: of the run.
        problems: what is asked.
        tokenizer: of the model; its chat template, if it has one, wraps every question.
        sampler: what answers.
        ranks: the processes, which share the problems of a step.
    """

    def __init__(self, settings: Settings, problems: tasks.Problems, tokenizer: Any, sampler: Sampler, ranks: Ranks):
        if settings.sampling.prompts % ranks.count:
            raise ValueError(
                f"prompts: expected a multiple of the {ranks.count} processes, got {settings.sampling.prompts}"
            )
        self.settings, self.problems, self.ranks = settings, problems, ranks
        self.tokenizer, self.sampler = tokenizer, sampler

    def chosen(self, number: int) -> tuple[list[int], list[tasks.Problem]]:
        """The problems of step ``number`` that this process asks, and their numbers among those of all processes."""
        everything = self.problems.step(number - 1, self.settings.sampling.prompts, self.settings.seed)
        mine = range(self.ranks.index, len(everything), self.ranks.count)
        return list(mine), [everything[i] for i in mine]

    def seeded(self, number: int, *purpose: int) -> torch.Generator:
        """Torch's own generator, seeded for the step: a resumed run draws what an uninterrupted one would.

        Use inside ``torch.random.fork_rng()``; what draws besides the rollouts names a purpose of its own.
        """
        seed = np.random.SeedSequence([self.settings.seed, number, self.ranks.index], spawn_key=purpose)
        mixed = seed.generate_state(1, np.uint64)
        return torch.manual_seed(int(mixed[0]) >> 1)

    def prompt(self, question: str) -> list[int]:
        """Token ids of a question, up to where the reply begins."""
        return prompt_tokens(self.tokenizer, question)

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        count: int,
        temperature: float,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
    ) -> Completions:
        """``count`` continuations of each prompt; there may be no prompt."""
        if not prompts:
            nothing = torch.zeros(0, dtype=torch.int64)
            return Completions(nothing, nothing.new_zeros(1), nothing.float(), nothing.bool())
        limit = self.settings.sampling.max_tokens if max_tokens is None else max_tokens
        return self.sampler.sample(prompts, count, limit, temperature, stop)

    def texts(self, tokens: Tensor, cu_seqlens: Tensor) -> list[str]:
        """Text of each row."""
        rows = tokens.split(cu_seqlens.diff().tolist())
        return list(self.tokenizer.batch_decode(rows, skip_special_tokens=True))

    def attempt(self, problems: Sequence[tasks.Problem]) -> list[float]:
        """Rewards of a greedy reply to each problem."""
        made = self.complete([self.prompt(p.question) for p in problems], 1, 0.0)
        replies = self.texts(made.tokens, made.cu_seqlens)
        return [p.reward(reply) for p, reply in zip(problems, replies, strict=True)]

    def evaluate(self, attempt: Callable[[Sequence[tasks.Problem]], list[float]]) -> float:
        """Mean reward of attempts at held-out problems, over all processes."""
        chosen = self.problems.measured(self.settings.eval_problems)[self.ranks.index :: self.ranks.count]
        self.sampler.sync()
        rewards = attempt(chosen)
        total = self.ranks.sum({"reward": torch.tensor(rewards).sum(), "count": torch.tensor(len(rewards))})
        return total["reward"] / total["count"]


class Replies:
    """Several replies to every prompt: the rows of a group are alike and independent."""

    def __init__(self, context: SamplingContext) -> None:
        self._context = context

    def explore(self, number: int) -> Explored:
        return self.answers(number, *self._context.chosen(number))

    def answers(self, number: int, numbers: Sequence[int], chosen: Sequence[tasks.Problem]) -> Explored:
        """Replies at step ``number`` to these problems, whose groups have these numbers."""
        context, count = self._context, self._context.settings.sampling.group
        prompts = [context.prompt(p.question) for p in chosen]
        context.sampler.sync()
        with torch.random.fork_rng():
            context.seeded(number)
            made = context.complete(prompts, count, context.settings.sampling.temperature)
        replies = context.texts(made.tokens, made.cu_seqlens)
        problems = [p for p in chosen for _ in range(count)]
        device = made.tokens.device
        rewards = torch.tensor([p.reward(r) for p, r in zip(problems, replies, strict=True)], device=device)
        batch = Rollouts(
            made.tokens,
            made.cu_seqlens,
            group_ids=torch.tensor(numbers, device=device).repeat_interleave(count),
            rewards=rewards,
            rollout_log_probs=made.log_probs,
            extras={
                "prompt_tokens": left_padded(prompts, -1, device)[0].repeat_interleave(count, 0),
                "truncated": ~made.finished,
            },
        )
        return Explored(problems, replies, batch, rewards, made.finished)

    def attempt(self, problems: Sequence[tasks.Problem]) -> list[float]:
        return self._context.attempt(problems)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        return None
