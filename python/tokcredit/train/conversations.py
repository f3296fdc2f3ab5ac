"""Rollout collection in which the model and its tools take turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tokcredit.rewards import matching
from tokcredit.rewards.answers import tagged
from tokcredit.rewards.matching import Similarities
from tokcredit.train import tools
from tokcredit.train.dialogues import Dialogue, Dialogues
from tokcredit.train.problems import Problem
from tokcredit.train.rollout_collection import RolloutCollection, SamplingContext


def _rewards(dialogue: Dialogue, rule: Callable[[Similarities], Similarities]) -> list[float]:
    """Return the reward of each turn: how well its answer, or else its calls, match what was expected."""
    problem = dialogue.problem
    found = [
        tools.calls(turn.text) if (answer := tagged(turn.text)) is None else matching.f1(answer, problem.answer)
        for turn in dialogue.turns
    ]
    return matching.rewards(found, problem.calls or (), rule)


class Conversations(Dialogues[Dialogue]):
    """Collects several conversations about every prompt, each up to an answer, or to a turn without a tool call.

    The tools answer every call at the end of a turn. ``turn_rewards`` has the reward of each turn for its calls or its
    answer; the reward of the conversation is that of the whole text.

    Args:
        context: Problems, which state the expected calls, and the sampler.

    Raises:
        ValueError: A problem states no calls.
    """

    stop = (tools.STOP,)

    def __init__(self, context: SamplingContext) -> None:
        super().__init__(context)
        self._rule = tools.rule(context.settings.tools.matching)
        everything = [*context.problems.held_out, *(p for task in context.problems.train for p in task)]
        if without := sorted({p.task for p in everything if p.calls is None}):
            raise ValueError(f"tasks: expected only tasks with tools, such as calculator(), got {without}")

    def _collect(self, number: int) -> RolloutCollection:
        made, groups = self._sampled(number)
        layout = self._layout(made)
        rewards = torch.tensor(self._judged(made), device=self._context.sampler.device)
        batch = layout.batch(groups, rewards)
        each = [d.of_tokens(_rewards(d, self._rule), 0.0) for d in made]
        batch = batch.with_inputs(turn_rewards=layout.of_tokens(each, torch.float32))
        return self._collection(layout, batch, made, groups, rewards)

    def attempt(self, problems: Sequence[Problem]) -> list[float]:
        """Return the reward of one greedy conversation about each problem.

        Args:
            problems: The problems.
        """
        return self._judged(self._converse(problems, 1, 0.0))

    def begun(self, problem: Problem, prompt: list[int], number: int) -> Dialogue:
        """Return a conversation before its first turn.

        Args:
            problem: The problem.
            prompt: Token ids of the prompt.
            number: Not read.
        """
        return Dialogue(problem, prompt)

    def answered(self, dialogues: Sequence[Dialogue]) -> list[list[int]]:
        """Add the results of the calls in the last turn of each dialogue, and return their tokens.

        Args:
            dialogues: The dialogues.
        """
        read: list[list[int]] = []
        for d in dialogues:
            said = d.turns[-1]
            calls = [] if tagged(said.text) is not None else tools.calls(said.text)
            d.finished = said.whole and not calls
            d.answers.append(tools.results(calls) if said.whole else "")
            read.append(self._context.tokenizer(d.answers[-1], add_special_tokens=False).input_ids)
        return read

    def _judged(self, made: Sequence[Dialogue]) -> list[float]:
        context = self._context
        if not made:
            return []
        texts = context.tokenizer.batch_decode([d.tokens for d in made], skip_special_tokens=True)
        return context.rewards([d.problem for d in made], texts)
