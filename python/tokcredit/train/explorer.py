"""From problems to rewarded rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

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
    """Rollouts of this process.

    Attributes:
        problems: of each rollout.
        replies: text of each rollout.
        batch: the rollouts, with their prompts in ``extras["prompt_tokens"]``.
        finished: bool ``[R]``, whether the model ended by itself.
    """

    problems: list[tasks.Problem]
    replies: list[str]
    batch: Rollouts
    finished: Tensor


class Explorer:
    """Samples replies to the problems and rewards them.

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
        self._settings, self._problems, self._ranks = settings, problems, ranks
        self._tokenizer, self._sampler = tokenizer, sampler

    def explore(self, number: int) -> Explored:
        """Rewarded rollouts for step ``number``, whole groups."""
        s, seed = self._settings.sampling, self._settings.seed
        everything = self._problems.step(number - 1, s.prompts, seed)
        mine = range(self._ranks.index, len(everything), self._ranks.count)
        self._sampler.sync()
        with torch.random.fork_rng():
            # Seeded anew in each step, so that a resumed run draws what an uninterrupted one would.
            mixed = np.random.SeedSequence([seed, number, self._ranks.index]).generate_state(1, np.uint64)
            torch.manual_seed(int(mixed[0]) >> 1)
            prompts, replies, made = self._answer([everything[i] for i in mine], s.group, s.temperature)
        problems = [everything[i] for i in mine for _ in range(s.group)]
        rewards = [p.reward(reply) for p, reply in zip(problems, replies, strict=True)]
        device = made.tokens.device
        batch = Rollouts(
            made.tokens,
            made.cu_seqlens,
            group_ids=torch.tensor([i for i in mine for _ in range(s.group)], device=device),
            rewards=torch.tensor(rewards, dtype=torch.float32, device=device),
            rollout_log_probs=made.log_probs,
            extras={"prompt_tokens": left_padded(prompts, -1, device)[0].repeat_interleave(s.group, 0)},
        )
        return Explored(problems, replies, batch, made.finished)

    def evaluate(self) -> float:
        """Mean reward of greedy replies to held-out problems, over all processes."""
        everything = self._problems.held_out
        count = min(len(everything), self._settings.eval_problems)
        chosen = [everything[i * len(everything) // count] for i in range(count)]
        chosen = chosen[self._ranks.index :: self._ranks.count]
        self._sampler.sync()
        _, replies, _ = self._answer(chosen, 1, 0.0)
        rewards = [p.reward(reply) for p, reply in zip(chosen, replies, strict=True)]
        total = self._ranks.sum({"reward": torch.tensor(rewards).sum(), "count": torch.tensor(len(rewards))})
        return total["reward"] / total["count"]

    def _answer(
        self, problems: Sequence[tasks.Problem], count: int, temperature: float
    ) -> tuple[list[list[int]], list[str], Completions]:
        prompts = [self._prompt(p.question) for p in problems]
        if not prompts:
            nothing = torch.zeros(0, dtype=torch.int64)
            return [], [], Completions(nothing, nothing.new_zeros(1), nothing.float(), nothing.bool())
        made = self._sampler.sample(prompts, count, self._settings.sampling.max_tokens, temperature)
        rows = made.tokens.split(made.cu_seqlens.diff().tolist())
        return prompts, self._tokenizer.batch_decode(rows, skip_special_tokens=True), made

    def _prompt(self, question: str) -> list[int]:
        if self._tokenizer.chat_template is None:
            return list(self._tokenizer(question).input_ids)
        messages = [{"role": "user", "content": question}]
        text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)
