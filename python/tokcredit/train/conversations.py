"""Rollouts in which the model and its tools take turns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tokcredit.rewards import matching
from tokcredit.rewards.matching import Similarities
from tokcredit.rollouts import Rollouts
from tokcredit.train import tools
from tokcredit.train.explorer import SamplingContext, Explored
from tokcredit.train.scoring import left_padded
from tokcredit.train.tasks import Problem, tagged


@dataclass
class _Talk:
    """What was said after a prompt. ``mask`` tells the model's tokens from the tools'; ``turns`` are the model's."""

    problem: Problem
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    turns: list[str] = field(default_factory=list)
    finished: bool = False

    def say(self, tokens: list[int], log_probs: list[float], own: bool) -> None:
        self.tokens += tokens
        self.mask += [own] * len(tokens)
        self.log_probs += log_probs

    def rewards(self, rule: Callable[[Similarities], Similarities]) -> list[float]:
        """Of each turn: how well its answer, or else its calls, are what was expected."""
        said = [
            tools.calls(turn) if (answer := tagged(turn)) is None else matching.f1(answer, self.problem.answer)
            for turn in self.turns
        ]
        return matching.rewards(said, self.problem.calls or (), rule)


class Conversations:
    """Several conversations about every prompt, each up to an answer, or a turn that calls nothing.

    The tools answer every call that ends a turn. Their tokens are part of the row, but masked. ``turn_rewards`` pay a
    turn for its calls or its answer; the reward of the row is that of the whole text.

    Args:
        desk: asks the sampler, about problems that tell which calls are expected.

    Raises:
        ValueError: a problem does not, or the settings of tools are wrong.
    """

    def __init__(self, context: SamplingContext) -> None:
        self._context, self._turns = context, context.settings.tools.turns
        self._rule = tools.rule(context.settings.tools.matching)
        if self._turns < 1:
            raise ValueError(f"turns: expected at least 1, got {self._turns}")
        everything = [*context.problems.held_out, *(p for task in context.problems.train for p in task)]
        if without := sorted({p.task for p in everything if p.calls is None}):
            raise ValueError(f"tasks: expected only ones that call tools, such as calculator(), got {without}")

    def explore(self, number: int) -> Explored:
        context, s = self._context, self._context.settings.sampling
        numbers, chosen = context.chosen(number)
        context.sampler.sync()
        with torch.random.fork_rng():
            context.seeded(number)
            talks = self._talk(chosen, s.group, s.temperature)
        device = context.sampler.device
        edges = torch.tensor([0, *(len(t.tokens) for t in talks)], device=device).cumsum(0)
        tokens = torch.tensor([x for t in talks for x in t.tokens], device=device)
        texts = context.texts(tokens, edges)
        rewards = torch.tensor([t.problem.reward(x) for t, x in zip(talks, texts, strict=True)], device=device)
        batch = Rollouts(
            tokens,
            edges,
            group_ids=torch.tensor(numbers, device=device).repeat_interleave(s.group),
            rewards=rewards,
            response_mask=torch.tensor([x for t in talks for x in t.mask], device=device),
            rollout_log_probs=torch.tensor([x for t in talks for x in t.log_probs], device=device),
            extras={"prompt_tokens": left_padded([t.prompt for t in talks], -1, device)[0]},
        )
        paid = matching.turn_rewards(batch, [t.rewards(self._rule) for t in talks])
        batch = dataclasses.replace(batch, extras={**batch.extras, "turn_rewards": paid})
        return Explored([t.problem for t in talks], texts, batch, rewards, torch.tensor([t.finished for t in talks]))

    def attempt(self, problems: Sequence[Problem]) -> list[float]:
        talks = self._talk(problems, 1, 0.0)
        texts = self._context.tokenizer.batch_decode([t.tokens for t in talks], skip_special_tokens=True)
        return [t.problem.reward(text) for t, text in zip(talks, texts, strict=True)]

    def _talk(self, problems: Sequence[Problem], count: int, temperature: float) -> list[_Talk]:
        context = self._context
        prompts = [context.prompt(self._question(p)) for p in problems]
        talks = [_Talk(p, prompt) for p, prompt in zip(problems, prompts, strict=True) for _ in range(count)]
        going = talks
        for turn in range(self._turns):
            if turn:
                for talk in going:
                    said = context.tokenizer(tools.reply(tools.calls(talk.turns[-1])), add_special_tokens=False).input_ids
                    talk.say(said, [0.0] * len(said), own=False)
                prompts, count = [talk.prompt + talk.tokens for talk in going], 1
            made = context.complete(prompts, count, temperature, stop=(tools.STOP,))
            sizes = made.cu_seqlens.diff().tolist()
            rows = zip(made.tokens.split(sizes), made.log_probs.split(sizes), strict=True)
            texts, ended = context.texts(made.tokens, made.cu_seqlens), made.finished.tolist()
            waiting = []
            for talk, (tokens, log_probs), text, whole in zip(going, rows, texts, ended, strict=True):
                talk.say(tokens.tolist(), log_probs.tolist(), own=True)
                talk.turns.append(text)
                asks = tagged(text) is None and bool(tools.calls(text))
                talk.finished = whole and not asks
                if whole and asks:
                    waiting.append(talk)
            going = waiting
            if not going:
                break
        return talks

    def _question(self, problem: Problem) -> str:
        if self._context.tokenizer.chat_template is None:
            return problem.question
        return f"{tools.INTRODUCTION}\n{problem.question}"

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        return None
