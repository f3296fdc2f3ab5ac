"""Rollout collection: from the problems of a step to rewarded rollouts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokcredit.blocks import segment
from tokcredit.rollouts import Rollouts
from tokcredit.train.judging import Judging, RewardError
from tokcredit.train.problems import Problem, Problems
from tokcredit.train.prompts import Prompts
from tokcredit.train.ranks import Ranks
from tokcredit.train.sampler import Completions, Sampler
from tokcredit.train.scoring import left_padded
from tokcredit.train.settings import Settings


class RolloutCollection(NamedTuple):
    """The rollouts of a step in this process, whole groups.

    ``outcomes``, ``outcome_groups`` and ``finished`` describe whole responses to the problems of the step; the metrics
    of a step are computed from them. They differ from the rows if rows are parts of responses, or were sampled earlier.
    An outcome is NaN where the reward function failed and such responses are dropped; see :meth:`judged`.

    Attributes:
        problems: Problem of each row.
        responses: Text of each row.
        batch: The rows, packed, with the input ``prompt_tokens``.
        outcomes: float ``[M]``, rewards of whole responses.
        outcome_groups: Integers ``[M]``, group of each of these responses.
        finished: bool ``[M]``, whether the model ended each of these responses by itself.
        dropped: bool ``[R]``, rows to drop because no response that they are part of has a reward.
        columns: What is recorded of the rows beside, for each column a value per row.
    """

    problems: list[Problem]
    responses: list[str]
    batch: Rollouts
    outcomes: Tensor
    outcome_groups: Tensor
    finished: Tensor
    dropped: Tensor
    columns: Mapping[str, list[Any]] = MappingProxyType({})

    def judged(self, ranks: Ranks) -> RolloutCollection:
        """Return the collection without dropped rows and without responses whose outcome is NaN.

        There may be no row left in a process if there is one in another.

        Args:
            ranks: The processes, all of which must call it.

        Raises:
            RewardError: No row is left in any process.
        """
        kept, responses = (~self.dropped).nonzero()[:, 0].tolist(), (~self.outcomes.isnan()).nonzero()[:, 0]
        left = ranks.sum({"rows": torch.tensor(len(kept)), "responses": torch.tensor(len(responses))})
        if not left["rows"] or not left["responses"]:
            raise RewardError("on_reward_error: expected a reward of at least one response of the step, got none")
        if len(kept) == self.batch.num_rows and len(responses) == len(self.outcomes):
            return self
        return self._rows(kept)._replace(
            outcomes=self.outcomes[responses],
            outcome_groups=self.outcome_groups[responses],
            finished=self.finished[responses.to(self.finished.device)],
        )

    def paired(self) -> RolloutCollection:
        """Return the collection without groups that are no pair: two rows with different rewards."""
        groups, rewards = self.batch.groups, self.batch.rewards
        differ = segment.maximum(rewards, groups) > segment.minimum(rewards, groups)
        return self._rows(groups.per_row(differ & (groups.sizes == 2)).nonzero()[:, 0].tolist())

    def _rows(self, kept: list[int]) -> RolloutCollection:
        """Return the collection with some of its rows, and all its responses."""
        return self._replace(
            problems=[self.problems[row] for row in kept],
            responses=[self.responses[row] for row in kept],
            batch=self.batch.select(kept),
            dropped=self.dropped[kept],
            columns={name: [column[row] for row in kept] for name, column in self.columns.items()},
        )


class SamplingContext:
    """What every rollout collector needs: problems, prompts, the sampler, rewards, and random numbers of the step.

    Args:
        settings: Settings of the run.
        problems: Training and held-out problems.
        tokenizer: Tokenizer of the model; its chat template, if it has one, wraps every question.
        sampler: Engine that continues prompts.
        ranks: The processes, which share the problems of a step.

    Raises:
        ValueError: The prompts of a step cannot be shared out evenly, or the chat template does not fit the settings.

    Attributes:
        prompt: Token ids of a problem up to where the response begins.
        rewards: Rewards of responses to problems.
    """

    def __init__(self, settings: Settings, problems: Problems, tokenizer: Any, sampler: Sampler, ranks: Ranks) -> None:
        if settings.sampling.prompts % ranks.count:
            raise ValueError(
                f"prompts: expected a multiple of the {ranks.count} processes, got {settings.sampling.prompts}"
            )
        self.settings, self.problems, self.ranks = settings, problems, ranks
        self.tokenizer, self.sampler = tokenizer, sampler
        self.prompt = Prompts(tokenizer, settings.chat)
        for problem in (*problems.held_out, *(p for task in problems.train for p in task)):
            self.prompt.check(problem)
        self.rewards = Judging(settings.on_reward_error)

    def chosen(self, number: int) -> tuple[list[int], list[Problem]]:
        """Return the problems of a step for this process, with their numbers among those of all processes.

        Args:
            number: Number of the step, from 1.

        Returns:
            The numbers, and the problems.
        """
        everything = self.problems.step(number - 1, self.settings.sampling.prompts, self.settings.seed)
        mine = range(self.ranks.index, len(everything), self.ranks.count)
        return list(mine), [everything[i] for i in mine]

    def seeded(self, number: int, *purpose: int) -> torch.Generator:
        """Seed torch's default generator for a step, so that a resumed run samples what an uninterrupted one would.

        Call it inside ``torch.random.fork_rng()``.

        Args:
            number: Number of the step, from 1.
            purpose: Numbers that tell apart several uses in one step; none for the rollouts themselves.
        """
        seed = np.random.SeedSequence([self.settings.seed, number, self.ranks.index], spawn_key=purpose)
        mixed = seed.generate_state(1, np.uint64)
        return torch.manual_seed(int(mixed[0]) >> 1)

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        count: int,
        temperature: float,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
    ) -> Completions:
        """Return sampled continuations of prompts.

        Args:
            prompts: Token ids; there may be no prompt.
            count: Continuations of each prompt.
            temperature: Sampling temperature; 0 is greedy.
            max_tokens: Largest number of tokens of a continuation, or None for that of the settings.
            stop: Texts that end a continuation.
        """
        if not prompts:
            nothing = torch.zeros(0, dtype=torch.int64)
            return Completions(nothing, nothing.new_zeros(1), nothing.float(), nothing.bool())
        limit = self.settings.sampling.max_tokens if max_tokens is None else max_tokens
        return self.sampler.sample(prompts, count, limit, temperature, stop)

    def texts(self, tokens: Tensor, cu_seqlens: Tensor) -> list[str]:
        """Return the text of each row.

        Args:
            tokens: Integers ``[N]``.
            cu_seqlens: int64 ``[R + 1]``.
        """
        rows = tokens.split(cu_seqlens.diff().tolist())
        # Of no rows the tokenizer would make the text of an empty one.
        return list(self.tokenizer.batch_decode(rows, skip_special_tokens=True)) if rows else []

    def evaluate(self, attempt: Callable[[Sequence[Problem]], list[float]]) -> float:
        """Return the mean reward on held-out problems, over all processes, without those whose reward is NaN.

        Args:
            attempt: Returns the reward of one response to each of some problems.

        Raises:
            RewardError: All rewards are NaN.
        """
        chosen = self.problems.measured(self.settings.eval_problems)[self.ranks.index :: self.ranks.count]
        self.ranks.together(self.sampler.sync)
        rewards = torch.tensor(self.ranks.together(lambda: attempt(chosen)), dtype=torch.float64)
        total = self.ranks.sum({"reward": rewards.nansum(), "count": rewards.isnan().logical_not().sum()})
        if not total["count"]:
            raise RewardError("on_reward_error: expected a reward of at least one held-out response, got none")
        return total["reward"] / total["count"]


class RolloutCollector:
    """Base of what makes the rollouts of a step. Its state is what it keeps from one step to the next.

    Args:
        context: Problems and sampler.
    """

    def __init__(self, context: SamplingContext) -> None:
        self._context = context

    def collect(self, number: int) -> RolloutCollection:
        """Return the rewarded rollouts of a step. All processes must call it, and fail together.

        Args:
            number: Number of the step, from 1.
        """
        return self._context.ranks.together(lambda: self._collect(number))

    def _collect(self, number: int) -> RolloutCollection:
        """Return the rewarded rollouts of a step, without an exchange with other processes."""
        raise NotImplementedError

    def attempt(self, problems: Sequence[Problem]) -> list[float]:
        """Return the reward of one greedy response to each problem.

        Args:
            problems: The problems.
        """
        prompts = [self._context.prompt(p) for p in problems]
        made = self._context.complete(prompts, 1, 0.0)
        responses = self._context.texts(made.tokens, made.cu_seqlens)
        return self._context.rewards(problems, responses)

    def state_dict(self) -> dict[str, Any]:
        """Return the state after a step, for a checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the state of a checkpoint.

        Args:
            state: From :meth:`state_dict`.
        """
        return None


class SingleTurn(RolloutCollector):
    """Collects several independent responses to every prompt."""

    def _collect(self, number: int) -> RolloutCollection:
        return self._responses(number, *self._context.chosen(number))

    def _responses(self, number: int, groups: Sequence[int], chosen: Sequence[Problem]) -> RolloutCollection:
        """Return rewarded responses to some problems.

        Args:
            number: Number of the step, from 1.
            groups: Group id of each problem.
            chosen: The problems.
        """
        context, count = self._context, self._context.settings.sampling.group
        prompts = [context.prompt(p) for p in chosen]
        context.sampler.sync()
        with torch.random.fork_rng():
            context.seeded(number)
            made = context.complete(prompts, count, context.settings.sampling.temperature)
        responses = context.texts(made.tokens, made.cu_seqlens)
        problems = [p for p in chosen for _ in range(count)]
        device = made.tokens.device
        rewards = torch.tensor(context.rewards(problems, responses), device=device)
        batch = Rollouts(
            made.tokens,
            made.cu_seqlens,
            group_ids=torch.tensor(groups, device=device).repeat_interleave(count),
            rewards=rewards.nan_to_num(),
            rollout_log_probs=made.log_probs,
            extras={
                "prompt_tokens": left_padded(prompts, -1, device)[0].repeat_interleave(count, 0),
                "truncated": ~made.finished,
            },
        )
        dropped = rewards.isnan()
        return RolloutCollection(problems, responses, batch, rewards, batch.group_ids, made.finished, dropped)
