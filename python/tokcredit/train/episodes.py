"""Rollout collection in which the model acts in an environment."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from tokcredit.environments import Observation
from tokcredit.rewards.bounded import Failure
from tokcredit.train import worlds
from tokcredit.train.dialogues import Dialogue, Dialogues
from tokcredit.train.problems import Problem, World
from tokcredit.train.rollout_collection import RolloutCollection, SamplingContext


@dataclass
class Episode(Dialogue):
    """An episode.

    Attributes:
        world: Where it begins.
        number: Number of the episode among those in its world, from 1.
        steps: What the environment said after each turn.
        lost: Reward that takes the place of all its rewards, if the environment failed, else None.
    """

    world: World = field(kw_only=True)
    number: int = field(kw_only=True)
    steps: list[Observation] = field(default_factory=list)
    lost: float | None = None

    @property
    def states(self) -> list[str]:
        """State that each turn began in."""
        return [self.world.state, *(step.state for step in self.steps[:-1])]

    @property
    def outcome(self) -> float:
        """Reward of the step that ended the episode, 0 if none did."""
        if self.lost is not None:
            return self.lost
        return self.steps[-1].reward if self.steps[-1].done else 0.0

    @property
    def rewards(self) -> list[float]:
        """Reward of each step that is not the outcome, else 0."""
        if self.lost is not None:
            return [0.0] * len(self.steps)
        return [0.0 if step.done else step.reward for step in self.steps]

    @property
    def total(self) -> float:
        """Outcome and rewards together."""
        return self.outcome + sum(self.rewards)


def anchor(state: str) -> int:
    """Return the id of a state, int64: the same for equal keys, in any process.

    Args:
        state: Its key.
    """
    return int.from_bytes(hashlib.sha256(state.encode(errors="surrogatepass")).digest()[:8], "big", signed=True)


class Episodes(Dialogues[Episode]):
    """Collects several episodes in every world, each up to its end or to the limit of turns.

    The reward of the step that ends an episode is its outcome, in ``rewards``; rewards of earlier steps are
    ``token_rewards`` at the last token of their turn. ``turn_rewards`` has all of them. ``anchor_ids`` is the state
    that a turn began in, and ``turn_scores`` the score of the state after it.

    Args:
        context: Problems with a world, and the sampler.

    Raises:
        ValueError: A problem has no world.
    """

    def __init__(self, context: SamplingContext) -> None:
        super().__init__(context)
        everything = [*context.problems.held_out, *(p for task in context.problems.train for p in task)]
        if without := sorted({p.task for p in everything if p.world is None}):
            raise ValueError(f"tasks: expected only tasks with an environment, such as minigrid(), got {without}")
        self.stop = ("\n",) if context.tokenizer.chat_template is None else ()

    def _collect(self, number: int) -> RolloutCollection:
        made, groups = self._sampled(number)
        layout, device = self._layout(made), self._context.sampler.device
        totals = torch.tensor([e.total for e in made], device=device)
        batch = layout.batch(groups, torch.tensor([e.outcome for e in made], device=device))
        scores = [[math.nan if step.score is None else step.score for step in e.steps] for e in made]
        each = [[step.reward if e.lost is None else 0.0 for step in e.steps] for e in made]
        batch = batch.with_inputs(
            token_rewards=layout.of_tokens([e.of_tokens(e.rewards, 0.0) for e in made], torch.float32),
            turn_rewards=layout.of_tokens(
                [e.of_tokens(rewards, 0.0) for e, rewards in zip(made, each, strict=True)], torch.float32
            ),
            turn_scores=layout.of_tokens(
                [e.of_tokens(x, math.nan) for e, x in zip(made, scores, strict=True)], torch.float32
            ),
            anchor_ids=layout.of_tokens([e.of_tokens([anchor(s) for s in e.states], 0, False) for e in made]),
        )
        found = self._collection(layout, batch, made, groups, totals)
        return found._replace(columns={**found.columns, "states": layout.of_turns([e.states for e in made])})

    def attempt(self, problems: Sequence[Problem]) -> list[float]:
        """Return the total reward of one greedy episode in each world.

        Args:
            problems: The problems.
        """
        return [e.total for e in self._converse(problems, 1, 0.0)]

    def begun(self, problem: Problem, prompt: list[int], number: int) -> Episode:
        """Return an episode before its first turn.

        Args:
            problem: The problem.
            prompt: Token ids of the prompt.
            number: Number of the episode among those in its world, from 0.
        """
        assert problem.world is not None
        return Episode(problem, prompt, world=problem.world, number=number + 1)

    def answered(self, dialogues: Sequence[Episode]) -> list[list[int]]:
        """Carry out the last turn of each episode, and return the tokens of the observation.

        Args:
            dialogues: The episodes.

        Raises:
            RewardError: An environment raised an error or took too long, and ``on_reward_error`` is ``stop``.
        """
        seen = worlds.play([(e.world, [turn.text for turn in e.turns]) for e in dialogues])
        return [self._read(e, found) for e, found in zip(dialogues, seen, strict=True)]

    def _introduced(self, problem: Problem) -> Problem:
        if self._context.tokenizer.chat_template is None:
            return problem._replace(question=f"{problem.question}\n")
        return super()._introduced(problem)

    def _read(self, e: Episode, found: Observation | Failure) -> list[int]:
        if isinstance(found, Failure):
            where = f"{e.world}: episode {e.number}, step {len(e.turns)}"
            message = f"environment: {where}, action {e.turns[-1].text!r:.200}: {found.reason}"
            e.lost = self._context.rewards.replaced(message)
            found = Observation("", e.world.state if not e.steps else e.steps[-1].state)
            e.steps.append(found)
            e.answers.append("")
            return []
        e.steps.append(found)
        e.answers.append(found.text)
        e.finished = found.done
        return [] if found.done else self._context.prompt.between(found.text, e.tokens[-1])
