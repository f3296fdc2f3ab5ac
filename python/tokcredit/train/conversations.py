"""Rollout collection in which the model and its tools take turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from tokcredit.rewards import matching
from tokcredit.rewards.answers import tagged
from tokcredit.rewards.matching import Similarities
from tokcredit.rollouts import Rollouts
from tokcredit.train import tools
from tokcredit.train.problems import Problem
from tokcredit.train.rollout_collection import RolloutCollection, RolloutCollector, SamplingContext
from tokcredit.train.scoring import left_padded


@dataclass
class _Conversation:
    """What follows a prompt. ``mask`` is True for the model's tokens; ``turns`` are the texts of the model's turns."""

    problem: Problem
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    turns: list[str] = field(default_factory=list)
    finished: bool = False

    def append(self, tokens: list[int], log_probs: list[float], by_model: bool) -> None:
        self.tokens += tokens
        self.mask += [by_model] * len(tokens)
        self.log_probs += log_probs

    def rewards(self, rule: Callable[[Similarities], Similarities]) -> list[float]:
        """Return the reward of each turn: how well its answer, or else its calls, match what was expected."""
        found = [
            tools.calls(turn) if (answer := tagged(turn)) is None else matching.f1(answer, self.problem.answer)
            for turn in self.turns
        ]
        return matching.rewards(found, self.problem.calls or (), rule)


class Conversations(RolloutCollector):
    """Collects several conversations about every prompt, each up to an answer, or to a turn without a tool call.

    The tools answer every call at the end of a turn. Their tokens are part of the row with a False ``response_mask``.
    ``turn_rewards`` has the reward of each turn for its calls or its answer; the reward of the row is that of the
    whole text.

    Args:
        context: Problems, which state the expected calls, and the sampler.

    Raises:
        ValueError: A problem states no calls.
    """

    def __init__(self, context: SamplingContext) -> None:
        super().__init__(context)
        self._turns = context.settings.tools.turns
        self._rule = tools.rule(context.settings.tools.matching)
        everything = [*context.problems.held_out, *(p for task in context.problems.train for p in task)]
        if without := sorted({p.task for p in everything if p.calls is None}):
            raise ValueError(f"tasks: expected only tasks with tools, such as calculator(), got {without}")

    def collect(self, number: int) -> RolloutCollection:
        """Return the rewarded conversations of a step.

        Args:
            number: Number of the step, from 1.
        """
        context, s = self._context, self._context.settings.sampling
        groups, chosen = context.chosen(number)
        context.sampler.sync()
        with torch.random.fork_rng():
            context.seeded(number)
            made = self._converse(chosen, s.group, s.temperature)
        device = context.sampler.device
        edges = torch.tensor([0, *(len(c.tokens) for c in made)], device=device).cumsum(0)
        tokens = torch.tensor([t for c in made for t in c.tokens], device=device)
        texts = context.texts(tokens, edges)
        rewards = torch.tensor(context.rewards([c.problem for c in made], texts), device=device)
        batch = Rollouts(
            tokens,
            edges,
            group_ids=torch.tensor(groups, device=device).repeat_interleave(s.group),
            rewards=rewards.nan_to_num(),
            response_mask=torch.tensor([x for c in made for x in c.mask], device=device),
            rollout_log_probs=torch.tensor([x for c in made for x in c.log_probs], device=device),
            extras={"prompt_tokens": left_padded([c.prompt for c in made], -1, device)[0]},
        )
        batch = batch.with_inputs(turn_rewards=matching.turn_rewards(batch, [c.rewards(self._rule) for c in made]))
        finished = torch.tensor([c.finished for c in made])
        problems, dropped = [c.problem for c in made], rewards.isnan()
        return RolloutCollection(problems, texts, batch, rewards, batch.group_ids, finished, dropped)

    def attempt(self, problems: Sequence[Problem]) -> list[float]:
        """Return the reward of one greedy conversation about each problem.

        Args:
            problems: The problems.
        """
        made = self._converse(problems, 1, 0.0)
        texts = self._context.tokenizer.batch_decode([c.tokens for c in made], skip_special_tokens=True)
        return self._context.rewards(problems, texts)

    def _converse(self, problems: Sequence[Problem], count: int, temperature: float) -> list[_Conversation]:
        context = self._context
        prompts = [context.prompt(self._introduced(p)) for p in problems]
        pairs = zip(problems, prompts, strict=True)
        everything = [_Conversation(problem, prompt) for problem, prompt in pairs for _ in range(count)]
        going = everything
        for turn in range(self._turns):
            if turn:
                for c in going:
                    answer = tools.results(tools.calls(c.turns[-1]))
                    result = context.tokenizer(answer, add_special_tokens=False).input_ids
                    c.append(result, [0.0] * len(result), by_model=False)
                prompts, count = [c.prompt + c.tokens for c in going], 1
            made = context.complete(prompts, count, temperature, stop=(tools.STOP,))
            sizes = made.cu_seqlens.diff().tolist()
            rows = zip(made.tokens.split(sizes), made.log_probs.split(sizes), strict=True)
            texts, ended = context.texts(made.tokens, made.cu_seqlens), made.finished.tolist()
            waiting = []
            for c, (tokens, log_probs), text, whole in zip(going, rows, texts, ended, strict=True):
                c.append(tokens.tolist(), log_probs.tolist(), by_model=True)
                c.turns.append(text)
                calls_tools = tagged(text) is None and bool(tools.calls(text))
                c.finished = whole and not calls_tools
                if whole and calls_tools:
                    waiting.append(c)
            going = waiting
            if not going:
                break
        return everything

    def _introduced(self, problem: Problem) -> Problem:
        if self._context.tokenizer.chat_template is None:
            return problem
        return problem._replace(question=f"{tools.INTRODUCTION}\n{problem.question}")
